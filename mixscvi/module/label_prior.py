"""The prior of z in scANVI, with the label and the latent below z integrated out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints, kl_divergence

if TYPE_CHECKING:
    from scvi.module import SCANVAE

__all__ = ["BelowZ", "LabelPrior"]

_DRAWS_OF_U = 4
_ROWS_AT_ONCE = 2**15


class BelowZ(NamedTuple):
    """What stands below draws of z, for each of `C` labels and one draw of u given each."""

    log_pz: Tensor
    """log p(z | u, y), `(N, C)`."""
    log_ratio: Tensor
    """log p(u) - log q(u | z, y), `(N, C)`."""
    kl_u: Tensor
    """KL(q(u | z, y) || p(u)), the mean of the negative ratio, `(N, C)`."""


class LabelPrior(Distribution):
    r"""p(z) of scANVI: a label y and a latent u stand below z, and are integrated out.

    .. math:: p(z) = \sum_y p(y) \, \mathbb{E}_{q(u \mid z, y)} \!\left[
        \frac{p(z \mid u, y) \, p(u)}{q(u \mid z, y)} \right]

    The sum over labels is exact, the expectation an average over fresh draws of u. So the density
    is unbiased, and log p(x) that is importance-sampled with it is consistent, as with an exact
    density. It is noisier, which k-hat sees.

    Parameters
    ----------
    module
        Has the networks ``encoder_z2_z1``, q(u | z, y), and ``decoder_z1_z2``, p(z | u, y), and
        the probabilities ``y_prior`` of the `C` labels. It is read when densities are asked for.
    n_draws
        Draws of u for each z and label.

    Examples
    --------
    >>> import torch
    >>> from mixscvi.module import ScviSCANVAE
    >>> module = ScviSCANVAE(20, n_latent=3, n_labels=5).eval()
    >>> LabelPrior(module).log_prob(torch.zeros(7, 3)).shape
    torch.Size([7])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector

    def __init__(self, module: SCANVAE, n_draws: int = _DRAWS_OF_U) -> None:
        super().__init__(event_shape=torch.Size((module.n_latent,)), validate_args=False)
        self.module = module
        self.n_draws = n_draws

    def below(self, z: Tensor) -> BelowZ:
        """Draw u once for every label of values of z.

        Parameters
        ----------
        z
            `N` values, `(N, D)`.

        Returns
        -------
        What stands below each, by label.
        """
        module, n_labels = self.module, self.module.n_labels
        rows = z.unsqueeze(1).expand(-1, n_labels, -1).flatten(0, 1)
        labels = torch.eye(n_labels, dtype=z.dtype, device=z.device).repeat(len(z), 1)
        qu, u = module.encoder_z2_z1(rows, labels)
        mean, variance = module.decoder_z1_z2(u, labels)
        pz = Normal(mean, variance.sqrt(), validate_args=False)
        pu = Normal(torch.zeros_like(qu.loc), torch.ones_like(qu.scale), validate_args=False)
        terms = pz.log_prob(rows), pu.log_prob(u) - qu.log_prob(u), kl_divergence(qu, pu)
        return BelowZ(*(term.sum(-1).unflatten(0, (len(z), n_labels)) for term in terms))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z), with fresh draws of u.

        Parameters
        ----------
        value
            Values of z, `(..., D)`.

        Returns
        -------
        `(...)`, in nats.
        """
        log_py = self.module.y_prior.log()  # (1, C)
        values = []
        for z in value.flatten(0, -2).split(max(1, _ROWS_AT_ONCE // self.module.n_labels)):
            draws = [self.below(z) for _ in range(self.n_draws)]
            joint = torch.cat([log_py + draw.log_pz + draw.log_ratio for draw in draws], -1)
            values.append(joint.logsumexp(-1) - math.log(self.n_draws))
        return torch.cat(values).view(value.shape[:-1])

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draw from p(z), without gradients.

        Parameters
        ----------
        sample_shape
            Leading shape of the draws.

        Returns
        -------
        Draws of z, `(*sample_shape, D)`.
        """
        module, shape = self.module, torch.Size(sample_shape)
        with torch.no_grad():
            probabilities = module.y_prior.expand(shape.numel(), -1)
            y = probabilities.multinomial(1).squeeze(-1)
            labels = F.one_hot(y, module.n_labels).to(probabilities.dtype)
            u = torch.randn(len(y), module.n_latent, dtype=labels.dtype, device=y.device)
            mean, variance = module.decoder_z1_z2(u, labels)
            return torch.normal(mean, variance.sqrt()).view(*shape, module.n_latent)
