"""The mixture core: tensors in, tensors out; it knows neither counts nor images.

| file | holds |
| --- | --- |
| posterior | A diagonal Gaussians as one distribution |
| gaussians | densities of many Gaussians at many points, in bounded memory |
| objectives | MISELBO and SIWAE of log-weights; the estimators that choose components |
| layers | A linear maps or convolutions in one call |
| mlp | A multilayer perceptrons in one call |
| products | matrix products by the faster of two libraries |
| nonzeros | matrix products that skip zeros |
| mostly_zero | a matrix that has its non-zeros, and is dense to all who do not know |
| encoders | a trunk and heads, with separate or amortized components |
| heads | from hidden units to Gaussians: what components share |
| priors | standard normal, mixture of Gaussians, VampPrior |
| flows | the inverse autoregressive flow that all components share |
| student_mixture | a weighted mixture of Student's t distributions |
| adaptation | from a starting mixture to the exact posterior |
| targets | a density that is known up to a factor, called in bounded memory and counted |
| warm_start | the first proposal: from the start's draws, scores and ascents |
| score_matching | a Gaussian fitted to scores |
| population | the memory of all draws, and the maximization step |
| diagnostics | divergence, effective sample size, Pareto k-hat, active units |
| death | components that are of no use |
"""

from mixscvi.mixture.adaptation import Adapted, adapt
from mixscvi.mixture.death import dead_components
from mixscvi.mixture.diagnostics import (
    ImportanceDraws,
    active_units,
    component_elbo,
    effective_sample_size,
    jensen_shannon_divergence,
    pareto_k,
    specialization,
)
from mixscvi.mixture.encoders import AmortizedEncoder, Encoder, SeparateEncoder
from mixscvi.mixture.flows import InverseAutoregressiveFlow
from mixscvi.mixture.heads import CodedHeads, GaussianHeads, ShiftedHeads
from mixscvi.mixture.layers import StackedConv2d, StackedLinear
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
from mixscvi.mixture.student_mixture import StudentMixture

__all__ = [
    "Adapted",
    "AmortizedEncoder",
    "CodedHeads",
    "Encoder",
    "Estimator",
    "GaussianHeads",
    "GaussianMixture",
    "ImportanceDraws",
    "InverseAutoregressiveFlow",
    "MixturePosterior",
    "Prior",
    "SeparateEncoder",
    "ShiftedHeads",
    "StackedConv2d",
    "StackedLinear",
    "StackedMLP",
    "StandardNormal",
    "StudentMixture",
    "VampPrior",
    "active_units",
    "adapt",
    "component_elbo",
    "dead_components",
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
