"""Priors p(z), as modules that hand back a distribution once per step.

A prior is called with the encoder, the module from inputs to their mixture posterior; the
VampPrior alone uses it. What comes back has ``log_prob(z)`` for `(..., D)` and ``sample``, so a
step evaluates the prior's parameters once however many draws it scores. A new prior is one more
class here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
)

from mixscvi.mixture.gaussians import diagonal_normal_log_prob, in_bounded_memory
from mixscvi.mixture.posterior import MixturePosterior

__all__ = ["GaussianMixture", "Prior", "StandardNormal", "VampPrior"]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Hold a module and its submodules in evaluation mode."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class Prior(nn.Module, ABC):
    """What every prior offers.

    A prior of your own is a subclass whose :meth:`forward` builds a distribution from the
    module's parameters. Where a model takes a prior, it takes an instance of it.

    Examples
    --------
    >>> import torch
    >>> from torch.distributions import Independent, StudentT
    >>> class HeavyTailed(Prior):
    ...     def __init__(self, n_latent):
    ...         super().__init__()
    ...         self.log_scale = torch.nn.Parameter(torch.zeros(n_latent))
    ...
    ...     def forward(self, encoder):
    ...         return Independent(StudentT(4.0, 0.0, self.log_scale.exp()), 1)
    >>> HeavyTailed(2)(encoder=None).log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    @abstractmethod
    def forward(self, encoder: nn.Module | None) -> Distribution:
        """Build p(z): a distribution with event shape `(D,)` and no batch shape.

        Parameters
        ----------
        encoder
            Maps inputs to their mixture posterior; ``None`` for priors that do without.

        Returns
        -------
        The distribution: has ``log_prob`` and ``sample``.
        """


class StandardNormal(Prior):
    """Standard normal prior: the default, and the one that keeps closed forms.

    Parameters
    ----------
    n_latent
        Latent dimensions, `D`.

    Examples
    --------
    >>> import torch
    >>> prior = StandardNormal(2)
    >>> prior(encoder=None).log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    loc: Tensor

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(n_latent), persistent=False)

    def forward(self, encoder: nn.Module | None) -> Distribution:
        """Build p(z).

        Parameters
        ----------
        encoder
            Not used.

        Returns
        -------
        A standard normal, event shape `(D,)`.
        """
        normal = Normal(self.loc, torch.ones_like(self.loc), validate_args=False)
        return Independent(normal, 1, validate_args=False)


class _GaussianMixture(MixtureSameFamily):
    """torch's mixture, whose density at many points takes bounded memory."""

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(
            Categorical(logits=logits, validate_args=False),
            Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False),
            validate_args=False,
        )

    def log_prob(self, x: Tensor) -> Tensor:
        log_weights = self.mixture_distribution.logits

        def score(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
            return (diagonal_normal_log_prob(z, loc, scale) + log_weights).logsumexp(-1)

        return in_bounded_memory(score, x.unsqueeze(-2), self.loc, self.scale)


class GaussianMixture(Prior):
    """Mixture of `K` Gaussians with learned weights, means and scales.

    Choose it when the latent space should form clusters that need not look like single cells.

    Parameters
    ----------
    n_latent
        Latent dimensions, `D`.
    n_components
        Prior components, `K`.

    Examples
    --------
    >>> import torch
    >>> prior = GaussianMixture(2, n_components=10)
    >>> prior(encoder=None).sample((3,)).shape
    torch.Size([3, 2])
    """

    def __init__(self, n_latent: int, n_components: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_components))
        self.loc = nn.Parameter(torch.randn(n_components, n_latent))
        self.log_scale = nn.Parameter(torch.zeros(n_components, n_latent))

    def forward(self, encoder: nn.Module | None) -> Distribution:
        """Build p(z).

        Parameters
        ----------
        encoder
            Not used.

        Returns
        -------
        A mixture of `K` Gaussians, event shape `(D,)`.
        """
        return _GaussianMixture(self.logits, self.loc, self.log_scale.exp())


class VampPrior(Prior):
    r"""Mixture of the posteriors of `K` learned pseudo-inputs.

    .. math:: p(z) = \frac{1}{K A} \sum_{k=1}^{K} \sum_{a=1}^{A} q_a(z \mid u_k)

    Tomczak & Welling 2018, with the mixture encoder's `A` components instead of its one. It
    is a joint density over the latent dimensions. The encoder runs on the pseudo-inputs with its
    running statistics and without dropout, in training too: a prior that depended on the
    minibatch would not be one. With a flow, the pseudo-posteriors are those of the base mixture;
    a flow shared by prior and posterior would cancel out of their ratio.

    Choose it when the posterior average is far from a single Gaussian, and data are plentiful.

    Parameters
    ----------
    pseudo_inputs
        Module that, called without arguments, gives the encoder's inputs for all `K`: a tensor or
        a tuple of them.

    Examples
    --------
    >>> import torch
    >>> from mixscvi.mixture.encoders import SeparateEncoder
    >>> class Inputs(torch.nn.Module):
    ...     def __init__(self, start):
    ...         super().__init__()
    ...         self.value = torch.nn.Parameter(start)
    ...
    ...     def forward(self):
    ...         return self.value
    >>> encoder = SeparateEncoder(4, n_in=20, n_latent=2)
    >>> prior = VampPrior(Inputs(torch.rand(30, 20)))
    >>> prior(encoder)
    MixturePosterior(batch_shape=(), n_components=120, n_latent=2)
    """

    def __init__(self, pseudo_inputs: nn.Module) -> None:
        super().__init__()
        self.pseudo_inputs = pseudo_inputs

    def forward(self, encoder: nn.Module | None) -> Distribution:
        """Build p(z) from the posteriors of the pseudo-inputs, batch shape `()`.

        Parameters
        ----------
        encoder
            Maps the pseudo-inputs to their posteriors, of `A` components each.

        Returns
        -------
        A mixture of `K * A` Gaussians, batch shape `()` and event shape `(D,)`.

        Raises
        ------
        ValueError
            If `encoder` is ``None``.
        """
        if encoder is None:
            raise ValueError("a VampPrior is made of the encoder's posteriors, got encoder=None")
        inputs = self.pseudo_inputs()
        with _evaluating(encoder):
            posterior = encoder(*inputs) if isinstance(inputs, tuple) else encoder(inputs)
        return MixturePosterior(
            posterior.component_loc.flatten(0, 1), posterior.component_scale.flatten(0, 1)
        )
