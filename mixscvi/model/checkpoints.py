"""Training that may be interrupted: checkpoints, and going on from them to the very same weights.

A checkpoint is written where an epoch starts. Everything of the epochs before is done there, and
the random numbers of the epoch are still to be drawn. Lightning restores weights, optimizer,
schedulers and callbacks; its loops it would restart within or at the end of an epoch, so what they
have counted is given back to them here, to loops that do not know of a restart.
"""

from __future__ import annotations

import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from scvi.model import SCVI

from mixscvi.checkpoint_file import (
    NOT_MADE,
    OfAnotherTrainingError,
    check_counted,
    check_restored_paths,
    check_stopping,
    naming_what_is_not_restored,
    read_checkpoint,
)
from mixscvi.checks import check_path, check_positive_int
from mixscvi.model.distributed import of_all_ranks
from mixscvi.model.identity import (
    SEEDED_BELOW,
    differences,
    hash_of,
    training_identity,
    versions,
)
from mixscvi.model.plain import from_plain, to_plain
from mixscvi.model.random_states import get_random_states, set_random_states
from mixscvi.module.signatures import signed_as
from mixscvi.optimizers import check_restored_optimizer
from mixscvi.system import check_folder, write_beside
from mixscvi.warning import warn_user

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Checkpoints", "CheckpointsMixin"]

_FORMAT = 1
_OWN = "mixscvi"
_FILE = "training.ckpt"
_EVERY = 10
_NAMED = 5  # differences, in an error
# Everything that is restored.
_ENTRIES = {
    "identity", "versions", "epochs", "stopped", "random", "split", "metrics", "history",
    "stopping", "loops",
}  # fmt: skip
# What Lightning keeps of them.
_OF_OPTIMIZERS = ("optimizer_states", "lr_schedulers")
# Of a data splitter: which cells are which, and what shuffles them where there are several ranks.
_SPLIT = ("train_idx", "val_idx", "test_idx", "shuffle_seed")
# Of scvi-tools' early stopping, beside what Lightning keeps.
_STOPPING = ("_current_step", "early_stopping_reason")


