"""What scvi-tools' data module of annbatch leaves open."""

from __future__ import annotations

from typing import Any

import numpy as np
import scvi.dataloaders
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mixscvi.checks import name_cells

__all__ = ["OrderOfAnnbatch", "check_annotation_of_annbatch", "is_of_annbatch"]

_KEYS = ("_batch_key", "_label_key")
_LISTS = ("_categorical_covariate_keys", "_continuous_covariate_keys")


class OrderOfAnnbatch(Callback):
    """Has annbatch draw the order of cells as torch's loaders do: from the seed.

    scvi-tools gives it a generator that nobody has seeded. Here each epoch has one of its own,
    seeded from NumPy's generator, whose state checkpoints hold; loaders of other kinds are left
    alone.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the order of the epoch, in each process another."""
        sampler = _sampler_of_annbatch(trainer)
        if sampler is not None:
            seed = int(np.random.randint(2**32, dtype=np.uint32))
            sampler._rng = np.random.default_rng([trainer.global_rank, seed])


def is_of_annbatch(datamodule: Any) -> bool:
    """Whether it is scvi-tools' data module of annbatch.

    Examples
    --------
    >>> is_of_annbatch(None)
    False
    """
    kind = getattr(scvi.dataloaders, "AnnbatchDataModule", None)  # from scvi-tools 1.5 on
    return kind is not None and isinstance(datamodule, kind)


def _sampler_of_annbatch(trainer: Trainer) -> Any:
    """What draws the order of cells, if that is annbatch for a data module of scvi-tools."""
    if not is_of_annbatch(trainer.datamodule):
        return None
    loader: Any = trainer.train_dataloader
    loader = getattr(loader, "dataset", loader)  # where one of torch's is around it
    sampler = getattr(loader, "_batch_sampler", None)
    sampler = getattr(sampler, "_sampler", sampler)  # one for several processes is around another
    return sampler if isinstance(getattr(sampler, "_rng", None), np.random.Generator) else None


def check_annotation_of_annbatch(datamodule: Any) -> None:
    """Raise if cells lack a batch, a label or a covariate, which scvi-tools takes for one more.

    Parameters
    ----------
    datamodule
        Any; all but that of annbatch pass.

    Raises
    ------
    ValueError
        Naming the column and the first offending cells.

    Examples
    --------
    >>> check_annotation_of_annbatch(None)
    """
    if not is_of_annbatch(datamodule):
        return
    keys = [getattr(datamodule, name, None) for name in _KEYS]
    for name in _LISTS:
        keys.extend(getattr(datamodule, name, None) or ())
    for obs in getattr(datamodule.dataset, "_obs", None) or ():
        for key in keys:
            if key is None or key not in obs:
                continue
            missing = np.flatnonzero(obs[key].isna())
            if len(missing):
                raise ValueError(
                    f"column {key!r} of datamodule has missing values in "
                    f"{name_cells(obs.index, missing)}: give these cells one, or leave them out"
                )
