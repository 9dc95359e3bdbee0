"""From the encoder's posterior of a cell to its exact one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from scvi import REGISTRY_KEYS
from scvi.distributions import Normal
from torch import Tensor, nn
from torch.distributions import Distribution

from mixscvi.mixture import Adapted, MixturePosterior, adapt
from mixscvi.module.decoding import decode
from mixscvi.module.devices import auto_move_data

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
    """Adaptive importance sampling for a module with :class:`ImportanceSampling`.

    Draws are those of the encoder's space: ahead of the flow, where there is one, and with the log
    library size as last dimension, where it is modeled. `D` counts that dimension.
    """

    @auto_move_data
    def adapt(
        self,
        tensors: dict[str, Tensor],
        generator: torch.Generator | None = None,
        draws_per_pass: int | None = None,
        **options: Any,
    ) -> Adapted:
        """Adapt the encoder's posteriors of a minibatch to the exact ones.

        The cells are encoded once, the prior is built once, and no parameter takes a gradient.

        Parameters
        ----------
        tensors
            A minibatch, with counts.
        generator
            Source of randomness, on the module's device.
        draws_per_pass
            Draws per cell that are decoded at once; by default, as many as make about eight
            million decoded values. As cells leave, those that remain get more.
        **options
            Passed to :func:`mixscvi.mixture.adapt`.

        Returns
        -------
        The adapted posteriors of the `B` cells, over z ahead of the flow and, where it is modeled,
        the log library size.

        Raises
        ------
        RuntimeError
            In torch's inference mode, which forbids gradients.
        """
        with _frozen(cast(nn.Module, self)), torch.no_grad():
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
            n_cells, n_genes = tensors[REGISTRY_KEYS.X_KEY].shape
            rows = _ELEMENTS_AT_ONCE // n_genes
            if draws_per_pass is not None:
                rows = draws_per_pass * n_cells
            return adapt(
                self._log_joint(tensors, library),
                posterior,
                generator=generator,
                rows_per_call=max(rows, 1),
                **options,
            )

    def _log_joint(
        self, tensors: dict[str, Tensor], observed_library: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """log p(x, z) and, where it is modeled, of the log library size, in the encoder's space."""
        prior = self.prior_distribution()
        n_latent, n_cells = self.n_latent, len(observed_library)
        fused = self.mixture.likelihood == "fused"
        x = tensors[REGISTRY_KEYS.X_KEY]
        covariates = self._get_generative_input(tensors, {"z": None, "library": None})
        prior_of_library = None
        if not self.use_observed_lib_size:
            means, variances = self._compute_local_library_params(tensors[REGISTRY_KEYS.BATCH_KEY])
            prior_of_library = (means, variances.sqrt())

        def log_joint(draws: Tensor, cells: Tensor) -> Tensor:
            def of_cells(values: Tensor) -> Tensor:
                # A loader may leave labels empty.
                left_out = len(values) != n_cells
                return values if left_out or len(cells) == n_cells else values[cells]

            z, log_det = self.push_forward(draws[..., :n_latent])
            log_prob = prior.log_prob(z) + log_det
            if prior_of_library is None:
                library = of_cells(observed_library)
            else:
                library = draws[..., n_latent:]
                p_library = Normal(*map(of_cells, prior_of_library), validate_args=False)
                log_prob = log_prob + p_library.log_prob(library).squeeze(-1)
            given: dict[str, Any] = {
                name: None if values is None else of_cells(values)  # a loader may leave them out
                for name, values in covariates.items()
            }
            given |= {"z": self.z_encoder.z_transformation(z), "library": library}
            return log_prob + decode(self, **given, fused=fused).log_prob(of_cells(x))

        return log_joint

    @torch.no_grad()
    def adapted_latents(self, draws: Tensor) -> Tensor:
        """z of draws of an adapted proposal, and the log library size as it is.

        Parameters
        ----------
        draws
            Draws ahead of the flow, `(..., D)`, or `(..., D + 1)` with the log library size.

        Returns
        -------
        The same shape, with z behind the flow.
        """
        z, _ = self.push_forward(draws[..., : self.n_latent])
        return torch.cat((z, draws[..., self.n_latent :]), -1)

    @torch.inference_mode()
    @auto_move_data
    def likelihood_of_adapted(
        self, tensors: dict[str, Tensor], draws: Tensor, transform_batch: int | None = None
    ) -> Distribution:
        """p(x | z) of draws of an adapted proposal, as a distribution of scvi-tools.

        Parameters
        ----------
        tensors
            The minibatch that the proposal was adapted to, or more of the same cells.
        draws
            `(B, D)` or `(n, B, D)`, in the encoder's space.
        transform_batch
            Code of the batch to decode all cells as, instead of their own.

        Returns
        -------
        Distribution over `(B, G)` or `(n, B, G)`.
        """
        latents = self.adapted_latents(draws)
        z, library = latents.split((self.n_latent, latents.shape[-1] - self.n_latent), -1)
        if self.use_observed_lib_size:
            library = tensors[REGISTRY_KEYS.X_KEY].sum(1, keepdim=True).log()
        drawn = {"z": self.z_encoder.z_transformation(z), "library": library}
        given = self._get_generative_input(tensors, drawn)
        return decode(self, **given, transform_batch=transform_batch).distribution()
