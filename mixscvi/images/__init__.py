"""Mixture posteriors in VAEs of binary images, on the same core as the counts.

| module | holds |
| --- | --- |
| datasets | images of MNIST, FashionMNIST or arrays, and their minibatches |
| files | the idx files of MNIST and FashionMNIST |
| networks | ImageVAE: encoders, decoders and priors, composed on the core |
| experiments | configuration, training, evaluation, probe, sweep and report of runs |

Examples
--------
>>> from mixscvi import images
>>> images.RunConfig.from_preset("vanilla", budget="small", n_components=4).mixture
MixtureConfig(n_components=4, n_sampled=None, estimator='all_to_all', component_encoder='separate')
"""

from mixscvi.images.datasets import ImageData, load
from mixscvi.images.experiments.configs import BUDGETS, Budget, RunConfig, TrainingConfig
from mixscvi.images.experiments.evaluation import evaluate
from mixscvi.images.experiments.runs import build, load_run
from mixscvi.images.experiments.training import train
from mixscvi.images.networks.configs import PRESETS, MixtureConfig, ModelConfig, Sizes
from mixscvi.images.networks.vae import ImageVAE

__all__ = [
    "BUDGETS",
    "PRESETS",
    "Budget",
    "ImageData",
    "ImageVAE",
    "MixtureConfig",
    "ModelConfig",
    "RunConfig",
    "Sizes",
    "TrainingConfig",
    "build",
    "evaluate",
    "load",
    "load_run",
    "train",
]
