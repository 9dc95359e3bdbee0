"""When functions that numba compiles are used, on how many threads, and what if they fail."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import import_module
from itertools import product
from types import ModuleType
from typing import Any, TypeVar

import torch

from mixscvi.warning import warn_user

__all__ = [
    "array",
    "attempt",
    "grid",
    "in_blocks",
    "load",
    "n_tasks",
    "plain",
    "run_tasks",
    "split",
    "traced",
]

T = TypeVar("T")

_logger = logging.getLogger(__name__)
_failed = False
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


def load(name: str) -> ModuleType | None:
    """A module of compiled functions, or ``None`` where numba is missing or has failed.

    Neither the module nor numba is imported before.

    Examples
    --------
    >>> load("mixscvi.mixture.sparse_kernels").__name__
    'mixscvi.mixture.sparse_kernels'
    """
    if _failed:
        return None
    try:
        return _import(name)
    except Exception as error:
        if not (isinstance(error, ImportError) or _is_of_the_compiler(error)):
            raise
        _give_up(error)
        return None


@lru_cache
def _import(name: str) -> ModuleType:
    import numba

    if vars(numba.config)["DISABLE_JIT"]:
        raise ImportError("numba compiles nothing, as NUMBA_DISABLE_JIT is set")
    _announce()
    return import_module(name)


@lru_cache
def _announce() -> None:
    """See to it that the first compilation of this process is said."""
    from numba.core import event

    class Announcement(event.Listener):
        done = False

        def on_start(self, event: event.Event) -> None:
            function = event.data["dispatcher"]
            if self.done or not function.py_func.__module__.startswith("mixscvi."):
                return
            self.done = True
            folder = function.stats.cache_path
            where = f"once, and keeps them in {folder}" if folder else "in each process"
            _logger.info(
                "numba compiles fast likelihoods and matrix products %s: some ten seconds", where
            )

        def on_end(self, event: event.Event) -> None:
            """Nothing is said of the end: there are many functions."""

    event.register("numba:compile", Announcement())


def _is_of_the_compiler(error: Exception) -> bool:
    """Whether an error comes out of numba or its library of LLVM.

    They raise many types: for code that they do not take, a library that does not load, and files
    of kept machine code that are cut short or cannot be written.
    """
    frames = traceback.walk_tb(error.__traceback__)
    modules = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return any(module.partition(".")[0] in ("numba", "llvmlite") for module in modules)


def _give_up(error: BaseException) -> None:
    """Use no compiled function from now on, and say once why."""
    global _failed
    _failed = True
    # Ahead of the cause numba says at which step it failed.
    text = _COLORS.sub("", str(error))  # where colorama is installed
    lines = [line for line in text.splitlines() if line.strip()]
    cause = next((line for line in lines if not line.startswith("Failed in ")), "")
    warn_user(
        "numba cannot provide fast likelihoods and matrix products, so slower ones are used "
        f"({type(error).__name__}: {cause})",
        RuntimeWarning,
    )


def plain(*tensors: torch.Tensor) -> bool:
    """Whether compiled functions may read tensors: ordinary ones on the CPU, and nothing traced."""
    return (
        all(
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and tensor.layout is torch.strided
            and tensor.device.type == "cpu"
            for tensor in tensors
        )
        and not traced()
    )


def traced() -> bool:
    """Whether ``torch.compile`` or a transform of ``torch.func`` is looking at what is computed."""
    return bool(torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def array(tensor: torch.Tensor) -> Any:
    """What compiled functions take: a C-contiguous array, of the tensor's memory if that is."""
    return tensor.detach().contiguous().numpy()


def attempt(function: Callable[..., T], *args: Any) -> T | None:
    """What a compiled function returns, or ``None`` if it cannot be compiled.

    Then no compiled function is used from now on.

    Warns
    -----
    RuntimeWarning
        If it cannot be compiled, with the first line of the error.

    Examples
    --------
    >>> attempt(len, "abc")
    3
    """
    try:
        return function(*args)
    except Exception as error:
        if not _is_of_the_compiler(error):
            raise
        _give_up(error)
        return None


