"""MixSCVI: AnnData in, latents, likelihoods and diagnostics out.

| file | holds |
| --- | --- |
| base | what all models share |
| mixscvi | the model: what it is made of, and its data |
| mixscanvi | the semi-supervised model |
| labels | its labels, checked, and its minibatches |
| data | checks of the data, minibatches |
| training | the training plan |
| latents | latent representations and mixtures |
| evaluation | likelihoods and diagnostics |
| components | whether all components are of use |
| adapted | exact posteriors |
| expression | expression under the encoder's or the exact posteriors |
| conversion | models of scvi-tools as mixtures |
| persistence | saving and loading |
| files, plain | the file of a model, and what may stand in it |
| queries | query mapping, minified data |
| runner | how a training is started |
"""

from mixscvi.model.adapted import AdaptedPosterior
from mixscvi.model.evaluation import ComponentDiagnostics
from mixscvi.model.latents import LatentMixture
from mixscvi.model.mixscanvi import MixSCANVI
from mixscvi.model.mixscvi import MixSCVI

__all__ = ["AdaptedPosterior", "ComponentDiagnostics", "LatentMixture", "MixSCANVI", "MixSCVI"]
