"""The training plan: scvi-tools' own, with less to do beside each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput
from scvi.train import TrainingPlan
from torch import Tensor, nn
from torch.optim import Optimizer

from mixscvi.optimizers import fused

__all__ = ["LeanTrainingPlan", "ScviTrainingPlan", "WithoutSingleCellSteps"]


def _is_compiled(part: nn.Module) -> bool:
    """Whether ``torch.compile`` wraps it, or its own ``compile()`` was called."""
    return "_orig_mod" in part._modules or part._compiled_call_impl is not None


class WithoutSingleCellSteps:
    """A training plan of scvi-tools that leaves minibatches of one cell out, as data modules have.

    Batch normalization has no variance to divide by there, and training would stop. Several ranks
    take their steps together, so there nothing is left out, and the cell is normalized by the
    statistics of the minibatches before it.
    """

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Loss of a minibatch, or ``None`` for none."""
        cells = batch if isinstance(batch, Mapping) else batch[0]
        normalizing = [
            part
            for part in (self.module.modules() if len(cells[REGISTRY_KEYS.X_KEY]) == 1 else ())
            if isinstance(part, nn.BatchNorm1d) and part.training
        ]
        if normalizing and self.trainer.world_size == 1:
            return None
        for part in normalizing:
            part.eval()
        try:
            return self._step(batch, batch_idx)
        finally:
            for part in normalizing:
                part.train()

    def _step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx)


class ScviTrainingPlan(WithoutSingleCellSteps, TrainingPlan):
    """scvi-tools' training plan, for minibatches of one cell as well."""


class LeanTrainingPlan(ScviTrainingPlan):
    """scvi-tools' training plan, to the same updates and the same history.

    The optimizer is fused. Metrics are sums that are kept as tensors and handed to Lightning once
    an epoch instead of once a step; the weight of the KL term is made once an epoch if it changes
    no more often.
    """

    # Of the epoch so far: loss, reconstruction loss and KL term, and of how many cells.
    _sums: Tensor | None = None
    _n_cells = 0
    _last_kl_weight: tuple[int, Tensor] | None = None

    def _optimizer_creator_fn(
        self, optimizer_cls: type[torch.optim.Adam] | type[torch.optim.AdamW]
    ) -> Callable[[Iterable[Tensor]], Optimizer]:
        def create(parameters: Iterable[Tensor]) -> Optimizer:
            options = {"lr": self.lr, "eps": self.eps, "weight_decay": self.weight_decay}
            parameters = list(parameters)
            # Fused optimizers unscale gradients themselves, where nobody could clip them.
            if getattr(self.trainer.precision_plugin, "scaler", None) is None:
                try:
                    return fused(optimizer_cls)(parameters, **options)
                except RuntimeError:  # the device has no such kernel
                    pass
            return optimizer_cls(parameters, **options)

        return create

    @property
    def takes_nonzeros(self) -> bool:
        """Whether counts may come as :class:`~mixscvi.mixture.mostly_zero.MostlyZero`."""
        return self.device.type == "cpu" and not any(map(_is_compiled, self.module.modules()))

    @property
    def kl_weight(self) -> Tensor:
        """Weight of the KL term."""
        if self.n_epochs_kl_warmup is None:
            return super().kl_weight
        epoch = self.current_epoch
        if self._last_kl_weight is None or self._last_kl_weight[0] != epoch:
            self._last_kl_weight = epoch, super().kl_weight
        return self._last_kl_weight[1]

    def _step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor | None:
        if self.on_step or self.module.extra_payload_autotune:
            return super()._step(batch, batch_idx)
        self.loss_kwargs["kl_weight"] = self.kl_weight
        if self._is_logged(batch_idx):
            self.log("kl_weight", self.loss_kwargs["kl_weight"], on_step=True, on_epoch=False)
        _, _, losses = self.forward(batch, loss_kwargs=self.loss_kwargs)
        self._add(losses)
        if self.trainer.is_last_batch:
            self._log_sums()
        return losses.loss

    def _is_logged(self, batch_idx: int) -> bool:
        """Whether Lightning logs this step; when in doubt, yes."""
        if self.trainer.accumulate_grad_batches != 1:
            return True
        return (self.global_step + 1) % max(1, self.trainer.log_every_n_steps) == 0

    @torch.no_grad()
    def _add(self, losses: LossOutput) -> None:
        # Nothing here waits for an accelerator.
        terms = torch.stack(
            (
                losses.loss * losses.n_obs_minibatch,
                losses.reconstruction_loss_sum,
                losses.kl_local_sum,
            )
        )
        self._sums = terms if self._sums is None else self._sums + terms
        self._n_cells += losses.n_obs_minibatch

    def _log_sums(self) -> None:
        """Hand the sums of the epoch to Lightning, as scvi-tools does those of each step."""
        (loss, reconstruction_loss, kl_local), n_cells = self._sums, self._n_cells
        self._sums, self._n_cells = None, 0
        self.log(
            "train_loss",
            loss / n_cells,
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=n_cells,
            sync_dist=self.use_sync_dist,
        )
        self.train_metrics["elbo_train"].update(
            reconstruction_loss=reconstruction_loss,
            kl_local=kl_local,
            kl_global=torch.zeros_like(kl_local),
            n_obs_minibatch=n_cells,
        )
        self.log_dict(
            self.train_metrics,
            on_step=False,
            on_epoch=True,
            batch_size=n_cells,
            sync_dist=self.use_sync_dist,
        )

    def on_train_epoch_end(self) -> None:
        """Log an epoch that ended before its last minibatch."""
        super().on_train_epoch_end()
        if self._sums is not None:
            self._log_sums()