def n_tasks(work: int, least: int, per_thread: int) -> int:
    """Into how many tasks to divide some work.

    Parameters
    ----------
    work, least
        How much there is, and how much of it pays for a task of its own.
    per_thread
        Tasks of each thread at most: a thread that is late leaves its share to the others.

    Examples
    --------
    >>> n_tasks(work=5, least=10, per_thread=2)
    1
    """
    n_threads = torch.get_num_threads()
    most = 1 if n_threads == 1 else per_thread * n_threads
    return max(1, min(most, work // least))


def split(n: int, n_blocks: int) -> list[tuple[int, int]]:
    """First and last numbers of blocks of `n` things, about equal; the last one is left out.

    Examples
    --------
    >>> split(5, 2)
    [(0, 2), (2, 5)]
    """
    bounds = [n * i // n_blocks for i in range(n_blocks + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


def grid(n_rows: int, n_columns: int, n_tasks: int) -> list[tuple[int, int, int, int]]:
    """Blocks of rows and columns for about as many tasks: rows are split before columns.

    Returns
    -------
    First and last row, first and last column of each; the last ones are left out.

    Examples
    --------
    >>> grid(2, 6, n_tasks=4)
    [(0, 1, 0, 3), (0, 1, 3, 6), (1, 2, 0, 3), (1, 2, 3, 6)]
    """
    row_blocks = max(1, min(n_rows, n_tasks))
    column_blocks = max(1, min(n_columns, -(-n_tasks // row_blocks)))
    blocks = product(split(n_rows, row_blocks), split(n_columns, column_blocks))
    return [(*rows, *columns) for rows, columns in blocks]


def in_blocks(kernel: Callable[..., None], blocks: Sequence[tuple[int, ...]], *arrays: Any) -> bool:
    """Run a compiled function on each block, on torch's number of threads.

    Parameters
    ----------
    kernel
        Called with the numbers of a block, then the arrays; see :func:`attempt`.
    blocks
        See :func:`run_tasks`.

    Returns
    -------
    Whether it could be compiled.
    """

    def run() -> bool:
        run_tasks(lambda *block: kernel(*block, *arrays), blocks, torch.get_num_threads())
        return True

    return attempt(run) is not None


@lru_cache(1)
def _thread_pool(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Threads besides the calling one; those of a parent process do not survive a fork."""
    return ThreadPoolExecutor(n_threads - 1, thread_name_prefix="mixscvi")


_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache(1)
def _openmp_parallel() -> Callable[..., None] | None:
    """The entry to torch's own OpenMP threads, if its library has that of GNU's.

    After a matrix product these threads spin for some milliseconds in wait of more work. Other
    threads would compete with them for the cores, and take up to twice as long.
    """
    parallel = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    if parallel is not None:
        parallel.argtypes = (_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
    return parallel


def run_tasks(call: Callable[..., None], tasks: Sequence[tuple[int, ...]], n_threads: int) -> None:
    """Make a call for each task, by the thread that is free next.

    Parameters
    ----------
    call
        Takes the numbers of a task; releases the interpreter's lock.
    tasks
        Arguments of each call.
    n_threads
        How many threads there may be, the calling one included.

    Raises
    ------
    Exception
        What a call raises, in whichever thread.

    Examples
    --------
    >>> done = []
    >>> run_tasks(done.append, [(1,), (2,)], n_threads=1)
    >>> done
    [1, 2]
    """
    waiting = iter(tasks)
    raised: list[Exception] = []

    def work(_: object = None) -> None:
        try:
            for task in waiting:
                call(*task)
        except Exception as error:  # noqa: BLE001 - raised again in the calling thread
            raised.append(error)

    n_threads = min(n_threads, len(tasks))
    parallel = _openmp_parallel()
    if n_threads <= 1:
        work()
    elif parallel is not None:
        parallel(_REGION(work), None, n_threads, 0)
    else:
        pool = _thread_pool(n_threads, os.getpid())
        helpers = [pool.submit(work) for _ in range(n_threads - 1)]
        work()
        for helper in helpers:
            helper.result()
    if raised:
        raise raised[0]
