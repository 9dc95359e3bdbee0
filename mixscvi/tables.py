"""Tables of runs: their text, and a runner that adds the rows that a table lacks."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mixscvi.engines import Engine, sequential
from mixscvi.system import write_beside

__all__ = ["csv_text", "markdown_table", "mean_and_spread", "read_rows", "run_missing"]

Configuration = TypeVar("Configuration")
Row = dict[str, Any]


def mean_and_spread(values: Sequence[float], digits: int = 2, signed: bool = False) -> str:
    """Mean and sample standard deviation (divisor n - 1) as text; the mean alone of one value.

    Parameters
    ----------
    values
        Such as a score in several seeds.
    digits
        Digits after the decimal point, of both.
    signed
        Whether a positive mean has a sign too, as differences should.

    Raises
    ------
    ValueError
        If there are no values.

    Examples
    --------
    >>> mean_and_spread([1.0, 2.0, 3.0])
    '2.00 ± 1.00'
    >>> mean_and_spread([0.25], digits=1, signed=True)
    '+0.2'
    """
    if not len(values):
        raise ValueError("values must hold at least one number, got none")
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV text, the columns in the order of their first appearance.

    Examples
    --------
    >>> print(csv_text([{"a": 1}, {"a": 2, "b": 3}]), end="")
    a,b
    1,
    2,3
    """
    rows, text = list(rows), io.StringIO()
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a CSV file, all values as text; none if there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table.

    Examples
    --------
    >>> print(markdown_table([{"A": 1, "NLL": 90.25}]), end="")
    | A | NLL |
    | --- | --- |
    | 1 | 90.25 |
    """
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def run_missing(
    configurations: Mapping[str, Configuration],
    run: Callable[[str, Configuration, Any], Mapping[str, Any]],
    path: str | Path,
    *,
    device: Any = None,
    identity: Callable[[Configuration], Mapping[str, Any]] | None = None,
    report: Callable[[str, list[Row]], object] | None = None,
    failed: Callable[[str, Exception], object] | None = None,
    engine: Engine = sequential,
) -> list[Row]:
    """Run the named configurations that are missing; write the table anew after each.

    A run that fails does not keep the others from being made: its row stays missing, so that the
    same call repeats it, and its exception is raised at the end.

    Parameters
    ----------
    configurations
        What to run, by name, in this order.
    run
        Called as ``run(name, configuration, device)``; returns the row of the run.
    path
        The table, a CSV file.
    device
        Passed to `run`.
    identity
        The columns, with their values, that identify a configuration. It is not run if the table
        has such a row; rows of other configurations stay in the table. When ``None``, the table
        starts empty and `run` is called for each configuration: for runs that keep folders of their
        own and return at once what is done.
    report
        Called as ``report(name, rows)`` whenever a row has been added, the last one.
    failed
        Called as ``failed(name, exception)`` when a run has failed.
    engine
        Where the runs are made, such as :class:`~mixscvi.engines.RayEngine`. The table is written
        here, whatever the engine; new rows are in the order of the configurations in the end.

    Returns
    -------
    All rows of the table; those read from the file hold text.

    Raises
    ------
    ExceptionGroup
        The exceptions of the runs that failed, if any did.

    Examples
    --------
    >>> import tempfile
    >>> def run(name, configuration, device):
    ...     print("running", name)
    ...     return configuration | {"score": configuration["seed"] ** 2}
    >>> runs = {f"seed {seed}": {"seed": seed} for seed in (2, 3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for names in (["seed 2"], ["seed 2", "seed 3"]):
    ...         some = {name: runs[name] for name in names}
    ...         rows = run_missing(some, run, Path(folder, "x.csv"), identity=dict)
    running seed 2
    running seed 3
    >>> rows
    [{'seed': '2', 'score': '4'}, {'seed': 3, 'score': 9}]
    """
    path = Path(path)
    old = [] if identity is None else read_rows(path)
    missing = {
        name: configuration
        for name, configuration in configurations.items()
        if identity is None or not _has_row(old, identity(configuration))
    }
    new: dict[str, Row] = {}
    errors: dict[str, Exception] = {}
    for name, outcome in engine(_Call(run, device), missing):
        if isinstance(outcome, Exception):
            errors[name] = outcome
            if failed is not None:
                failed(name, outcome)
            continue
        new[name] = dict(outcome)
        rows = [*old, *new.values()]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_beside(path, csv_text(rows))
        if report is not None:
            report(name, rows)
    rows = [*old, *(new[name] for name in missing if name in new)]
    if new:
        write_beside(path, csv_text(rows))
    if errors:
        raise ExceptionGroup(
            f"{len(errors)} of {len(configurations)} runs failed ({', '.join(errors)}); the same "
            "call repeats them alone",
            [*errors.values()],
        )
    return rows


@dataclass(frozen=True)
class _Call:
    """A run with its device, as engines call it."""

    run: Callable[[str, Any, Any], Mapping[str, Any]]
    device: Any

    def __call__(self, name: str, configuration: Any) -> Mapping[str, Any]:
        return self.run(name, configuration, self.device)


def _has_row(rows: Iterable[Row], identity: Mapping[str, Any]) -> bool:
    wanted = {column: str(value) for column, value in identity.items()}.items()
    return any(wanted <= {k: str(v) for k, v in row.items()}.items() for row in rows)
