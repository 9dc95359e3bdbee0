"""Where runs are made: here, one after the other, or side by side as tasks of Ray."""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from mixscvi.system import keep_freed_memory
from mixscvi.warning import warn_user

__all__ = ["Engine", "RayEngine", "sequential"]

Configuration = TypeVar("Configuration")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs named configurations, and yields the result of each, or its error, as it ends.

    Examples
    --------
    One of your own is a function of two arguments:

    >>> def backwards(run, configurations):
    ...     for name in reversed(configurations):
    ...         yield name, run(name, configurations[name])
    >>> engine: Engine = backwards
    >>> list(engine(lambda name, x: x + 1, {"a": 1, "b": 2}))
    [('b', 3), ('a', 2)]
    """

    def __call__(
        self,
        run: Callable[[str, Configuration], Result],
        configurations: Mapping[str, Configuration],
    ) -> Iterator[tuple[str, Result | Exception]]:
        """Names, with what `run` returned for them or the exception that it raised."""
        ...


def sequential(
    run: Callable[[str, Configuration], Result], configurations: Mapping[str, Configuration]
) -> Iterator[tuple[str, Result | Exception]]:
    """Run one configuration after the other, in this process.

    Parameters
    ----------
    run
        Called with a name and its configuration.
    configurations
        By name.

    Yields
    ------
    Each name, with what `run` returned or the exception that it raised.

    Examples
    --------
    >>> for name, outcome in sequential(lambda name, x: 1 / x, {"half": 2, "none": 0}):
    ...     print(name, repr(outcome))
    half 0.5
    none ZeroDivisionError('division by zero')
    """
    for name, configuration in configurations.items():
        try:
            outcome: Result | Exception = run(name, configuration)
        except Exception as error:  # noqa: BLE001 - whatever ends one run must not end the others
            outcome = error
        yield name, outcome


@dataclass(frozen=True)
class RayEngine:
    """Runs each configuration as a task of Ray, on this machine or on a cluster.

    What is run is sent once, with all that it holds, and must not depend on files that the other
    machines lack; they need mixscvi installed in the same version. The task of a worker that dies
    is run again up to three times, as is Ray's habit. A connection that is open already is used,
    and left open.

    Parameters
    ----------
    address
        Of the cluster, as :func:`ray.init` takes it; when ``None``, the cluster that
        ``RAY_ADDRESS`` names, else one that runs on this machine, else one that is started for
        these runs.
    cpus
        Processor cores of each run, which torch takes as many threads for.
    gpus
        Accelerators of each run; when ``None``, one if the cluster has any.

    Raises
    ------
    ImportError
        If Ray is not installed.
    ConnectionError
        If there is no cluster at the address.
    ValueError
        If `cpus` is not positive, or `gpus` is negative.

    Examples
    --------
    >>> RayEngine("10.0.0.1:6379", cpus=4)
    RayEngine(address='10.0.0.1:6379', cpus=4, gpus=None)
    """

    address: str | None = None
    cpus: float = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        if not self.cpus > 0:
            raise ValueError(f"cpus must be above 0, got {self.cpus}")
        if self.gpus is not None and not 0 <= self.gpus < math.inf:
            raise ValueError(f"gpus must be at least 0, got {self.gpus}")

    def __call__(
        self,
        run: Callable[[str, Configuration], Result],
        configurations: Mapping[str, Configuration],
    ) -> Iterator[tuple[str, Result | Exception]]:
        """Names, with what `run` returned for them or the exception that it raised."""
        ray = _import_ray()
        ours = not ray.is_initialized()
        if ours:
            _check_reachable(self.address)
            ray.init(self.address, log_to_driver=False)
        try:
            task = ray.remote(num_cpus=self.cpus, num_gpus=self._gpus(ray))(_run)
            sent = ray.put(run)
            running = {
                task.options(name=name).remote(sent, name, configuration): name
                for name, configuration in configurations.items()
            }
            while running:
                (ended, *_), _ = ray.wait([*running], num_returns=1)
                name = running.pop(ended)
                try:
                    outcome: Result | Exception = ray.get(ended)
                except ray.exceptions.RayTaskError as error:
                    cause: Exception = error.cause
                    cause.add_note(str(error))  # where it was raised, on the other machine
                    outcome = cause
                except ray.exceptions.RayError as error:
                    outcome = error
                yield name, outcome
        finally:
            if ours:
                ray.shutdown()

    def _gpus(self, ray: Any) -> float:
        """Accelerators of each run; warns if no machine of the cluster has what a run needs."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = self.gpus
        if gpus is None:
            gpus = 1 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0
        if not any(
            node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= gpus for node in nodes
        ):
            warn_user(
                f"no machine of the cluster has {self.cpus:g} CPUs and {gpus:g} GPUs: the runs "
                "wait until one has joined"
            )
        return gpus


def _run(
    run: Callable[[str, Configuration], Result], name: str, configuration: Configuration
) -> Result:
    keep_freed_memory()
    return run(name, configuration)


def _check_reachable(address: str | None) -> None:
    """Raise at once if nothing listens at an address; Ray would try for many minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)/?", address or "")
    if found is None:  # left to Ray, such as "auto"
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=20).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"no cluster of Ray answers at address={address!r}: {error}"
        ) from error


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "engine 'ray' needs Ray, which is not installed: pip install 'mixscvi[ray]'"
        ) from error
    return ray
