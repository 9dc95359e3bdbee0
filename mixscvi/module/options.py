"""What the posterior, the prior and the objective of a model are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mixscvi.checks import check_choice, check_positive_int
from mixscvi.mixture import Estimator, Prior

__all__ = ["MixtureOptions"]


@dataclass(frozen=True)
class MixtureOptions:
    """Posterior, prior and objective, checked.

    Raises
    ------
    TypeError, ValueError
        If an option is invalid, or options contradict each other.

    Examples
    --------
    >>> MixtureOptions(n_components=8, estimator="some_to_all").n_sampled_components
    1
    """

    n_components: int = 4
    """Number of components, `A`."""
    n_sampled_components: int | None = None
    """Number of components that a training step draws from, `S`; when ``None`` all `A` with
    ``"all_to_all"``, otherwise 1."""
    estimator: Literal["all_to_all", "some_to_all", "some_to_some"] = "all_to_all"
    """Which components are drawn from and which form the denominator; see
    :class:`~mixscvi.mixture.Estimator`."""
    component_encoder: Literal["separate", "amortized"] = "separate"
    """``"separate"``: `A` encoders in one stack. ``"amortized"``: one trunk and a learned code per
    component."""
    prior: Literal["normal", "mog", "vamp"] | Prior = "normal"
    """``"normal"``, ``"mog"`` (mixture of Gaussians), ``"vamp"`` (VampPrior), or a
    :class:`~mixscvi.mixture.Prior` over `D` dimensions, which is copied."""
    n_prior_components: int = 50
    """Components of the prior, or pseudo-cells of the VampPrior, `K`."""
    n_flow_steps: int = 0
    """Steps of the inverse autoregressive flow that all components share; 0 for none."""
    n_samples: int = 1
    """Importance samples per component in the training objective, `L`."""
    objective: Literal["miselbo", "siwae"] = "miselbo"
    """``"miselbo"``: the average over components, importance-weighted where `n_samples` > 1
    (IW-MISELBO). ``"siwae"``: all draws inside the logarithm, for one component alone (IWAE)."""
    likelihood: Literal["fused", "reference"] = "fused"
    """``"fused"``: log-likelihood and gradient in one go. ``"reference"``: scvi-tools' own
    distributions, and with the options of scVI its own code to the bit."""

    def __post_init__(self) -> None:
        for name in ("n_components", "n_samples", "n_prior_components"):
            self._set(name, check_positive_int(name, getattr(self, name)))
        self._set("n_flow_steps", check_positive_int("n_flow_steps", self.n_flow_steps, least=0))
        check_choice("estimator", self.estimator, [str(name) for name in Estimator])
        check_choice("component_encoder", self.component_encoder, ("separate", "amortized"))
        check_choice("objective", self.objective, ("miselbo", "siwae"))
        if self.objective == "siwae" and self.n_components > 1:
            raise ValueError(
                f"objective='siwae' is for one component, got n_components={self.n_components}: a "
                "component that is of no use costs it next to nothing, so most die. Choose "
                "objective='miselbo', with n_samples > 1 for a tighter bound"
            )
        check_choice("likelihood", self.likelihood, ("fused", "reference"))
        if not isinstance(self.prior, Prior) and self.prior not in ("normal", "mog", "vamp"):
            raise ValueError(
                "prior must be one of 'normal', 'mog', 'vamp', or an instance of "
                f"mixscvi.mixture.Prior, got {self.prior!r}"
            )
        estimator, n_sampled = Estimator(self.estimator), self.n_sampled_components
        if n_sampled is not None:
            n_sampled = check_positive_int("n_sampled_components", n_sampled)
            if n_sampled > self.n_components:
                raise ValueError(
                    f"n_sampled_components must be at most n_components={self.n_components}, got "
                    f"{n_sampled}"
                )
            if estimator is Estimator.ALL_TO_ALL and n_sampled != self.n_components:
                raise ValueError(
                    f"estimator='all_to_all' draws from all n_components={self.n_components}, got "
                    f"n_sampled_components={n_sampled}: choose 'some_to_all' or 'some_to_some'"
                )
        self._set("estimator", estimator)
        self._set("n_sampled_components", estimator.n_drawn(self.n_components, n_sampled))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def is_scvi(self) -> bool:
        """Whether they describe scVI: one Gaussian, a standard normal prior, one draw."""
        return (
            self.n_components == 1
            and self.prior == "normal"
            and self.n_flow_steps == 0
            and self.n_samples == 1
        )
