"""What a run is made of: a model, its training and its budget."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from mixscvi.images.networks.configs import (
    PRESETS,
    MixtureConfig,
    ModelConfig,
    Preset,
    Sizes,
    check_at_least,
    check_choices,
    check_types,
)
from mixscvi.images.networks.encoders import ComponentEncoder

__all__ = [
    "BUDGETS",
    "Budget",
    "BudgetName",
    "Proposal",
    "RunConfig",
    "TrainingConfig",
    "check_proposal",
    "check_seed",
]

BudgetName = Literal["paper", "small", "smoke"]
Proposal = Literal["encoder", "adapted"]
"""What importance samples are drawn from: the encoder's mixture, or this adapted to each image."""


def check_proposal(proposal: Proposal) -> Proposal:
    """The proposal, if it is one; raises a ValueError otherwise."""
    if proposal not in get_args(Proposal):
        raise ValueError(f"proposal must be one of {[*get_args(Proposal)]}, got {proposal!r}")
    return proposal


def check_seed(seed: int) -> int:
    """The seed, if generators can be seeded with it; raises a ValueError otherwise."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2**63 - 1, got {seed}")
    return seed


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Raises
    ------
    ValueError
        If a number is smaller than it can be.

    Examples
    --------
    >>> TrainingConfig(max_epochs=60).warmup_epochs
    100
    """

    batch_size: int = 100
    learning_rate: float = 5e-4
    warmup_epochs: int = 100
    """Epochs over which the KL's weight rises from 0 to 1."""
    max_epochs: int = 2000
    patience: int = 100
    """Epochs without a better validation bound, after the warm-up, until training stops."""
    n_train: int | None = None
    """Training images at most, of those that there are; all when ``None``."""
    n_validation: int | None = None
    n_test: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_at_least(self, 1, "batch_size", "max_epochs", "n_train", "n_validation", "n_test")
        check_at_least(self, 0, "learning_rate", "warmup_epochs", "patience")


@dataclass(frozen=True)
class Budget:
    """Sizes, training and test draws that belong together.

    Examples
    --------
    >>> from mixscvi.images import BUDGETS, Budget, TrainingConfig
    >>> Budget(training=TrainingConfig(max_epochs=50)).draws, BUDGETS["small"].draws
    (5000, 500)
    """

    sizes: Sizes = field(default_factory=Sizes)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    draws: int = 5000
    """Importance samples per test image, of all components together."""
    pixelcnn_training: TrainingConfig | None = None
    """Training of models with a PixelCNN, whose steps cost more; the same when ``None``."""


BUDGETS: dict[str, Budget] = {
    "paper": Budget(),
    "small": Budget(
        Sizes(
            n_latent=16,
            hidden=(100, 100),
            conv_layers=((8, 5, 2), (16, 3, 2), (6, 3, 1)),
            n_prior_components=25,
            flow_hidden=(64,),
            pixelcnn_layers=2,
            pixelcnn_channels=8,
        ),
        TrainingConfig(
            learning_rate=1e-3,
            warmup_epochs=8,
            max_epochs=20,
            patience=10,
            n_train=20_000,
            n_validation=500,
            n_test=1_000,
        ),
        draws=500,
        pixelcnn_training=TrainingConfig(
            learning_rate=2e-3,
            # With half the warm-up, the PixelCNN ignores the latents for several epochs.
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
        TrainingConfig(
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
    """Everything that determines a run, except the images themselves.

    Raises
    ------
    ValueError
        If a choice is not one of those listed, or two controls are asked for at once.

    Examples
    --------
    >>> config = RunConfig.from_preset("composite", budget="smoke", n_components=4)
    >>> config.model
    ModelConfig(encoder='conv', n_flow_steps=2, n_levels=2, prior='vamp', decoder='pixelcnn')
    >>> RunConfig.from_json(config.to_json()) == config
    True
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    sizes: Sizes = field(default_factory=Sizes)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    objective: Literal["miselbo", "iwae"] = "miselbo"
    """``"iwae"``: the control with one component of equally many parameters and `A` draws."""
    ensemble: bool = False
    """The control whose components are trained separately against a frozen decoder."""
    dataset: str = "mnist"
    seed: int = 0
    draws: int = 5000
    """Default number of test draws."""
    preset: str = "custom"
    budget: str = "custom"

    def __post_init__(self) -> None:
        check_types(self)
        check_choices(self)
        check_at_least(self, 1, "draws")
        check_seed(self.seed)
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
    def from_preset(
        cls,
        preset: Preset,
        *,
        budget: BudgetName = "paper",
        n_components: int = 1,
        n_sampled: int | None = None,
        estimator: Literal["all_to_all", "some_to_all", "some_to_some"] = "all_to_all",
        component_encoder: ComponentEncoder = "separate",
        training: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> RunConfig:
        """Make the configuration of a preset at a budget.

        Parameters
        ----------
        preset, budget
            Names in :data:`PRESETS` and :data:`BUDGETS`.
        n_components, n_sampled, estimator, component_encoder
            See :class:`MixtureConfig`.
        training
            Changes to the budget's training, by the names of :class:`TrainingConfig`.
        **kwargs
            Further fields of :class:`RunConfig`.

        Returns
        -------
        The configuration.

        Raises
        ------
        ValueError
            If there is no such preset or budget, or the fields contradict each other.

        Examples
        --------
        >>> RunConfig.from_preset("flow", budget="small", training={"max_epochs": 5}).draws
        500
        """
        for name, value, known in (("preset", preset, PRESETS), ("budget", budget, BUDGETS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {[*known]}, got {value!r}")
        chosen = BUDGETS[budget]
        usual = chosen.training
        if PRESETS[preset].decoder == "pixelcnn" and chosen.pixelcnn_training is not None:
            usual = chosen.pixelcnn_training
        return cls(
            model=PRESETS[preset],
            mixture=MixtureConfig(n_components, n_sampled, estimator, component_encoder),
            sizes=chosen.sizes,
            training=replace(usual, **(training or {})),
            preset=preset,
            budget=budget,
            **{"draws": chosen.draws} | kwargs,
        )

    def to_json(self) -> str:
        """The configuration as text.

        Returns
        -------
        JSON of all fields, nested as the configurations are.
        """
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunConfig:
        """The configuration from what :meth:`to_json` wrote, in this version or an earlier one.

        Parameters
        ----------
        text
            JSON of all fields.

        Returns
        -------
        The configuration.

        Raises
        ------
        ValueError
            If `text` is not JSON, or its fields contradict each other.
        KeyError, TypeError
            If fields are missing, or there are others.
        """
        fields = _current_names(json.loads(text))
        sizes = fields["sizes"]
        for name in ("hidden", "flow_hidden"):
            sizes[name] = tuple(sizes[name])
        sizes["conv_layers"] = tuple(tuple(layer) for layer in sizes["conv_layers"])
        nested = {
            "model": ModelConfig,
            "mixture": MixtureConfig,
            "sizes": Sizes,
            "training": TrainingConfig,
        }
        return cls(**fields | {name: kind(**fields[name]) for name, kind in nested.items()})


def _current_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration under the names that they have now."""
    renamed = {"parts": "model", "protocol": "training"}
    fields = {renamed.get(name, name): value for name, value in fields.items()}
    if fields["budget"] == "cpu":
        fields["budget"] = "small"
    if fields["mixture"]["component_encoder"] == "amortized":
        fields["mixture"]["component_encoder"] = "shifted"
    return fields
