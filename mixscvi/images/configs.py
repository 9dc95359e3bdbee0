"""What a run is made of: parts, sizes and protocol; the papers' models and three budgets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mixscvi.images.encoders import ComponentEncoder
from mixscvi.mixture import Estimator

__all__ = ["BUDGETS", "PRESETS", "Budget", "Mixture", "Parts", "Protocol", "RunConfig", "Sizes"]

Preset = Literal["vanilla", "flow", "vamp", "hierarchical", "pixelcnn", "composite"]
BudgetName = Literal["paper", "cpu", "smoke"]


def _check_choices(config: Any) -> None:
    """Refuse values that are none of those that the fields' types name."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name} must be one of {[*get_args(hint)]}, got {value!r}")


def _check_at_least(config: Any, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Parts:
    """The parts that a model is composed of."""

    encoder: Literal["dense", "conv"] = "dense"
    n_flow_steps: int = 0
    """Steps `T` of the inverse autoregressive flow; 0 for none."""
    n_levels: Literal[1, 2] = 1
    """Stochastic levels."""
    prior: Literal["normal", "mog", "vamp"] = "normal"
    """Prior of the (upper) level."""
    decoder: Literal["bernoulli", "pixelcnn"] = "bernoulli"

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_at_least(self, 0, "n_flow_steps")


PRESETS: dict[str, Parts] = {
    "vanilla": Parts(),
    "flow": Parts(n_flow_steps=2),
    "vamp": Parts(prior="vamp"),
    "hierarchical": Parts(n_levels=2, prior="vamp"),
    "pixelcnn": Parts(decoder="pixelcnn"),
    "composite": Parts("conv", n_flow_steps=2, n_levels=2, prior="vamp", decoder="pixelcnn"),
}


@dataclass(frozen=True)
class Mixture:
    """The components of the posterior, and how a step samples them."""

    n_components: int = 1
    """`A`."""
    n_sampled: int | None = None
    """`S`; when ``None`` all `A` with ``"all_to_all"``, otherwise 1."""
    estimator: Literal["all_to_all", "some_to_all", "some_to_some"] = "all_to_all"
    component_encoder: ComponentEncoder = "separate"

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_at_least(self, 1, "n_components")
        Estimator(self.estimator).check(self.n_components, self.n_drawn)

    @property
    def n_drawn(self) -> int:
        """`S`."""
        if self.n_sampled is not None:
            return self.n_sampled
        return self.n_components if self.estimator == "all_to_all" else 1


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks."""

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
    """Factor on the encoder's widths; other than 1 in the big IWAE alone."""


@dataclass(frozen=True)
class Protocol:
    """How a model is trained."""

    batch_size: int = 100
    learning_rate: float = 5e-4
    warmup_epochs: int = 100
    """Epochs over which the KL's weight rises from 0 to 1."""
    max_epochs: int = 2000
    patience: int = 100
    """Epochs without a better validation bound, after the warm-up, that end the training."""
    n_train: int | None = None
    """Images to train on; all when ``None``."""
    n_validation: int | None = None
    n_test: int | None = None

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "batch_size", "max_epochs", "n_train", "n_validation", "n_test")
        _check_at_least(self, 0, "learning_rate", "warmup_epochs", "patience")


@dataclass(frozen=True)
class Budget:
    """Sizes, protocol and test draws that belong together."""

    sizes: Sizes = field(default_factory=Sizes)
    protocol: Protocol = field(default_factory=Protocol)
    draws: int = 5000
    """Importance samples per test image, of all components together."""
    pixelcnn_protocol: Protocol | None = None
    """Protocol of models with a PixelCNN, whose steps cost more; the same when ``None``."""


