"""From the encoder's posterior of a cell to its exact one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import Normal
from scvi.module.base import auto_move_data
from torch import Tensor, nn

from mixscvi.mixture import Adapted, MixturePosterior, adapt
from mixscvi.module.decoding import decode

__all__ = ["Adaptation"]

_ELEMENTS_AT_ONCE = 2**23  # decoded values


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Take no gradients by the parameters."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


class Adaptation:
    """Adaptive importance sampling for a module with :class:`ImportanceSampling`."""

    @auto_move_data
    def adapt(
        self, tensors: dict[str, Tensor], generator: torch.Generator | None = None, **options: Any
    ) -> Adapted:
        """Adapt the encoder's posteriors of a minibatch to the exact ones.

        The draws are those of the encoder's space: ahead of the flow, where there is one, and with
        the log library size as last dimension, where it is modeled.

        Parameters
        ----------
        tensors
            A minibatch, with counts.
        generator
            Source of randomness, on the module's device.
        **options
            Passed to :func:`mixscvi.mixture.adapt`.
        """
        with _frozen(self), torch.no_grad():
            inputs = self._get_inference_input(tensors, full_forward_pass=True)
            posterior, ql, library = self.encode(**inputs)
            if ql is not None:
                of_library = (
                    part.unsqueeze(1).expand(-1, self.n_components, -1)
                    for part in (ql.loc, ql.scale)
                )
                of_latents = (posterior.component_loc, posterior.component_scale)
                posterior = MixturePosterior(
                    *(torch.cat(pair, -1) for pair in zip(of_latents, of_library, strict=True))
                )
            x = tensors[REGISTRY_KEYS.X_KEY]
            rows = max(len(x), _ELEMENTS_AT_ONCE // x.shape[1])
            log_joint = self._log_joint(tensors, library)
            options = {"rows_per_call": rows, **options}
            return adapt(log_joint, posterior, generator=generator, **options)

    def _log_joint(
        self, tensors: dict[str, Tensor], observed_library: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """log p(x, z) and, where it is modeled, of the log library size, in the encoder's space."""
        prior = self.prior_distribution()
        n_latent, n_cells = self.n_latent, len(observed_library)
        fused = self.mixture.likelihood == "fused"

        def log_joint(draws: Tensor, cells: Tensor) -> Tensor:
            if len(cells) == n_cells:
                some, library = tensors, observed_library
            else:
                some = {name: values[cells] for name, values in tensors.items()}
                library = observed_library[cells]
            z, log_det = self.push_forward(draws[..., :n_latent])
            log_prob = prior.log_prob(z) + log_det
            if draws.shape[-1] > n_latent:
                library = draws[..., n_latent:]
                means, variances = self._compute_local_library_params(some[REGISTRY_KEYS.BATCH_KEY])
                of_library = Normal(means, variances.sqrt(), validate_args=False)
                log_prob = log_prob + of_library.log_prob(library).sum(-1)
            drawn = {"z": self.z_encoder.z_transformation(z), "library": library}
            px = decode(self, **self._get_generative_input(some, drawn), fused=fused)
            return log_prob + px.log_prob(some[REGISTRY_KEYS.X_KEY])

        return log_joint
