"""Which components of a posterior are of no use."""

from __future__ import annotations

import torch
from torch import Tensor

from mixscvi.mixture.diagnostics import ImportanceDraws, component_elbo
from mixscvi.mixture.objectives import siwae

__all__ = ["dead_components", "name_dead", "often_dead"]

_FACTOR = 10.0
_LEAST_DIVERGENCE = 2.0  # nats
_SHARE_TO_WARN_OF = 0.1


def dead_components(draws: ImportanceDraws) -> Tensor:
    r"""Which components lie where the exact posterior is not.

    .. math:: \mathrm{KL}(q_a \,\|\, p(z \mid x)) = \log p(x) - \mathrm{ELBO}_a

    takes log p(x) from SIWAE, or as the best component's ELBO plus half the variance of its
    log-weights (its second-order expansion) where that is more: few draws of a poor proposal do not
    reach the posterior. A component is dead if its divergence is more than ten times that of the
    best component, which counts as 2 nats at least. So it is measured by what the same encoder
    achieves for the same cell: a poor fit of all components is no death.

    A bound that averages weights inside the logarithm loses at most log A by components that are
    dead, and has no gradient that would revive them; the average over components of the logarithm,
    MISELBO, loses in proportion to their divergence.

    Parameters
    ----------
    draws
        Draws of `B` cells or images, `(L, B, A)`; two per component are the least, some five
        enough.

    Returns
    -------
    Booleans, `(B, A)`; the best component of each is alive.

    Raises
    ------
    ValueError
        If ``L < 2``.

    Examples
    --------
    >>> import torch
    >>> log_joint = torch.tensor([-3.0, -4.0, -90.0]).expand(5, 2, 3)
    >>> dead_components(ImportanceDraws(log_joint, *torch.zeros(2, 5, 2, 3)))[0]
    tensor([False, False,  True])
    """
    if len(draws.log_joint) < 2:
        raise ValueError("draws must hold at least two per component for a variance, got L=1")
    elbo = component_elbo(draws.log_joint, draws.log_own).nan_to_num(-torch.inf, neginf=-torch.inf)
    best, which = elbo.max(-1, keepdim=True)
    log_weights = draws.log_weights
    log_px = siwae(log_weights.where(~log_weights.isnan(), -torch.inf)).unsqueeze(-1)
    half_variance = 0.5 * (draws.log_joint - draws.log_own).var(0).gather(-1, which)
    divergence_of_best = torch.maximum(log_px - best, half_variance).clamp_min(_LEAST_DIVERGENCE)
    return best - elbo > (_FACTOR - 1) * divergence_of_best


def often_dead(dead: Tensor) -> dict[int, float]:
    """Components that are dead in more than a tenth of cells or images, and in which share of them.

    Parameters
    ----------
    dead
        From :func:`dead_components`, `(B, A)`.

    Examples
    --------
    >>> often_dead(torch.tensor([[False, True], [False, False]]))
    {1: 0.5}
    """
    shares = dead.double().mean(0).tolist()
    return {a: share for a, share in enumerate(shares) if share > _SHARE_TO_WARN_OF}


def name_dead(shares: dict[int, float], n_components: int, one: str, seen: str) -> str:
    """What a warning says of components that are dead.

    Parameters
    ----------
    shares
        From :func:`often_dead`.
    n_components
        How many components there are, `A`.
    one
        What they were looked at in: "cell" or "image".
    seen
        Of which ones.

    Examples
    --------
    >>> name_dead({1: 0.5}, 2, "cell", "training cells")[:63]
    'components are dead, of n_components=2: 1 (in 50% of the cells)'
    """
    named = ", ".join(f"{a} (in {share:.0%} of the {one}s)" for a, share in shares.items())
    return (
        f"components are dead, of n_components={n_components}: {named}. Their divergence from the "
        f"posterior is more than ten times that of the {one}'s best component, by a few draws of "
        f"some {seen}"
    )
