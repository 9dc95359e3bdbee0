"""Log-likelihoods of counts: exact, fused, and shared between the draws of a cell."""

from mixscvi.likelihoods.heads import head_log_prob, logits_log_prob
from mixscvi.likelihoods.log_prob import nb_log_prob, poisson_log_prob, zinb_log_prob

__all__ = [
    "head_log_prob",
    "logits_log_prob",
    "nb_log_prob",
    "poisson_log_prob",
    "zinb_log_prob",
]
