"""MixSCVI: AnnData in, latents, likelihoods and diagnostics out.

| file | holds |
| --- | --- |
| base | what all models share |
| mixscvi | the model: what it is made of, and its data |
| mixscanvi | the semi-supervised model |
| pretrained | a trained model of the counts as its start |
| prediction | its labels of the cells |
| labels | the labels of the data, checked, its minibatches and training plan |
| data, inputs | checks of the data and of arguments, splits of the cells |
| loaders, rows | minibatches of data in memory, and on disk |
| training | the training plan |
| latents | latent representations and mixtures |
| evaluation | likelihoods and diagnostics |
| components | whether all components are of use |
| adapted | exact posteriors |
| expression | expression under the encoder's or the exact posteriors |
| raw_counts | columns on counts in tables of differential expression |
| conversion | models of scvi-tools as mixtures |
| persistence | saving and loading |
| legacy | models saved before scvi-tools 0.15 |
| files, plain, sizes | the file of a model, what may stand in it, and how large it may say it is |
| queries | query mapping |
| minified | data without counts |
| runner | how a training is started |
| checkpoints, identity, random_states | trainings that may be interrupted |
| distributed | training by several processes |
"""

from mixscvi.model.adapted import AdaptedPosterior
from mixscvi.model.evaluation import ComponentDiagnostics
from mixscvi.model.latents import LatentMixture
from mixscvi.model.mixscanvi import MixSCANVI
from mixscvi.model.mixscvi import MixSCVI

__all__ = ["AdaptedPosterior", "ComponentDiagnostics", "LatentMixture", "MixSCANVI", "MixSCVI"]