BUDGETS: dict[str, Budget] = {
    "paper": Budget(),
    "cpu": Budget(
        Sizes(
            n_latent=16,
            hidden=(100, 100),
            conv_layers=((8, 5, 2), (16, 3, 2), (6, 3, 1)),
            n_prior_components=25,
            flow_hidden=(64,),
            pixelcnn_layers=2,
            pixelcnn_channels=8,
        ),
        Protocol(
            learning_rate=1e-3,
            warmup_epochs=8,
            max_epochs=20,
            patience=10,
            n_train=20_000,
            n_validation=500,
            n_test=1_000,
        ),
        draws=500,
        pixelcnn_protocol=Protocol(
            learning_rate=2e-3,
            # With half the warm-up the PixelCNN does without the latents for several epochs.
            warmup_epochs=10,
            max_epochs=18,
            patience=10,
            n_train=10_000,
            n_validation=500,
            n_test=500,
        ),
    ),
    "smoke": Budget(
        Sizes(
            n_latent=3,
            hidden=(12, 10),
            conv_layers=((4, 3, 2), (2, 3, 2)),
            n_prior_components=4,
            flow_hidden=(8,),
            pixelcnn_layers=2,
            pixelcnn_channels=4,
        ),
        Protocol(
            batch_size=50,
            warmup_epochs=1,
            max_epochs=2,
            n_train=100,
            n_validation=50,
            n_test=20,
        ),
        draws=40,
    ),
}


@dataclass(frozen=True)
class RunConfig:
    """All that determines a run, but for the images themselves.

    Examples
    --------
    >>> config = RunConfig.of("composite", budget="smoke", n_components=4)
    >>> config.parts
    Parts(encoder='conv', n_flow_steps=2, n_levels=2, prior='vamp', decoder='pixelcnn')
    >>> RunConfig.from_json(config.to_json()) == config
    True
    """

    parts: Parts = field(default_factory=Parts)
    mixture: Mixture = field(default_factory=Mixture)
    sizes: Sizes = field(default_factory=Sizes)
    protocol: Protocol = field(default_factory=Protocol)
    objective: Literal["miselbo", "iwae"] = "miselbo"
    """``"iwae"``: the control with one component of as many parameters and `A` draws."""
    ensemble: bool = False
    """The control whose components are trained apart against a frozen decoder."""
    dataset: str = "mnist"
    seed: int = 0
    draws: int = 5000
    """Default number of test draws."""
    preset: str = "custom"
    budget: str = "custom"

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.objective == "iwae" and self.ensemble:
            raise ValueError("objective='iwae' and ensemble=True are two different controls")
        if self.ensemble and self.mixture.component_encoder != "separate":
            raise ValueError(
                "ensemble=True needs component_encoder='separate': a shared trunk "
                "would train the components together"
            )
        if self.ensemble and self.mixture.estimator != "all_to_all":
            raise ValueError(
                f"ensemble=True trains all components, got estimator={self.mixture.estimator!r}"
            )

    @classmethod
    def of(
        cls,
        preset: Preset,
        *,
        budget: BudgetName = "paper",
        n_components: int = 1,
        n_sampled: int | None = None,
        estimator: Literal["all_to_all", "some_to_all", "some_to_some"] = "all_to_all",
        component_encoder: ComponentEncoder = "separate",
        protocol: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> RunConfig:
        """Make the run of a preset at a budget.

        Parameters
        ----------
        preset, budget
            Names in :data:`PRESETS` and :data:`BUDGETS`.
        n_components, n_sampled, estimator, component_encoder
            See :class:`Mixture`.
        protocol
            Changes to the budget's protocol, by the names of :class:`Protocol`.
        **kwargs
            Further fields of :class:`RunConfig`.
        """
        for name, value, known in (("preset", preset, PRESETS), ("budget", budget, BUDGETS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {[*known]}, got {value!r}")
        chosen = BUDGETS[budget]
        usual = chosen.protocol
        if PRESETS[preset].decoder == "pixelcnn" and chosen.pixelcnn_protocol is not None:
            usual = chosen.pixelcnn_protocol
        return cls(
            parts=PRESETS[preset],
            mixture=Mixture(n_components, n_sampled, estimator, component_encoder),
            sizes=chosen.sizes,
            protocol=replace(usual, **(protocol or {})),
            preset=preset,
            budget=budget,
            **{"draws": chosen.draws} | kwargs,
        )

    def to_json(self) -> str:
        """The configuration as text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """The configuration from what :meth:`to_json` wrote."""
        fields = json.loads(text)
        sizes = fields["sizes"]
        for name in ("hidden", "flow_hidden"):
            sizes[name] = tuple(sizes[name])
        sizes["conv_layers"] = tuple(tuple(layer) for layer in sizes["conv_layers"])
        nested = {"parts": Parts, "mixture": Mixture, "sizes": Sizes, "protocol": Protocol}
        return cls(**fields | {name: kind(**fields[name]) for name, kind in nested.items()})
