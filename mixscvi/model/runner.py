"""How a training is started, and what a model without data is made of."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from scvi import REGISTRY_KEYS, settings
from scvi.model.base import BaseMinifiedModeModelClass
from scvi.module import VAE
from scvi.train import TrainRunner
from torch import Tensor, nn

from mixscvi.checkpoint_file import (
    check_restored_paths,
    check_stopping,
    naming_what_is_not_restored,
)
from mixscvi.checkpoint_io import AtomicCheckpointIO
from mixscvi.model.accelerators import naming_trainer_settings
from mixscvi.model.annbatch import (
    OrderOfAnnbatch,
    check_annotation_of_annbatch,
    is_of_annbatch,
)
from mixscvi.model.checkpoints import Checkpoints
from mixscvi.model.distributed import Ranks, SplitAlike, as_first_rank
from mixscvi.model.given import check_genes_of_module, check_minibatch, registry_of
from mixscvi.model.loaders import training_minibatches
from mixscvi.model.memory import check_step, too_large_a_step
from mixscvi.model.watched import check_checkpoint, check_watched, naming_limits
from mixscvi.module import MixVAE
from mixscvi.optimizers import check_restored_optimizer
from mixscvi.system import naming_what_takes_memory
from mixscvi.warning import warn_user

__all__ = ["Runner", "WithoutData"]


class PseudoCellsStart(Callback):
    """Starts a VampPrior's pseudo-cells as cells that are trained on, none that is held out.

    Parameters
    ----------
    module
        The module.
    """

    def __init__(self, module: MixVAE) -> None:
        self.module = module

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start them when the cells are split, and no checkpoint is restored yet."""
        if isinstance(trainer.datamodule, SplitAlike):
            splitter = cast(LightningDataModule, trainer.datamodule)
            cells = training_minibatches(splitter, self.module.device)
            self.module.initialize_pseudo_cells(cells)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start them from the first step's cells: the user's data may be read once alone."""
        if batch_idx > 0 or not self.module.has_random_pseudo_cells:
            return
        self.module.initialize_pseudo_cells([batch])
        if trainer.world_size > 1:
            for values in self.module.prior.state_dict().values():
                torch.distributed.broadcast(values, src=0)


class GivenToTrain(Callback):
    """Looks at the minibatches of a data module of the user's own, before they are used.

    A single NaN among the cells makes all weights NaN. On an accelerator, which a look waits for,
    only the first minibatch of each epoch is looked at.

    Parameters
    ----------
    module
        What trains on them.
    registry
        Of the model.
    """

    def __init__(self, module: VAE, registry: Mapping[str, Any]) -> None:
        self.module, self.registry = module, registry

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise if genes differ; the data module is set up by now."""
        check_genes_of_module(trainer.datamodule, self.registry)

    def _look(self, trainer: Trainer, batch: Any, batch_idx: int, of: str) -> Any:
        """Raise if the module cannot use a minibatch; its cells if that was looked at."""
        both = isinstance(batch, list | tuple) and len(batch) and hasattr(self.module, "y_prior")
        cells = batch[0] if both else batch  # those with labels come once more
        x = cells.get(REGISTRY_KEYS.X_KEY) if isinstance(cells, Mapping) else None
        if batch_idx > 0 and isinstance(x, Tensor) and x.device.type != "cpu":
            return None
        which = f"minibatch {batch_idx} of epoch {trainer.current_epoch}"
        if trainer.current_epoch == batch_idx == 0:
            which = "the first minibatch"
        source = f"{which}{of} of datamodule"
        check_minibatch(cells, self.module, source=source, to_train=True)
        return cells

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Raise if the module cannot use one of held-out cells."""
        self._look(trainer, batch, batch_idx, " for validation")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Raise if the module cannot use one; warn if the first has values that are no counts."""
        cells = self._look(trainer, batch, batch_idx, "")
        if cells is None:
            return
        x = cells[REGISTRY_KEYS.X_KEY]
        if (
            trainer.current_epoch == batch_idx == 0
            and self.module.gene_likelihood != "normal"
            and bool((x % 1 != 0).any())
        ):
            warn_user(
                "the first minibatch of datamodule has values that are no whole numbers: the model "
                "needs raw counts"
            )