class Checkpoints(Callback):
    """Writes the state of a training every so many epochs, and at its end, and restores it.

    Parameters
    ----------
    path
        The file.
    every
        Epochs from one checkpoint to the next.
    identity
        What the training is of: see :func:`~mixscvi.model.identity.training_identity`.

    Raises
    ------
    ValueError
        If the file is not that of a checkpoint, or is one of another training.
    """

    def __init__(self, path: Path, every: int, identity: dict[str, str]) -> None:
        self.path, self.every, self.identity = path, every, identity
        self._writing: dict[str, Any] | None = None
        self._to_restore: dict[str, Any] | None = None
        self.found = _read(path) if path.exists() else None
        self.is_restored = self.found is None
        if self.found is not None:
            self._check(self.found)

    def _check(self, found: dict[str, Any]) -> None:
        differing = differences(found["identity"], self.identity)
        if differing:
            more = f", and {len(differing) - _NAMED} more" * (len(differing) > _NAMED)
            raise ValueError(
                f"{self.path} is of another training: {'; '.join(differing[:_NAMED])}{more}. "
                "Choose another checkpoint_dir, or delete the file to start anew"
            )
        other = {k: v for k, v in found["versions"].items() if versions().get(k) != v}
        if other:
            warn_user(
                f"{self.path} was written with other versions of {', '.join(other)}: the weights "
                "need not be those of a training that was not interrupted"
            )

    def tell(self, max_epochs: int) -> None:
        """Say where training goes on, if it has begun.

        Raises
        ------
        ValueError
            If it has gone on for more than `max_epochs` already.
        """
        if self.found is None:
            return
        epochs = self.found["epochs"]
        if 0 <= max_epochs < epochs:
            raise ValueError(
                f"max_epochs must be at least {epochs}, as {self.path} holds the training after "
                f"{epochs} epochs, got {max_epochs}"
            )
        if self.found["stopped"]:
            _tell(f"{self.path}: this training stopped after {epochs} epochs; it is restored.")
        elif epochs == max_epochs:
            _tell(f"{self.path}: this training is finished after {epochs} epochs; it is restored.")
        else:
            _tell(f"{self.path}: training goes on after {epochs} of {max_epochs} epochs.")

    def make_folder(self) -> None:
        """Make the folder, before hours of training rather than after."""
        folder = self.path.parent
        check_folder(folder, "checkpoint_dir")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_beside(folder / ".writable", "")
        except OSError as error:
            raise OSError(
                f"checkpoint_dir {str(folder)!r} cannot be written to: {error}"
            ) from error
        (folder / ".writable").unlink(missing_ok=True)

    def naming_the_file(self) -> AbstractContextManager[None]:
        """Name the file where its state cannot be given back to a training."""
        if self.found is None:
            return nullcontext()
        return naming_what_is_not_restored(
            self.path,
            "training",
            "Delete it to start anew",
            is_restored=lambda: self.is_restored,
        )

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Give the cells back to training, validation and test; the rest waits for the start."""
        self._to_restore = state = _own_part(checkpoint, self.path)
        self._n_restored = {name: len(checkpoint[name]) for name in _OF_OPTIMIZERS}
        for name, value in state["split"].items():
            setattr(trainer.datamodule, name, value)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the loops, the logger and early stopping back what they had."""
        state = self._to_restore
        if state is None:
            return
        # Lightning restores as many as there are in the file.
        counts = (len(trainer.optimizers), len(trainer.lr_scheduler_configs))
        for name, n_expected in zip(_OF_OPTIMIZERS, counts, strict=True):
            if self._n_restored[name] != n_expected:
                raise ValueError(f"it has {self._n_restored[name]} {name}, expected {n_expected}")
        # Options are compared before; how many cells a data module gives is known now.
        minibatches = state.get("minibatches", trainer.num_training_batches)
        if minibatches != trainer.num_training_batches:
            raise OfAnotherTrainingError(
                f"an epoch has {minibatches} minibatches there and {trainer.num_training_batches} "
                "here"
            )
        for optimizer in trainer.optimizers:
            check_restored_optimizer(optimizer)
        loop = trainer.fit_loop
        check_counted(state["loops"]["fit_loop"], loop.state_dict(), "fit_loop")
        loop.load_state_dict(state["loops"]["fit_loop"])
        loop.restarting = loop.epoch_loop.restarting = False
        loop.on_iteration_done()
        for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
            progress.ready = progress.started  # the epoch that was about to start
        trainer.should_stop = state["stopped"]
        trainer.callback_metrics.update(state["metrics"])
        if _history(trainer) is not None:
            trainer.logger.experiment.data = state["history"]  # type: ignore[union-attr]
        for callback, values in zip(
            trainer.early_stopping_callbacks, state["stopping"], strict=True
        ):
            vars(callback).update(values)
        check_stopping(trainer.early_stopping_callbacks)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint, or set the random numbers of the epoch that one was written for."""
        if self._restored_random_states(trainer, pl_module):
            return
        if trainer.current_epoch > 0 and trainer.current_epoch % self.every == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last checkpoint, unless that is what was restored."""
        if not self._restored_random_states(trainer, pl_module):
            self._write(trainer, pl_module)

    def _restored_random_states(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Set the random numbers that follow, once; whether there were any to set."""
        state, self._to_restore = self._to_restore, None
        if state is not None:
            set_random_states(state["random"][trainer.global_rank], pl_module.device)
            self.is_restored = True
            check_restored_paths(trainer.callbacks)
        return state is not None

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cells = trainer.datamodule
        self._writing = {
            "identity": self.identity,
            "versions": versions(),
            "epochs": trainer.current_epoch,
            "stopped": bool(trainer.should_stop),
            "random": of_all_ranks(get_random_states(pl_module.device), trainer.world_size),
            "split": {k: getattr(cells, k) for k in _SPLIT if hasattr(cells, k)},
            "minibatches": trainer.num_training_batches,
            "metrics": dict(trainer.callback_metrics),
            "history": _history(trainer) or {},
            "stopping": [
                {k: v for k, v in vars(callback).items() if k in _STOPPING}
                for callback in trainer.early_stopping_callbacks
            ],
        }
        try:
            trainer.save_checkpoint(self.path, weights_only=False)
        finally:
            self._writing = None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning leaves out; checkpoints that others write are left alone."""
        if self._writing is not None:
            values, notes = to_plain(self._writing | {"loops": checkpoint.pop("loops")})
            checkpoint[_OWN] = {"format": _FORMAT, "values": values, "notes": notes}


def _own_part(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    """What :class:`Checkpoints` added to a checkpoint."""
    try:
        own = checkpoint[_OWN]
        later = own["format"] > _FORMAT
        if not later:
            for _ in from_plain(own["values"], own["notes"]):
                raise ValueError("it leaves values out")
            missing = sorted(_ENTRIES - own["values"].keys())
            if missing:
                raise KeyError(f"it lacks {', '.join(missing)}")
            for name, kind in (
                ("identity", dict),
                ("versions", dict),
                ("epochs", int),
                ("stopped", bool),
            ):
                if not isinstance(own["values"][name], kind):
                    raise TypeError(f"{name} is {own['values'][name]!r:.40}")
    except NOT_MADE as error:
        raise ValueError(
            f"{path} is not a checkpoint of a training, or was tampered with "
            f"({type(error).__name__}: {error}): delete it to start anew"
        ) from error
    if later:
        raise ValueError(f"{path} was written by a later version of mixscvi: update mixscvi")
    return own["values"]


def _read(path: Path) -> dict[str, Any]:
    values = _own_part(read_checkpoint(path), path)
    return {name: values[name] for name in ("identity", "versions", "epochs", "stopped")}


def _history(trainer: Trainer) -> dict[str, Any] | None:
    """Tables of scvi-tools' own logger, if it is used, and in this process."""
    history = getattr(trainer.logger, "history", None)
    return history if trainer.is_global_zero and isinstance(history, dict) else None


@rank_zero_only
def _tell(text: str) -> None:
    print(text)


class CheckpointsMixin:
    """Lets the training of :class:`mixscvi.MixSCVI` be interrupted.

    The model provides ``module`` and the ``train`` of scvi-tools.
    """

    # Where an interrupted training of this object goes on, and a hash of the weights it started
    # from, which are gone.
    _interrupted: tuple[Path, str | None] | None = None

    @signed_as(SCVI.train, checkpoint_dir=None, checkpoint_every=None)
    def train(
        self,
        *args: Any,
        checkpoint_dir: str | os.PathLike | None = None,
        checkpoint_every: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train the model, from the checkpoint in a folder if there is one."""
        train = super().train
        if checkpoint_dir is None:
            if checkpoint_every is not None:
                raise ValueError(
                    f"checkpoint_every={checkpoint_every} needs checkpoint_dir, the folder to "
                    "write checkpoints into"
                )
            return train(*args, **kwargs)
        check_path("checkpoint_dir", checkpoint_dir)
        every = _EVERY if checkpoint_every is None else checkpoint_every
        every = check_positive_int("checkpoint_every", every)
        path = Path(checkpoint_dir) / _FILE
        if path.parent.exists() and not path.parent.is_dir():
            raise ValueError(f"checkpoint_dir {str(path.parent)!r} is a file: choose a folder")
        given = inspect.signature(train).bind(*args, **kwargs)
        given.apply_defaults()
        if (
            path.exists()
            and self._interrupted is not None
            and self._interrupted[0] == path.absolute()
        ):
            start = self._interrupted[1]
        elif torch.initial_seed() < SEEDED_BELOW and self.module is not None:
            start = hash_of(*self.module.state_dict().values())
        else:
            start = None
        identity = training_identity(self, given.arguments, start)
        checkpoints = Checkpoints(path, every, identity)
        self._interrupted = (path.absolute(), start)
        result = train(*args, **kwargs, checkpoints=checkpoints)
        self._interrupted = None
        return result
