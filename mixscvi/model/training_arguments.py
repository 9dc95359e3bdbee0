"""The arguments of ``train``: named, where they cannot be what they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch
import numpy as np
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from scvi.dataloaders import AnnDataLoader
from scvi.train import Trainer, TrainRunner
from torch.utils.data import DataLoader

from mixscvi.checks import (
    check_boolean,
    check_choice,
    check_function,
    check_indices,
    check_mapping,
    check_number,
    check_path,
    check_positive_int,
    check_text,
)
from mixscvi.model.inputs import check_keywords
from mixscvi.model.loader_arguments import CHOSEN, check_loader_values

__all__ = ["check_data_module", "check_training"]

_Check = Callable[[str, Any], object]
_PARTS = ("training", "validation", "test")
_OF_CHECKPOINTS = ("checkpoint_dir", "checkpoint_every")
# By scvi-tools' runners, ahead of the trainer.
_TAKEN_OUT = ("ckpt_path",)


def _check_duration(name: str, value: Any) -> None:
    if not isinstance(value, (str, timedelta, Mapping)):
        raise TypeError(f"{name} must be a text like '00:12:00:00' or a timedelta, got {value!r}")


def _check_factor(name: str, value: Any) -> None:
    check_number(name, value, least=0)
    if value >= 1:
        raise ValueError(f"{name} must be below 1, got {value!r}")


def _check_share_or_count(name: str, value: Any) -> None:
    if isinstance(value, (float, np.floating)):
        check_number(name, value, least=0, most=1)
    else:
        check_positive_int(name, value, least=0)


def _check_no_overfitting(name: str, value: Any) -> None:
    if value:  # Lightning takes minibatches of scvi-tools apart for it, into steps of one cell
        raise ValueError(f"{name} must be 0, got {value!r}: choose limit_train_batches")


def _check_callbacks(name: str, value: Any) -> None:
    if not isinstance(value, list):  # scvi-tools adds its own to it
        raise TypeError(f"{name} must be a list of Lightning's callbacks, got {value!r:.60}")
    for callback in value:
        if not isinstance(callback, Callback):
            raise TypeError(f"{name} must be Lightning's callbacks, got {callback!r:.60}")


def _check_logger(name: str, value: Any) -> None:
    loggers = value if isinstance(value, (list, tuple)) else [value]
    if not isinstance(value, bool) and not all(hasattr(one, "log_metrics") for one in loggers):
        raise TypeError(f"{name} must be a logger of Lightning, True or False, got {value!r:.60}")


def _check_deterministic(name: str, value: Any) -> None:
    if value != "warn":
        check_boolean(name, value)


def _check_flag_or_count(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        check_positive_int(name, value, least=0)


_from_minus_1: _Check = partial(check_positive_int, least=-1)
_natural: _Check = partial(check_positive_int, least=0)
_positive: _Check = partial(check_positive_int, least=1)
_at_least_0: _Check = partial(check_number, least=0)

# Of the trainer and of train() itself. Those of the second kind may be None.
_OF_TRAINER: dict[str, _Check] = {
    **dict.fromkeys(
        (
            "early_stopping", "enable_autolog_hparams", "inference_mode", "learning_rate_monitor",
            "load_sparse_tensor", "shuffle_set_split", "simple_progress_bar", "sync_batchnorm",
            "use_distributed_sampler", "barebones", "detect_anomaly",
        ),
        check_boolean,
    ),
    **dict.fromkeys(("accumulate_grad_batches", "num_nodes"), _positive),
    **dict.fromkeys(
        (
            "early_stopping_patience", "early_stopping_warmup_epochs",
            "progress_bar_refresh_rate", "reload_dataloaders_every_n_epochs",
        ),
        _natural,
    ),
    "max_steps": _from_minus_1,
    "overfit_batches": _check_no_overfitting,
    "early_stopping_min_delta": check_number,
    "early_stopping_mode": partial(check_choice, choices=("min", "max")),
    **dict.fromkeys(("checkpointing_monitor", "early_stopping_monitor"), check_text),
    "callbacks": _check_callbacks,
}  # fmt: skip
_OPTIONAL_OF_TRAINER: dict[str, _Check] = {
    **dict.fromkeys(
        (
            "adversarial_classifier", "benchmark", "enable_checkpointing", "enable_model_summary",
            "enable_progress_bar",
        ),
        check_boolean,
    ),
    **dict.fromkeys(
        ("check_val_every_n_epoch", "log_every_n_steps", "min_epochs", "min_steps"), _natural
    ),
    "num_sanity_val_steps": _from_minus_1,
    "n_samples_per_label": _positive,
    **dict.fromkeys(
        (
            "limit_train_batches", "limit_val_batches", "limit_test_batches",
            "limit_predict_batches", "val_check_interval",
        ),
        _check_share_or_count,
    ),
    "fast_dev_run": _check_flag_or_count,
    "gradient_clip_val": _at_least_0,
    "gradient_clip_algorithm": partial(check_choice, choices=("value", "norm")),
    "max_time": _check_duration,
    "deterministic": _check_deterministic,
    "logger": _check_logger,
    "model_registry": check_text,
    **dict.fromkeys(("default_root_dir", "ckpt_path", "log_save_dir"), check_path),
}  # fmt: skip
_OF_PLAN: dict[str, _Check] = {
    **dict.fromkeys(
        (
            "classification_ratio", "eps", "lr", "lr_min", "lr_threshold", "max_kl_weight",
            "min_kl_weight", "weight_decay",
        ),
        _at_least_0,
    ),
    **dict.fromkeys(("compile", "reduce_lr_on_plateau", "update_only_decoder"), check_boolean),
    "lr_patience": _natural,
    "lr_factor": _check_factor,
    "lr_scheduler_metric": check_text,
    "optimizer": partial(check_choice, choices=("Adam", "AdamW", "Custom")),
}  # fmt: skip
_OPTIONAL_OF_PLAN: dict[str, _Check] = {
    **dict.fromkeys(("n_epochs_kl_warmup", "n_steps_kl_warmup"), _at_least_0),
    **dict.fromkeys(("on_epoch", "on_step"), check_boolean),
    "optimizer_creator": check_function,
}
# What train() hands to the splitter itself, and the splitter to its loaders.
_CHOSEN = {"load_sparse_tensor", "shuffle_set_split", *CHOSEN} - {"drop_dataset_tail", "drop_last"}


def check_training(
    given: Mapping[str, Any],
    *,
    n_obs: int | None,
    plans: Iterable[Callable[..., Any]] = (),
    splitter: Callable[..., Any] | None = None,
) -> None:
    """Raise if an argument of ``train`` is not one, or nothing takes it.

    Parameters
    ----------
    given
        Arguments of scvi-tools' ``train``, by its names.
    n_obs
        Number of cells, if there are any.
    plans, splitter
        What takes the keywords of ``plan_kwargs`` and ``datasplitter_kwargs``; none, if that is
        not known yet.

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument.
    """
    _check_extent(**{name: given[name] for name in _EXTENT if name in given})
    of_trainer = _keywords(given, "trainer_config") | _keywords(given, "trainer_kwargs")
    check_keywords(
        of_trainer,
        (Trainer, lightning.pytorch.Trainer, TrainRunner),
        further=(*_TAKEN_OUT, *_OF_CHECKPOINTS),
        argument="train()",
    )
    _check_each({**given, **of_trainer}, _OF_TRAINER, _OPTIONAL_OF_TRAINER)
    of_plan = _keywords(given, "plan_config") | _keywords(given, "plan_kwargs")
    _check_each(of_plan, _OF_PLAN, _OPTIONAL_OF_PLAN)
    if of_plan.get("optimizer") == "Custom" and of_plan.get("optimizer_creator") is None:
        raise ValueError("optimizer='Custom' needs optimizer_creator, a function of parameters")
    plans = [*plans]
    if plans:
        check_keywords(of_plan, plans, argument="plan_kwargs of train()")
    check_data_module(given.get("datamodule"))
    of_splitter = _keywords(given, "datasplitter_kwargs")
    if splitter is not None:
        _check_splitter(of_splitter, splitter, given, n_obs)


def check_data_module(datamodule: Any) -> None:
    """Raise if a data module, where there is one, is none of Lightning's, which trains on no other.

    Raises
    ------
    TypeError
        If it is none.
    """
    if datamodule is not None and not isinstance(datamodule, LightningDataModule):
        raise TypeError(f"datamodule must be a LightningDataModule, got {datamodule!r:.60}")


_EXTENT = ("max_epochs", "batch_size", "train_size", "validation_size")


def _check_extent(
    *,
    max_epochs: Any = None,
    batch_size: Any = None,
    train_size: Any = None,
    validation_size: Any = None,
) -> None:
    """Raise if it is not clear how long to train, or on which share of the cells."""
    if max_epochs is not None:
        check_positive_int("max_epochs", max_epochs, least=-1)  # -1: until it is stopped
    if batch_size is not None:
        check_positive_int("batch_size", batch_size)
    for name, value in (("train_size", train_size), ("validation_size", validation_size)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise TypeError(f"{name} must be a share of the cells, got {value!r}")
        if not (0 < value <= 1 if name == "train_size" else 0 <= value < 1):
            raise ValueError(f"{name} must be a share of the cells, got {value!r}")
    if train_size is not None and validation_size is not None and train_size + validation_size > 1:
        raise ValueError(
            f"train_size + validation_size must be at most 1, got {train_size} + {validation_size}"
        )


def _keywords(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Keywords that are passed on, given as a mapping or as scvi-tools' configuration of them."""
    value = given.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping) and callable(getattr(value, "to_kwargs", None)):
        value = value.to_kwargs()
    check_mapping(name, value)
    return dict(value)


