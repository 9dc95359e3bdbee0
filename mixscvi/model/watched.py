"""What a training watches, and on which minibatches: named, where there is no such thing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from scvi.train import SaveCheckpoint, SemiSupervisedTrainingPlan
from scvi.train._callbacks import LoudEarlyStopping

__all__ = ["check_checkpoint", "check_watched", "naming_limits"]

_MONITORS = {LoudEarlyStopping: "early_stopping_monitor", SaveCheckpoint: "checkpointing_monitor"}
_LIMITS = ("val_check_interval", "limit_train_batches", "limit_val_batches")
# Logged of the classifier of a semi-supervised training.
_OF_LABELS = ("accuracy", "calibration_error", "classification_loss", "f1_score")
# Whose plans, networks and callbacks log what is known here.
_KNOWN_PACKAGES = ("lightning", "mixscvi", "scvi")
# Lightning looks for the file itself.
_FOUND_BY_LIGHTNING = ("best", "hpc", "last")


def check_watched(trainer: Trainer, plan: LightningModule, n_val: int | None) -> None:
    """Raise if a training is steered by a metric that it does not log.

    Parameters
    ----------
    trainer
        Of the training.
    plan
        scvi-tools' training plan.
    n_val
        Number of cells that are held out, if that is known.

    Raises
    ------
    ValueError
        Naming the argument, the metric, and those that there are.
    """
    watched = {
        _MONITORS.get(type(callback), f"monitor of {type(callback).__name__}"): callback.monitor
        for callback in trainer.callbacks
        if getattr(callback, "monitor", None) is not None
    }
    if getattr(plan, "reduce_lr_on_plateau", False):
        watched["lr_scheduler_metric"] = plan.lr_scheduler_metric
    known = _logged(plan) if _logs_these_alone(trainer, plan) else None
    for name, metric in watched.items():
        if "valid" in metric and (n_val == 0 or trainer.limit_val_batches == 0):
            raise ValueError(
                f"{name} watches {metric!r}, but no cells are held out for validation: choose a "
                "train_size below 1, or a validation_size above 0, and no limit_val_batches=0"
            )
        # Learning rates are logged by the names of their optimizers.
        if known is not None and metric not in known and not metric.startswith("lr-"):
            raise ValueError(
                f"{name} must be a metric that is logged, one of {', '.join(sorted(known))}, got "
                f"{metric!r}"
            )
    every = trainer.check_val_every_n_epoch
    if "valid" in watched.get("lr_scheduler_metric", "") and every is not None and every > 1:
        raise ValueError(
            f"lr_scheduler_metric watches {watched['lr_scheduler_metric']!r}, which must be there "
            f"after each epoch, got check_val_every_n_epoch={every}: choose 1, or leave it out"
        )
    if n_val == 0 and trainer.check_val_every_n_epoch == 1 and trainer.limit_val_batches != 0:
        raise ValueError(
            "check_val_every_n_epoch=1 asks for validation, but no cells are held out for it: "
            "choose a train_size below 1, or a validation_size above 0"
        )


def _logged(plan: Any) -> set[str]:
    """Metrics that plans of scvi-tools log once an epoch."""
    names = {"train_loss", "validation_loss", *plan.train_metrics, *plan.val_metrics}
    if isinstance(plan, SemiSupervisedTrainingPlan):
        names |= {f"{mode}_{of}" for mode in ("train", "validation") for of in _OF_LABELS}
    if plan.on_step:
        names |= {f"{name}_{when}" for name in names for when in ("epoch", "step")}
    return names


def _logs_these_alone(trainer: Trainer, plan: Any) -> bool:
    parts = (plan, plan.module, *trainer.callbacks)
    return all(type(part).__module__.partition(".")[0] in _KNOWN_PACKAGES for part in parts)


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Raise if there is no checkpoint to go on from.

    Parameters
    ----------
    path
        ``ckpt_path`` of ``train``.

    Raises
    ------
    FileNotFoundError
        If there is nothing.

    Examples
    --------
    >>> check_checkpoint("last")
    >>> check_checkpoint("no_such.ckpt")
    Traceback (most recent call last):
    ...
    FileNotFoundError: ckpt_path='no_such.ckpt' must be a checkpoint: there is no such file
    """
    if str(path) not in _FOUND_BY_LIGHTNING and not Path(path).is_file():
        raise FileNotFoundError(
            f"ckpt_path={str(path)!r} must be a checkpoint: there is no such file"
        )


@contextmanager
def naming_limits(trainer: Trainer) -> Iterator[None]:
    """Name the share of the minibatches that is less than one of them, or a number above all.

    Parameters
    ----------
    trainer
        Of the training.

    Raises
    ------
    ValueError
        Naming the argument and its value, with what Lightning says of it.
    """
    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        for name in _LIMITS:
            if f"`{name}`" in str(error):
                raise ValueError(
                    f"{name}={getattr(trainer, name)} must be a number of minibatches that there "
                    f"are, or a share of them that is at least one: {str(error).strip()}"
                ) from error
        raise
