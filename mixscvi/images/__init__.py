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

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixscvi.images.datasets import ImageData, load
    from mixscvi.images.experiments.configs import BUDGETS, Budget, RunConfig, TrainingConfig
    from mixscvi.images.experiments.evaluation import evaluate
    from mixscvi.images.experiments.runs import build
    from mixscvi.images.experiments.training import train
    from mixscvi.images.experiments.weights import load_run
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

_MODULES = {
    "datasets": ("ImageData", "load"),
    "experiments.configs": ("BUDGETS", "Budget", "RunConfig", "TrainingConfig"),
    "experiments.evaluation": ("evaluate",),
    "experiments.runs": ("build",),
    "experiments.training": ("train",),
    "experiments.weights": ("load_run",),
    "networks.configs": ("PRESETS", "MixtureConfig", "ModelConfig", "Sizes"),
    "networks.vae": ("ImageVAE",),
}


def __getattr__(name: str) -> Any:
    """Import what a name needs when it is first used: training takes seconds to import."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"mixscvi.images.{module}"), name)
    raise AttributeError(f"module 'mixscvi.images' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