def _check_each(
    given: Mapping[str, Any], needed: Mapping[str, _Check], optional: Mapping[str, _Check]
) -> None:
    for name, value in given.items():
        if name in needed:
            needed[name](name, value)
        elif name in optional and value is not None:
            optional[name](name, value)


def _check_splitter(
    keywords: Mapping[str, Any],
    splitter: Callable[..., Any],
    given: Mapping[str, Any],
    n_obs: int | None,
) -> None:
    """Raise if keywords of the splitter are none, or are arguments of ``train`` itself."""
    for name in keywords:
        if name in _EXTENT or (name in _OF_TRAINER and name in given):
            raise TypeError(
                f"datasplitter_kwargs must not have {name!r}, an argument of train() itself, got "
                f"{keywords[name]!r:.60}"
            )
        if name in _CHOSEN:
            raise TypeError(
                f"datasplitter_kwargs must not have {name!r}, which train() chooses, got "
                f"{keywords[name]!r:.60}"
            )
    takers = (splitter, AnnDataLoader, DataLoader)
    check_keywords(keywords, takers, argument="datasplitter_kwargs of train()")
    if "drop_last" in keywords:
        _check_flag_or_count("drop_last", keywords["drop_last"])
    check_loader_values(keywords)
    indexing = keywords.get("external_indexing")
    if indexing is not None and n_obs is not None:
        _check_external_indexing(indexing, n_obs)


