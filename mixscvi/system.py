"""Atomic file writes, the memory that there is, and the C library's settings of it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "check_folder",
    "keep_freed_memory",
    "naming_what_is_written",
    "naming_what_takes_memory",
    "physical_memory",
    "write_beside",
]

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


@contextmanager
def naming_what_is_written(path: str | Path) -> Iterator[None]:
    """Name what cannot be written where the writers of torch and of HDF5 name nothing.

    Parameters
    ----------
    path
        The file or folder.

    Returns
    -------
    A context, in which it is written.

    Raises
    ------
    OSError
        Naming it. Errors of the system that name a file stay as they are.

    Examples
    --------
    >>> with naming_what_is_written("model.pt"):
    ...     raise RuntimeError("unexpected pos 64 vs 0")
    Traceback (most recent call last):
    ...
    OSError: model.pt could not be written, is the disk full? (unexpected pos 64 vs 0)
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise OSError(f"{path} could not be written, is the disk full? ({error})") from error


def check_folder(folder: str | Path, name: str) -> None:
    """Raise if a folder cannot be made, as a file is in its place.

    Parameters
    ----------
    folder
        The folder, which need not exist.
    name
        The argument that names it.

    Raises
    ------
    NotADirectoryError
        If it is a file, or below one.
    ValueError
        If no path is like this.

    Examples
    --------
    >>> check_folder("results", "output")
    """
    folder = Path(folder)
    if "\0" in str(folder):
        raise ValueError(f"{name} must be a path, got {str(folder)!r}, which has a null character")
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(
                f"{name} must be a folder, got {str(folder)!r}, and {str(part)!r} is a file"
            )


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


def physical_memory() -> int | None:
    """Memory that this machine has.

    Returns
    -------
    Bytes; ``None`` where the system does not say.

    Examples
    --------
    >>> memory = physical_memory()
    >>> memory is None or memory > 10**6
    True
    """
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a POSIX system, or one without these
        return None


@contextmanager
def naming_what_takes_memory(message: str) -> Iterator[None]:
    """Say what to choose where something is too large to be made.

    Parameters
    ----------
    message
        Of the error.

    Returns
    -------
    A context, in which it may be made.

    Raises
    ------
    MemoryError
        If there is no memory for it, for which torch has a RuntimeError or a TypeError.

    Examples
    --------
    >>> with naming_what_takes_memory("choose a smaller n"):
    ...     raise RuntimeError("not enough memory: you tried to allocate 8 bytes")
    Traceback (most recent call last):
    ...
    MemoryError: choose a smaller n
    """
    try:
        yield
    except (MemoryError, RuntimeError, TypeError) as error:
        said = str(error).lower()  # sizes beyond torch's integers overflow
        if not isinstance(error, MemoryError) and "alloc" not in said and "overflow" not in said:
            raise
        raise MemoryError(message) from error
