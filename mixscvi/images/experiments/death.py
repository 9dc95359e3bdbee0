"""Whether a trained model has components that are of no use."""

from __future__ import annotations

import torch
from torch import Tensor

from mixscvi.images.networks.vae import ImageVAE
from mixscvi.mixture.death import dead_components, name_dead, often_dead
from mixscvi.warning import warn_user

__all__ = ["warn_of_dead_components"]

_N_DRAWS = 5  # of each component
_N_DECODED = 2_000  # of all images and components, about
_N_IMAGES = (10, 100)


def warn_of_dead_components(model: ImageVAE, images: Tensor, seed: int) -> None:
    """Warn of components that lie where the exact posterior is not.

    See :func:`mixscvi.mixture.dead_components`.

    Parameters
    ----------
    model
        In evaluation mode, on the device of the images.
    images
        Binary images, `(n, 1, height, width)`; the first hundred at most are looked at.
    seed
        Of the draws; other random numbers are what they would have been.

    Warns
    -----
    UserWarning
        If components are dead in more than a tenth of the images, with their numbers.
    """
    n_components = model.mixture.n_components
    if n_components == 1:
        return
    least, most = _N_IMAGES
    n_images = min(most, max(least, _N_DECODED // (_N_DRAWS * n_components)))
    generator = torch.Generator(images.device).manual_seed(seed)
    with torch.inference_mode():
        draws = model.importance_draws(images[:n_images], _N_DRAWS, generator=generator)
    dead = often_dead(dead_components(draws))
    if dead:
        named = name_dead(dead, n_components, "image", "validation images")
        warn_user(
            f"{named}: do not use the mean of the mixture. Longer training, fewer components or a "
            "smaller learning rate may help."
        )