def _check_external_indexing(indexing: Any, n_obs: int) -> None:
    """Raise if cells are not split into training, validation and test, each into one of them."""
    if not isinstance(indexing, list) or len(indexing) > len(_PARTS):
        raise TypeError(
            "external_indexing must be a list of up to three arrays, of the positions of the cells "
            f"of {', '.join(_PARTS)}, got {indexing!r:.60}"
        )
    taken = np.full(n_obs, -1)
    for i, cells in enumerate(indexing):
        name = f"external_indexing[{i}]"
        if cells is None or (isinstance(cells, np.ndarray) and not cells.size and i):
            continue
        if not isinstance(cells, np.ndarray) or cells.dtype.kind not in "iu":
            raise TypeError(
                f"{name} must be an array of positions of cells, or None, got {cells!r:.60}"
            )
        check_indices(cells, n_obs, name=name)
        if cells.min() < 0:
            raise IndexError(f"{name} must be positions from 0, got {cells.min()}")
        counts = np.bincount(cells, minlength=n_obs)
        if counts.max() > 1:
            raise ValueError(f"{name} must have each cell once, got {counts.argmax()} twice")
        twice = cells[taken[cells] >= 0]
        if twice.size:
            raise ValueError(
                f"{name} must have no cell of external_indexing[{taken[twice[0]]}], got "
                f"{twice[0]} in both"
            )
        taken[cells] = i
    missing = np.flatnonzero(taken < 0)
    if missing.size:
        raise ValueError(
            f"external_indexing must have each of the {n_obs} cells, but lacks {missing.size}, "
            f"first {missing[0]}"
        )
