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
| loaders, rows, given | minibatches of data in memory, on disk, and of the user's own |
| loader_arguments | arguments of loaders |
| gathering | what they give, put together |
| training | the training plan |
| latents | latent representations and mixtures |
| evaluation | likelihoods and diagnostics |
| components | whether all components are of use |
| adapted | exact posteriors |
| expression | expression under the encoder's or the exact posteriors |
| differential | which genes differ between groups of cells |
| raw_counts | columns on counts in tables of differential expression |
| conversion | models of scvi-tools as mixtures |
| persistence | saving and loading |
| legacy | models saved before scvi-tools 0.15 |
| files, plain, sizes | the file of a model, what may stand in it, and how large it may say it is |
| description | what it says of the model |
| queries | query mapping |
| minified | data without counts |
| runner | how a training is started |
| training_arguments, watched, accelerators | its arguments: what it watches, where it runs |
| weights | whether they are numbers |
| memory | what a training step takes at least |
| checkpoints, identity, random_states | trainings that may be interrupted |
| distributed | training by several processes |
"""

import logging

from mixscvi.model.adapted import AdaptedPosterior
from mixscvi.model.evaluation import ComponentDiagnostics
from mixscvi.model.latents import LatentMixture
from mixscvi.model.mixscanvi import MixSCANVI
from mixscvi.model.mixscvi import MixSCVI

# What the package says goes where scvi-tools says things, at `scvi.settings.verbosity`.
logging.getLogger("mixscvi").parent = logging.getLogger("scvi")

__all__ = ["AdaptedPosterior", "ComponentDiagnostics", "LatentMixture", "MixSCANVI", "MixSCVI"]
