"""The inverse autoregressive flow that all components share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from zuko.flows import MAF
from zuko.transforms import ComposedTransform

__all__ = ["InverseAutoregressiveFlow"]


class InverseAutoregressiveFlow(nn.Module):
    r"""A bijection :math:`z_T = f(z_0)` of `n_steps` masked autoregressive affine steps.

    Going forward, as sampling does, takes one pass a step; going backward takes `D`. All
    components share the one f, so

    .. math:: \log q_a(z_T \mid x) = \log q_a(z_0 \mid x) - \log |\det \partial f / \partial z_0|

    has the same determinant for every a, and the mixture needs it once. The order of the
    dimensions is reversed from step to step. Kingma et al. 2016.

    Parameters
    ----------
    n_latent
        Latent dimensions, `D`.
    n_steps
        Steps.
    hidden_features
        Widths of each step's hidden layers.

    Raises
    ------
    ValueError
        If there is no step.

    Examples
    --------
    >>> import torch
    >>> flow = InverseAutoregressiveFlow(n_latent=3, n_steps=2)
    >>> z0 = torch.randn(5, 3)
    >>> z, log_det = flow(z0)
    >>> z.shape, log_det.shape
    (torch.Size([5, 3]), torch.Size([5]))
    >>> torch.allclose(flow.inverse(z)[0], z0, atol=1e-4)
    True
    """

    def __init__(
        self, n_latent: int, n_steps: int, *, hidden_features: Sequence[int] = (64, 64)
    ) -> None:
        super().__init__()
        if n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, got {n_steps}")
        flow = MAF(n_latent, transforms=n_steps, hidden_features=hidden_features)
        # The steps alone: the flow's base is not ours, and saved models know them by this name.
        self.steps = flow.transform.transforms

    @property
    def transform(self) -> ComposedTransform:
        """f as a torch transform, for use in ``TransformedDistribution``."""
        return ComposedTransform(*(step() for step in self.steps))

    def forward(self, z0: Tensor) -> tuple[Tensor, Tensor]:
        """Push draws of the base through the flow.

        Parameters
        ----------
        z0
            Draws, `(..., D)`.

        Returns
        -------
        The points f(z0), `(..., D)`, and ``log |det df/dz0|`` at z0, `(...)`.
        """
        return self.transform.call_and_ladj(z0)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Pull points back to the base, in `D` passes a step.

        Parameters
        ----------
        z
            Points, `(..., D)`.

        Returns
        -------
        The base points z0, `(..., D)`, and ``log |det df/dz0|`` at z0, `(...)`.
        """
        transform = self.transform
        z0 = transform.inv(z)
        return z0, transform.log_abs_det_jacobian(z0, z)