class Started(Callback):
    """Knows whether a training has begun: what it goes on from is restored by then."""

    has_started = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what was restored, and note it."""
        for optimizer in trainer.optimizers:
            check_restored_optimizer(optimizer)
        check_stopping(trainer.early_stopping_callbacks)
        self.has_started = True
        check_restored_paths(trainer.callbacks)


@contextmanager
def as_it_was_unless(is_restored: Callable[[], bool], module: nn.Module) -> Iterator[None]:
    """Leave a module as it was where a file cannot be given back to its training.

    Lightning restores the weights first, before it can be told whether the rest fits.
    """
    state = copy.deepcopy(module.state_dict())
    modes = [(part, part.training) for part in module.modules()]
    failed = True
    try:
        yield
        failed = False
    finally:
        if failed and not is_restored():
            module.load_state_dict(state)
            for part, mode in modes:
                part.training = mode


class Runner(TrainRunner):
    """scvi-tools' runner of trainings, which trains in training mode.

    scvi-tools leaves a model in evaluation mode after training, loading and the mapping of a query,
    and Lightning keeps the mode it finds: without this a second training would have no dropout and
    would normalize by the running statistics of the first. Normalizations that scArches froze keep
    to the statistics of the reference, as they do after the training: in a query of one batch, its
    own would take away all that the weights of that batch add, and these would not be trained.

    Raises
    ------
    ValueError
        If there are fewer than two cells to train on, or training is steered by a metric that is
        not logged, or by cells that are not held out.
    FileNotFoundError
        If the checkpoint to go on from is not there.
    MemoryError
        If a step is larger than the memory that there is.
    """

    def __init__(self, *args: Any, checkpoints: Checkpoints | None = None, **kwargs: Any) -> None:
        if isinstance(kwargs.get("data_splitter"), SplitAlike):
            # They are shared among the ranks already.
            kwargs.setdefault("use_distributed_sampler", False)
        if kwargs.get("callbacks"):  # scvi-tools adds its own, for this training alone
            kwargs["callbacks"] = [*kwargs["callbacks"]]
        with naming_trainer_settings(kwargs):
            super().__init__(*args, **kwargs)
        if not isinstance(self.data_splitter, SplitAlike):
            check_annotation_of_annbatch(self.data_splitter)
        ranks = self.trainer.num_devices * self.trainer.num_nodes
        n_train = getattr(self.data_splitter, "n_train", None)
        if n_train is not None and n_train < 2 * ranks:
            n_obs = f" of {self.model.adata.n_obs}" if self.model.adata is not None else ""
            least = "two cells" if ranks == 1 else f"two cells for each of {ranks} processes"
            raise ValueError(
                f"train() needs at least {least} to train on, got {n_train}{n_obs}: give "
                "train_size=1.0, or more cells"
            )
        if ranks > 1:
            self._check_distributed(ranks)
            if is_of_annbatch(self.data_splitter):
                warn_user(
                    f"scvi-tools does not share the cells of annbatch among processes: each of "
                    f"{ranks} goes through all of them in every epoch"
                )
        self._batch_size = self._cells_of_a_step()
        if self.device.type == "cpu":
            check_step(self.model, self._batch_size)
        if ranks > 1 or isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.callbacks.insert(0, Ranks(self.model.module))
        module = self.model.module
        if not isinstance(self.data_splitter, SplitAlike):
            self.trainer.callbacks.insert(0, GivenToTrain(module, registry_of(self.model)))
            self.trainer.callbacks.insert(0, OrderOfAnnbatch())  # after checkpoints, if there are
        if isinstance(module, MixVAE) and module.has_random_pseudo_cells:
            self.trainer.callbacks.insert(0, PseudoCellsStart(module))
        check_watched(self.trainer, self.training_plan, getattr(self.data_splitter, "n_val", None))
        self._naming: AbstractContextManager[None] = nullcontext()
        self._is_restored: Callable[[], bool] | None = None  # where training goes on from a file
        if checkpoints is not None:
            self._use(checkpoints)
        elif self.ckpt_path is not None:
            check_checkpoint(self.ckpt_path)
            started = Started()
            self.trainer.callbacks.append(started)
            self._is_restored = lambda: started.has_started
            self._naming = naming_what_is_not_restored(
                f"ckpt_path={str(self.ckpt_path)!r}",
                "this training",
                "Give the checkpoint of a training of the same model",
                is_restored=self._is_restored,
            )
            if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                # Lightning reads what comes from elsewhere with pickle, which can run any code.
                self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def _cells_of_a_step(self) -> int:
        """How many cells a step has at most; two if only a data module knows."""
        given = getattr(self.data_splitter, "data_loader_kwargs", {})
        batch_size = given.get("batch_size") or settings.batch_size
        return min(batch_size, getattr(self.data_splitter, "n_train", None) or 2)

    def _check_distributed(self, ranks: int) -> None:
        shared = getattr(self.data_splitter, "data_loader_kwargs", {}).get("distributed_sampler")
        if isinstance(self.data_splitter, SplitAlike) and not shared:
            raise ValueError(
                f"{ranks} processes share the cells with strategy='ddp' alone (or 'ddp_spawn', "
                "'ddp_notebook', an instance of DDPStrategy): give it"
            )

    def _use(self, checkpoints: Checkpoints) -> None:
        if self.ckpt_path is not None:
            raise ValueError(
                f"give either checkpoint_dir or ckpt_path={self.ckpt_path!r}, got both"
            )
        self._check_resumable()
        if self.trainer.is_global_zero:
            checkpoints.make_folder()
        self._naming = checkpoints.naming_the_file()
        self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        # The first, so that the others find the epoch and the random numbers that they had.
        self.trainer.callbacks.insert(0, checkpoints)
        if checkpoints.found is not None:
            checkpoints.tell(self.trainer.max_epochs)
            self._is_restored = lambda: checkpoints.is_restored
            self.ckpt_path = checkpoints.path

    def _check_resumable(self) -> None:
        """Raise if a training that goes on could not end as one that was not interrupted."""
        precision, n_epochs = (
            self.trainer.precision,
            self.trainer.reload_dataloaders_every_n_epochs,
        )
        averages = [c for c in self.trainer.callbacks if isinstance(c, StochasticWeightAveraging)]
        if str(precision).endswith("-true") and precision != "32-true":
            raise ValueError(
                f"checkpoint_dir restores weights in single precision: precision={precision!r} "
                "would go on from others"
            )
        if n_epochs:
            raise ValueError(
                f"reload_dataloaders_every_n_epochs={n_epochs} makes minibatches anew where the "
                "training goes on: leave it out, or checkpoint_dir"
            )
        if averages:
            raise ValueError(
                "the averages of StochasticWeightAveraging are in no checkpoint: leave it out, or "
                "checkpoint_dir"
            )

    def __call__(self) -> Any:
        """Train."""
        self.training_plan.train()
        precision = next(self.model.module.parameters()).dtype  # in which methods give it data
        for part in self.training_plan.modules():
            # Thus scvi-tools freezes the running statistics.
            if isinstance(part, nn.BatchNorm1d) and part.momentum == 0:
                part.eval()
        unchanged: AbstractContextManager[None] = nullcontext()
        if self._is_restored is not None:
            unchanged = as_it_was_unless(self._is_restored, self.model.module)
        too_large = naming_what_takes_memory(too_large_a_step(self.model, self._batch_size))
        limits = naming_limits(self.trainer)
        with (
            too_large,
            limits,
            self._naming,
            unchanged,
            as_first_rank(self.trainer),
            warnings.catch_warnings(),
        ):
            # So the plan leaves a minibatch of one cell out.
            warnings.filterwarnings("ignore", "`training_step` returned `None`", UserWarning)
            result = super().__call__()
        module = self.model.module
        if next(module.parameters()).dtype != precision:  # Lightning's precision="64", for one
            module.to(precision)
        return result


class WithoutData(BaseMinifiedModeModelClass):
    """Base of a model that may be made without data, for ``train(datamodule=...)``.

    scvi-tools grants that to its own classes, by their names.
    """

    def __init__(self, adata: Any = None, registry: Any = None) -> None:
        if adata is not None or registry is not None:
            super().__init__(adata, registry)
            return
        super().__init__(None, {"field_registries": {}})
        self._module_init_on_train = True
        del self.registry_, self.summary_stats
