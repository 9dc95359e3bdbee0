"""From the encoder's posterior of an image to its exact one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from mixscvi.images.networks.vae import EncodedImages, ImageVAE
from mixscvi.mixture import Adapted, MixturePosterior, adapt

__all__ = ["adapt_images"]

_ELEMENTS_AT_ONCE = 2**23  # values in the decoder's widest layer


def adapt_images(
    model: ImageVAE,
    x: Tensor,
    *,
    encoded: EncodedImages | None = None,
    prior: Distribution | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Adapted:
    r"""Adapt the encoder's posteriors of images to the exact ones.

    Draws are those of the base space, ahead of the flow, with the levels side by side, the upper
    one first:

    .. math::
        \log p(x, z(e)) + \log |\det \partial z / \partial e|, \qquad
        p(x, z) = p(z_2)\, p(z_1 \mid z_2)\, p(x \mid z_1, z_2)

    With two levels a component of the start is what the encoder gives at the mean of its own upper
    level: :math:`q_a(z_1 \mid x, z_2 = \mu_a)` beside :math:`q_a(z_2 \mid x)`.

    Parameters
    ----------
    model
        Whose encoders, prior and decoder; take the gradients of its parameters off to save time.
    x
        Binary images, `(B, 1, height, width)`.
    encoded
        What :meth:`ImageVAE.encode` returned for all components; encoded here when ``None``.
    prior
        What :meth:`ImageVAE.prior_distribution` returned; built here when ``None``.
    generator
        Source of randomness, on the device of `x`; torch's own when ``None``.
    **options
        Passed to :func:`mixscvi.mixture.adapt`. Unless ``rows_per_call`` is given, as many draws
        are decoded at once as make about eight million values in the decoder's widest layer.

    Returns
    -------
    Adapted proposals of the `B` images, of `n_levels * D` dimensions.

    Raises
    ------
    RuntimeError
        In torch's inference mode, which forbids gradients.

    Examples
    --------
    >>> import torch
    >>> from mixscvi.images.networks.configs import PRESETS, MixtureConfig, Sizes
    >>> sizes = Sizes(n_latent=2, hidden=(12, 10), n_prior_components=4)
    >>> model = ImageVAE((5, 5), PRESETS["hierarchical"], MixtureConfig(3), sizes)
    >>> adapted = adapt_images(model, torch.zeros(6, 1, 5, 5), n_final=50)
    >>> adapted.draws.shape, adapted.log_likelihood.shape
    (torch.Size([50, 6, 4]), torch.Size([6]))
    """
    with torch.no_grad():
        loc, scale = model.component_parameters(model.encode(x) if encoded is None else encoded)
        prior = model.prior_distribution() if prior is None else prior

    def log_joint(draws: Tensor, images: Tensor) -> Tensor:
        levels, log_det = model.push_forward(draws.unsqueeze(2))  # (N, n, 1, D) each
        log_prior = model.log_prior(*levels, prior=prior)
        log_likelihood = model.decoder.log_prob(x[images], torch.cat(levels, -1))
        return (log_likelihood + log_prior + log_det).squeeze(2)

    options.setdefault("rows_per_call", max(1, _ELEMENTS_AT_ONCE // model.decoder.n_values))
    return adapt(log_joint, MixturePosterior(loc, scale), generator=generator, **options)
