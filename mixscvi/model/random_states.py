"""States of the random number generators that a training draws from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import scvi.dataloaders
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

__all__ = ["OrderOfAnnbatch", "get_random_states", "is_of_annbatch", "set_random_states"]


def get_random_states(device: torch.device) -> dict[str, Any]:
    """States of Python's, numpy's and torch's own generators, and of that of a device.

    Examples
    --------
    >>> import torch
    >>> states = get_random_states(torch.device("cpu"))
    >>> drawn = torch.rand(3)
    >>> set_random_states(states, torch.device("cpu"))
    >>> bool((torch.rand(3) == drawn).all())
    True
    """
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set the states that :func:`get_random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"])


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
