"""Files of checkpoints, read without running what they hold; what damages archives of torch."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

__all__ = ["UNREADABLE", "damaged_record", "read_checkpoint"]

# What damaged bytes make the readers of archives, and torch in them, raise.
UNREADABLE = (
    EOFError,
    LookupError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def damaged_record(path: Path) -> str | None:
    """Name of the first damaged record of an archive, or ``None`` if all are whole.

    torch reads over damaged bytes; the archive has a checksum of each of its records. What is no
    archive raises one of ``UNREADABLE``.
    """
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running anything that it holds.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is truncated, damaged, or holds Python objects, naming it.
    """
    path = Path(path)
    remedy = "delete it to start anew, or fetch it again"
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        damaged = damaged_record(path)
    except UNREADABLE as error:
        raise ValueError(f"{path} is truncated, or no checkpoint ({error}): {remedy}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged at its record {damaged!r}: {remedy}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects, and reading them can run any code: it was not written "
            f"by mixscvi, or a callback keeps such objects as its state; {remedy}"
        ) from error
    except UNREADABLE as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged ({detail}): {remedy}") from error
