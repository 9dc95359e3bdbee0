"""Atomic file writes, and the C library's memory settings."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["keep_freed_memory", "write_beside"]

# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def write_beside(path: str | Path, content: str | Callable[[Path], object]) -> None:
    """Write a file atomically: beside its place, then renamed.

    Parameters
    ----------
    path
        The file.
    content
        Its text, or what writes it to the path that it is called with. That path has the same
        ending, which some writers go by.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "table.csv")
    ...     write_beside(path, "a,b")
    ...     write_beside(path, lambda beside: beside.write_text("c,d"))
    ...     path.read_text(), [file.name for file in path.parent.iterdir()]
    ('c,d', ['table.csv'])
    """
    path = Path(path)
    beside = path.with_name(f".partial.{path.name}")
    try:
        if isinstance(content, str):
            beside.write_text(content)
        else:
            content(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def keep_freed_memory() -> bool:
    """Have the C library keep the memory that tensors free, for the next ones.

    By default glibc hands large blocks back to the system at once, and every step of a training
    takes them anew, page by page: up to a third of its time on a CPU. The setting holds for the
    whole process, whose memory then stays at its peak, so it is for programs to make, not for
    libraries.

    Returns
    -------
    Whether the C library knows the setting; glibc does.

    Examples
    --------
    >>> keep_freed_memory() in (True, False)
    True
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_MMAP_MAX, 0))
