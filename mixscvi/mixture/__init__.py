"""The mixture core: tensors in, tensors out; it knows neither counts nor images.

| file | holds |
| --- | --- |
| posterior | A diagonal Gaussians as one distribution |
| objectives | MISELBO and SIWAE of log-weights; the estimators that choose components |
| layers | A linear maps or convolutions in one call |
| mlp | A multilayer perceptrons in one call |
| products | matrix products with what is mostly zero |
| encoders | separate components, and components amortized by a code |
| priors | standard normal, mixture of Gaussians, VampPrior |
| flows | the inverse autoregressive flow that all components share |
| diagnostics | divergence, effective sample size, Pareto k-hat, active units |
"""

from mixscvi.mixture.diagnostics import (
    ImportanceDraws,
    active_units,
    component_elbo,
    effective_sample_size,
    jensen_shannon_divergence,
    pareto_k,
    specialization,
)
from mixscvi.mixture.encoders import (
    AmortizedEncoder,
    CodedHeads,
    GaussianHeads,
    SeparateEncoder,
)
from mixscvi.mixture.flows import InverseAutoregressiveFlow
from mixscvi.mixture.layers import StackedConv2d, StackedLinear, StackedSparseLinear
from mixscvi.mixture.mlp import StackedMLP
from mixscvi.mixture.objectives import (
    Estimator,
    importance_weighted_miselbo,
    miselbo,
    mixture_log_prob,
    siwae,
    siwae_standard_error,
)
from mixscvi.mixture.posterior import MixturePosterior
from mixscvi.mixture.priors import GaussianMixture, Prior, StandardNormal, VampPrior

__all__ = [
    "AmortizedEncoder",
    "CodedHeads",
    "Estimator",
    "GaussianHeads",
    "GaussianMixture",
    "ImportanceDraws",
    "InverseAutoregressiveFlow",
    "MixturePosterior",
    "Prior",
    "SeparateEncoder",
    "StackedConv2d",
    "StackedLinear",
    "StackedMLP",
    "StackedSparseLinear",
    "StandardNormal",
    "VampPrior",
    "active_units",
    "component_elbo",
    "effective_sample_size",
    "importance_weighted_miselbo",
    "jensen_shannon_divergence",
    "miselbo",
    "mixture_log_prob",
    "pareto_k",
    "siwae",
    "siwae_standard_error",
    "specialization",
]
