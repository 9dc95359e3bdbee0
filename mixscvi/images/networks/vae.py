"""ImageVAE: encoder x components x flow x levels x prior x decoder, composed on the core."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from mixscvi.images.networks.configs import MixtureConfig, ModelConfig, Sizes
from mixscvi.images.networks.decoders import make_decoder
from mixscvi.images.networks.encoders import ConditionalEncoder, make_encoder
from mixscvi.images.networks.layers import ConvTrunk, DenseTrunk
from mixscvi.images.networks.priors import ConditionalPrior, make_prior
from mixscvi.mixture import (
    Estimator,
    ImportanceDraws,
    InverseAutoregressiveFlow,
    MixturePosterior,
    mixture_log_prob,
)

__all__ = ["EncodedImages", "ImageVAE", "LatentDraws", "count_parameters", "seeded"]


def _widened(width: int, factor: float) -> int:
    """Width times a factor, at least 1."""
    return max(1, round(width * factor))


def _trunk_maker(
    image_shape: tuple[int, int], config: ModelConfig, sizes: Sizes
) -> Callable[[int], DenseTrunk | ConvTrunk]:
    """A function that makes an encoder's trunk, given the number of its networks."""
    factor = sizes.encoder_width
    if config.encoder == "dense":
        hidden = tuple(_widened(width, factor) for width in sizes.hidden)
        return functools.partial(DenseTrunk, image_shape=image_shape, hidden=hidden)
    layers = tuple((_widened(n, factor), size, stride) for n, size, stride in sizes.conv_layers)
    return functools.partial(ConvTrunk, image_shape=image_shape, layers=layers)


class EncodedImages(NamedTuple):
    """What the encoders make of `B` images, to draw from as often as needed."""

    posterior: MixturePosterior
    """Base components of the (upper) level, batch shape `(B,)`."""
    lower: Tensor | None
    """What the images add to the lower level's pre-activations, if there is one."""
    components: Tensor | None
    """The components that were encoded, in order; all `A` when ``None``."""


class LatentDraws(NamedTuple):
    """Draws from the sampled components, and their densities."""

    z: Tensor
    """The levels side by side, the upper one first, `(L, B, S, n_levels * D)`."""
    cross_log_prob: Tensor
    """Joint log-density of all levels under every component, `(L, B, S, A)`."""
    own_log_prob: Tensor
    """The same under the component that the draw came from, `(L, B, S)`."""
    log_prior: Tensor
    """log p(z) of all levels, `(L, B, S)`."""


