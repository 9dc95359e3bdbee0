"""Lightning's checkpoints as files that are replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mixscvi.checkpoint_file import read_checkpoint
from mixscvi.python_numbers import in_python
from mixscvi.system import naming_what_is_written, write_beside

__all__ = ["AtomicCheckpointIO"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """How a trainer reads and writes checkpoints, so that at any moment there is a whole one.

    Lightning itself writes into the system's folder for temporary files, where a process that is
    killed leaves them, and moves them from there, which is not one step across disks. It reads with
    pickle, which can run any code.

    Examples
    --------
    >>> import pathlib, tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "last.ckpt")
    ...     AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(2)}, path)
    ...     AtomicCheckpointIO().load_checkpoint(path)
    {'weights': tensor([1., 1.])}
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint beside its place, and rename it."""
        if storage_options is not None:
            raise TypeError(f"storage_options must be None, got {storage_options!r}")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = in_python(checkpoint)
        with naming_what_is_written(path):
            write_beside(path, lambda beside: torch.save(plain, beside))

    def load_checkpoint(
        self, path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU; see :func:`~mixscvi.checkpoint_file.read_checkpoint`."""
        return read_checkpoint(path)
