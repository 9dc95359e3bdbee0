"""What a model is made of: its networks, its components and its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from mixscvi.images.networks.encoders import ComponentEncoder
from mixscvi.mixture import Estimator

__all__ = ["PRESETS", "MixtureConfig", "ModelConfig", "Preset", "Sizes"]

Preset = Literal["vanilla", "flow", "vamp", "hierarchical", "pixelcnn", "composite"]


_KINDS = {bool: "true or false", float: "a number", int: "an integer", str: "a text"}


def check_types(config: Any) -> None:
    """Raise a TypeError if a field is not of its type, as a file may have it.

    Fields with Literal types are left to :func:`check_choices`.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is_a(value, hint):
            kind = _KINDS.get(hint, hint)
            raise TypeError(f"{name} must be {kind}, got {value!r:.60}")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; integers are numbers, and truth values are none."""
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        return True
    if get_origin(hint) is UnionType:
        return any(_is_a(value, kind) for kind in kinds)
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        each = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(value) == len(each) and all(map(_is_a, value, each))
    if hint in (int, float):
        if isinstance(value, (bool, np.bool_)) or value != value:
            return False
        return isinstance(value, Integral if hint is int else Real)
    return isinstance(value, NoneType if hint is None else hint)


def check_choices(config: Any) -> None:
    """Raise a ValueError if a field is none of the values that its Literal type lists."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name} must be one of {[*get_args(hint)]}, got {value!r}")


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Raise a ValueError if one of these fields is given and smaller."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class ModelConfig:
    """What a model is composed of.

    Raises
    ------
    ValueError
        If a choice is not one of those listed, or the number of flow steps is negative.

    Examples
    --------
    >>> ModelConfig(n_levels=2, prior="vamp") == PRESETS["hierarchical"]
    True
    """

    encoder: Literal["dense", "conv"] = "dense"
    n_flow_steps: int = 0
    """Steps `T` of the inverse autoregressive flow; 0 for none."""
    n_levels: Literal[1, 2] = 1
    """Stochastic levels."""
    prior: Literal["normal", "mog", "vamp"] = "normal"
    """Prior of the (upper) level."""
    decoder: Literal["bernoulli", "pixelcnn"] = "bernoulli"

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        check_at_least(self, 0, "n_flow_steps")


PRESETS: dict[Preset, ModelConfig] = {
    "vanilla": ModelConfig(),
    "flow": ModelConfig(n_flow_steps=2),
    "vamp": ModelConfig(prior="vamp"),
    "hierarchical": ModelConfig(n_levels=2, prior="vamp"),
    "pixelcnn": ModelConfig(decoder="pixelcnn"),
    "composite": ModelConfig("conv", n_flow_steps=2, n_levels=2, prior="vamp", decoder="pixelcnn"),
}


@dataclass(frozen=True)
class MixtureConfig:
    """The components of the posterior, and how a step samples them.

    Raises
    ------
    TypeError
        If a number of components is not an integer.
    ValueError
        If a choice is not one of those listed, or the estimator cannot draw from `S` of `A`
        components.

    Examples
    --------
    >>> MixtureConfig(4).n_drawn, MixtureConfig(4, estimator="some_to_all").n_drawn
    (4, 1)
    """

    n_components: int = 1
    """`A`."""
    n_sampled: int | None = None
    """`S`; when ``None``, all `A` with ``"all_to_all"``, otherwise 1."""
    estimator: Literal["all_to_all", "some_to_all", "some_to_some"] = "all_to_all"
    component_encoder: ComponentEncoder = "separate"

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        check_at_least(self, 1, "n_components")
        Estimator(self.estimator).n_drawn(self.n_components, self.n_sampled)

    @property
    def n_drawn(self) -> int:
        """`S`."""
        return Estimator(self.estimator).n_drawn(self.n_components, self.n_sampled)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks; by default those of the papers.

    Raises
    ------
    TypeError
        If a field is of another type.
    ValueError
        If there are no layers.

    Examples
    --------
    >>> from dataclasses import replace
    >>> replace(Sizes(), n_latent=16).hidden
    (300, 300)
    """

    n_latent: int = 40
    """Dimensions `D` of every level."""
    hidden: tuple[int, ...] = (300, 300)
    """Widths of gated dense networks, in encoder and decoder."""
    conv_layers: tuple[tuple[int, int, int], ...] = (
        (32, 7, 1),
        (32, 3, 2),
        (64, 5, 1),
        (64, 3, 2),
        (6, 3, 1),
    )
    """Channels, kernel size and stride of every gated convolution."""
    n_prior_components: int = 500
    """`K`: pseudo-inputs of the VampPrior, Gaussians of the mixture prior."""
    flow_hidden: tuple[int, ...] = (320,)
    pixelcnn_layers: int = 8
    """Masked layers, the first of them 7 x 7, the others 3 x 3."""
    pixelcnn_channels: int = 64
    encoder_width: float = 1.0
    """Factor on the encoder's widths; only the big IWAE has another than 1."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.hidden:
            raise ValueError("hidden must have at least one layer, got none")