class ImageVAE(nn.Module):
    r"""Variational autoencoder of binary images with a mixture posterior.

    One level: q_a(z | x), a Gaussian pushed through the shared flow. Two levels:
    :math:`q_a(z_1, z_2 \mid x) = q_a(z_2 \mid x)\, q_a(z_1 \mid x, z_2)`, so the density of
    component j at a draw of component s is the sum of both levels' log-densities, and the
    mixture is over these sums. With a flow, each level has its own; the determinant is the
    same under every component.

    Parameters
    ----------
    image_shape
        Height and width.
    config
        What the model is composed of.
    mixture
        Components, and how they are sampled.
    sizes
        Sizes of the networks.
    prior_has_own_encoder
        Whether a VampPrior uses an encoder of its own with one component instead of the
        posterior's: for components that are trained against a fixed prior.

    References
    ----------
    Kviman et al., arXiv 2209.15514; Tomczak & Welling 2018 for the hierarchy.

    Examples
    --------
    >>> import torch
    >>> from mixscvi.images.networks.configs import PRESETS, MixtureConfig, Sizes
    >>> sizes = Sizes(n_latent=3, hidden=(12, 10), n_prior_components=4, pixelcnn_channels=4)
    >>> model = ImageVAE((8, 8), PRESETS["composite"], MixtureConfig(n_components=4), sizes)
    >>> draws = model.draw(torch.zeros(5, 1, 8, 8), n_samples=2)
    >>> draws.z.shape, draws.cross_log_prob.shape
    (torch.Size([2, 5, 4, 6]), torch.Size([2, 5, 4, 4]))
    >>> model.log_weights(torch.zeros(5, 1, 8, 8), draws).shape
    torch.Size([2, 5, 4])
    """

    def __init__(
        self,
        image_shape: tuple[int, int],
        config: ModelConfig,
        mixture: MixtureConfig,
        sizes: Sizes,
        *,
        prior_has_own_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.image_shape, self.sizes = image_shape, sizes
        self.config, self.mixture = config, mixture
        self.estimator = Estimator(mixture.estimator)
        n_latent, n_hidden = sizes.n_latent, sizes.hidden[-1]
        make_trunk = _trunk_maker(image_shape, config, sizes)
        encode = functools.partial(
            make_encoder, make_trunk, n_latent=n_latent, component_encoder=mixture.component_encoder
        )
        self.encoder = encode(n_components=mixture.n_components)
        self.lower_encoder = self.lower_prior = None
        if config.n_levels == 2:
            self.lower_encoder = ConditionalEncoder(
                make_trunk,
                mixture.n_components,
                n_latent,
                n_hidden=_widened(n_hidden, sizes.encoder_width),
                component_encoder=mixture.component_encoder,
            )
            self.lower_prior = ConditionalPrior(n_latent, n_hidden)
        self.flows = nn.ModuleList(
            InverseAutoregressiveFlow(
                n_latent, config.n_flow_steps, hidden_features=sizes.flow_hidden
            )
            for _ in range(config.n_levels if config.n_flow_steps else 0)
        )
        self.prior = make_prior(image_shape, config, sizes)
        own = prior_has_own_encoder and config.prior == "vamp"
        self.prior_encoder = encode(n_components=1) if own else None
        self.decoder = make_decoder(image_shape, config, sizes)

    def _flow(self, level: int, base: Tensor) -> tuple[Tensor, Tensor]:
        if not self.flows:
            return base, base.new_zeros(base.shape[:-1])
        z, log_det = self.flows[level](base)
        return z, log_det

    def push_forward(self, base: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Push base draws through the flow of each level.

        A level's flow does not depend on the other level, so the determinants' logarithms add up.

        Parameters
        ----------
        base
            Draws of the base components, the levels side by side, `(..., n_levels * D)`.

        Returns
        -------
        Each level's z, `(..., D)`; and ``log |det dz/dz0|`` of all levels, `(...)`.
        """
        parts = base.split(self.sizes.n_latent, -1)
        levels, log_dets = zip(*(self._flow(i, part) for i, part in enumerate(parts)), strict=True)
        return levels, torch.stack(log_dets).sum(0)

    def prior_distribution(self) -> Distribution:
        """p(z) of the upper level; build it once for many draws.

        Returns
        -------
        A distribution with event shape `(D,)` and no batch shape.
        """
        return self.prior(self.prior_encoder or self.encoder)

    def log_prior(
        self, upper: Tensor, lower: Tensor | None = None, *, prior: Distribution | None = None
    ) -> Tensor:
        """log p(z) of all levels.

        Parameters
        ----------
        upper
            Draws of the upper level, `(L, B, S, D)`.
        lower
            Draws of the lower level, if there is one, of the same shape.
        prior
            What :meth:`prior_distribution` returned; built here when ``None``.

        Returns
        -------
        `(L, B, S)`, in nats.
        """
        log_prior = (prior or self.prior_distribution()).log_prob(upper)
        if lower is None:
            return log_prior
        given_upper = cast(ConditionalPrior, self.lower_prior)(upper.flatten(0, 2)).log_prob(
            lower.flatten(0, 2)
        )
        return log_prior + given_upper.view_as(log_prior)

    def choose(self, generator: torch.Generator | None = None) -> Tensor | None:
        """Choose the components of a training step, as the estimator says.

        Parameters
        ----------
        generator
            Source of randomness, on the CPU; torch's own when ``None``.

        Returns
        -------
        The `S` components, `(S,)`, on the CPU; ``None`` for all.
        """
        return self.estimator.choose(self.mixture.n_components, self.mixture.n_drawn, generator)

    def draw(
        self,
        x: Tensor,
        n_samples: int = 1,
        components: Tensor | None = None,
        *,
        prior: Distribution | None = None,
        generator: torch.Generator | None = None,
    ) -> LatentDraws:
        """Draw latents from components and evaluate every component at every draw.

        Parameters
        ----------
        x
            Binary images, `(B, 1, height, width)`.
        n_samples
            Draws per component, `L`.
        components
            The `S` components to draw from, `(S,)`; all `A` when ``None``. With ``some_to_some``,
            only these are encoded, and the last axis of the densities has length `S`.
        prior
            What :meth:`prior_distribution` returned; built here when ``None``.
        generator
            Source of the noise, on the device of `x`; torch's own when ``None``.

        Returns
        -------
        Draws and their log-densities.
        """
        if self.estimator is Estimator.SOME_TO_SOME:
            return self._draw(self.encode(x, components), n_samples, None, prior, generator)
        return self._draw(self.encode(x), n_samples, components, prior, generator)

    def encode(self, x: Tensor, components: Tensor | None = None) -> EncodedImages:
        """Encode images `(B, 1, height, width)`, into these components or all.

        Parameters
        ----------
        x
            Binary images, `(B, 1, height, width)`.
        components
            The components to encode into, `(S,)`; all `A` when ``None``.

        Returns
        -------
        The posterior of the upper level, and what the lower one takes from the images.

        Examples
        --------
        >>> import torch
        >>> from mixscvi.images.networks.configs import MixtureConfig, ModelConfig, Sizes
        >>> model = ImageVAE((8, 8), ModelConfig(), MixtureConfig(4), Sizes(n_latent=3))
        >>> x = torch.zeros(5, 1, 8, 8)
        >>> encoded = model.encode(x)
        >>> encoded.posterior
        MixturePosterior(batch_shape=(5,), n_components=4, n_latent=3)
        >>> model.importance_draws(x, 10, encoded=encoded).log_weights.shape
        torch.Size([10, 5, 4])
        """
        if components is not None:
            components = components.to(x.device)
        lower = None if self.lower_encoder is None else self.lower_encoder.encode(x, components)
        return EncodedImages(self.encoder(x, components=components), lower, components)

    def _draw(
        self,
        encoded: EncodedImages,
        n_samples: int,
        drawn: Tensor | None,
        prior: Distribution | None,
        generator: torch.Generator | None,
    ) -> LatentDraws:
        """Draw from all components that were encoded, or from some of them."""
        posterior = encoded.posterior
        device = posterior.component_loc.device
        drawn = None if drawn is None else drawn.to(device)
        base = posterior.rsample_stratified(n_samples, drawn, generator)
        z, log_det = self._flow(0, base)
        cross = posterior.cross_log_prob(base) - log_det.unsqueeze(-1)
        lower = None
        if drawn is None:
            drawn = torch.arange(posterior.n_components, device=device)
        if self.lower_encoder is not None:
            lower, log_det, lower_cross = self.lower_encoder.draw(
                cast(Tensor, encoded.lower),
                z,
                drawn,
                encoded.components,
                flow=functools.partial(self._flow, 1),
                generator=generator,
            )
            cross = cross + lower_cross - log_det.unsqueeze(-1)
        log_prior = self.log_prior(z, lower, prior=prior)
        if lower is not None:
            z = torch.cat((z, lower), -1)
        own = cross.gather(-1, drawn.unsqueeze(-1).expand(*cross.shape[:-1], 1)).squeeze(-1)
        return LatentDraws(z, cross, own, log_prior)

    def log_weights(
        self, x: Tensor, draws: LatentDraws, *, beta: float = 1.0, apart: bool = False
    ) -> Tensor:
        r"""Log-weights of draws, :math:`\log p(x|z) + \beta (\log p(z) - \log q(z|x))`.

        Parameters
        ----------
        x
            Binary images, `(B, 1, height, width)`.
        draws
            What :meth:`draw` returned for them.
        beta
            Weight of the KL term.
        apart
            Whether q is the component of the draw instead of the mixture.

        Returns
        -------
        `(L, B, S)`, in nats.
        """
        log_q = draws.own_log_prob if apart else mixture_log_prob(draws.cross_log_prob)
        return self.decoder.log_prob(x, draws.z) + beta * (draws.log_prior - log_q)

    def importance_draws(
        self,
        x: Tensor,
        n_samples: int,
        *,
        encoded: EncodedImages | None = None,
        prior: Distribution | None = None,
        components: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ImportanceDraws:
        """Log-densities of draws from components, for bounds and diagnostics.

        The mixture in the denominator is that of all components, whichever the draws come from.

        Parameters
        ----------
        x
            Binary images, `(B, 1, height, width)`.
        n_samples
            Draws per component, `L`.
        encoded
            What :meth:`encode` returned for these images; they are encoded here when ``None``.
        prior
            What :meth:`prior_distribution` returned; built here when ``None``.
        components
            The `S` components to draw from, `(S,)`; all `A` when ``None``.
        generator
            Source of the noise, on the device of `x`; torch's own when ``None``.

        Returns
        -------
        log p(x, z), and each draw's log-density under its component and under the mixture, each
        `(L, B, S)`, in nats.
        """
        encoded = self.encode(x) if encoded is None else encoded
        draws = self._draw(encoded, n_samples, components, prior, generator)
        return ImportanceDraws(
            self.decoder.log_prob(x, draws.z) + draws.log_prior,
            draws.own_log_prob,
            mixture_log_prob(draws.cross_log_prob),
        )

    def component_parameters(self, encoded: EncodedImages) -> tuple[Tensor, Tensor]:
        """Means and scales of the base components of all levels.

        The lower level is conditioned on the upper one's mean.

        Parameters
        ----------
        encoded
            What :meth:`encode` returned.

        Returns
        -------
        Means and scales, each `(B, A, n_levels * D)`.
        """
        upper = encoded.posterior
        if self.lower_encoder is None:
            return upper.component_loc, upper.component_scale
        z, _ = self._flow(0, upper.component_loc)
        loc, scale = self.lower_encoder.own(cast(Tensor, encoded.lower), z)
        return (
            torch.cat((upper.component_loc, loc), -1),
            torch.cat((upper.component_scale, scale), -1),
        )

    def sample(self, n_images: int, seed: int = 0) -> Tensor:
        """Draw images from the model.

        Parameters
        ----------
        n_images
            How many.
        seed
            Of the draws; generators outside are left as they are.

        Returns
        -------
        Binary images, `(n_images, 1, height, width)`, on the model's device.
        """
        device = next(self.parameters()).device
        with torch.no_grad(), seeded(seed, device):
            # torch's distributions take no generator.
            z = self.prior_distribution().sample((n_images,))
            if self.lower_prior is not None:
                z = torch.cat((z, self.lower_prior(z).sample()), -1)
            return self.decoder.sample(z)


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's default generators of the CPU and one device; restore them afterwards.

    The generators of other devices are neither read nor written.
    """
    device = torch.device(device)
    accelerator = None if device.type == "cpu" else getattr(torch, device.type)
    if accelerator is not None:
        index = () if device.type == "mps" else (device,)  # its functions take no device
        state = accelerator.get_rng_state(*index)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if accelerator is not None:
                generator = torch.Generator(device).manual_seed(seed)
                accelerator.set_rng_state(generator.get_state(), *index)
            yield
    finally:
        if accelerator is not None:
            accelerator.set_rng_state(state, *index)


def count_parameters(module: nn.Module | None) -> int:
    """Number of parameters.

    Examples
    --------
    >>> count_parameters(torch.nn.Linear(3, 2))
    8
    """
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
