"""The mixture cookbook on binary images, on the same core as the counts.

| file | holds |
| --- | --- |
| datasets | MNIST, FashionMNIST and arrays of the user's own |
| networks | gated and masked layers |
| encoders | separate and amortised components, one or two levels |
| decoders | Bernoulli pixels, PixelCNN |
| configs | parts, sizes and protocol: the papers' models, three budgets |
| parts | makes all of these, and the core's priors, from their names and sizes |
| models | ImageVAE, composed of them and of the core's flow |
| runs | what a run leaves behind, and how it is read again |
| training | how a run is trained and resumed |
| evaluation | test likelihood and diagnostics, streamed over draws |
| probe | linear classification from the latents |
| sweep | many runs, one table |
| report | tables and pictures |

Examples
--------
>>> from mixscvi import images
>>> images.RunConfig.of("vanilla", budget="cpu", n_components=4).mixture
Mixture(n_components=4, n_sampled=None, estimator='all_to_all', component_encoder='separate')
"""

from mixscvi.images.configs import (
    BUDGETS,
    PRESETS,
    Budget,
    Mixture,
    Parts,
    Protocol,
    RunConfig,
    Sizes,
)
from mixscvi.images.datasets import ImageData, load
from mixscvi.images.evaluation import evaluate
from mixscvi.images.models import ImageVAE, build
from mixscvi.images.runs import load_run
from mixscvi.images.training import train

__all__ = [
    "BUDGETS",
    "PRESETS",
    "Budget",
    "ImageData",
    "ImageVAE",
    "Mixture",
    "Parts",
    "Protocol",
    "RunConfig",
    "Sizes",
    "build",
    "evaluate",
    "load",
    "load_run",
    "train",
]
