"""Tables and curves of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mixscvi.images.experiments.runs import read_config
from mixscvi.images.networks.configs import PRESETS
from mixscvi.system import check_folder, write_beside
from mixscvi.tables import csv_text, markdown_table, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "check_name",
    "curves",
    "percent",
    "sweep_figure",
    "sweep_table",
    "trusted",
    "with_ending",
]

_COLUMNS = 3  # of panels: a row of six cannot be read on a page


def with_ending(path: Path, ending: str) -> Path:
    """Append an ending to a path, whatever dots the path has.

    Examples
    --------
    >>> with_ending(Path("mnist-v0.2"), ".csv").name
    'mnist-v0.2.csv'
    """
    return path.with_name(path.name + ending)


def check_name(path: Path, argument: str) -> None:
    """Raise if a path that is to be given endings has no name to append them to.

    Raises
    ------
    ValueError
        Naming the argument.

    Examples
    --------
    >>> check_name(Path("results", "mnist"), "results")
    """
    if not path.name:
        raise ValueError(
            f"{argument} must be a path of files, without their ending, got {str(path)!r}"
        )


def _frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows with numbers as numbers, even if they were read as text, in the order of PRESETS."""
    frame = pd.DataFrame(rows)
    proposals = frame.get("proposal", pd.Series(["encoder"])).fillna("encoder").unique()
    if len(proposals) > 1:
        raise ValueError(f"rows must be of one proposal, got {sorted(proposals)}")
    frame["proposal"] = proposals[0]
    frame["trusted"] = trusted(frame)
    frame["preset"] = pd.Categorical(frame["preset"], [*PRESETS], ordered=True)
    numbers = ["components", "seed", *_MEANS, "nll"]
    frame[numbers] = frame[numbers].apply(pd.to_numeric)
    return frame.sort_values(["preset", "components"], kind="stable")


def trusted(row: Mapping[str, Any]) -> Any:
    """Share of images with k-hat below 0.7, of a row or a table of them.

    Examples
    --------
    >>> trusted({"k_hat_above_0.7": 0.25})
    0.75
    """
    return 1 - pd.to_numeric(row["k_hat_above_0.7"])


def percent(share: float) -> str:
    """A share in percent, rounded down so that 100 % are all.

    Examples
    --------
    >>> percent(0.996), percent(1.0)
    ('99 %', '100 %')
    """
    return f"{math.floor(100 * share + 1e-9)} %"


# Columns that a table averages: their headings and digits.
_MEANS = {
    "nll_iw_miselbo": ("NLL (IW-MISELBO)", 2),
    "elbo": ("-ELBO", 2),
    "jsd": ("JSD", 2),
    "ess": ("ESS", 1),
    "k_hat_median": ("median k-hat", 2),
    "active_units": ("active", 1),
}


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sweep's rows, averaged over seeds: one line for each preset and number of components.

    Beside the NLL stands the share of images whose k-hat is below 0.7: where it is small, the NLL
    is an upper bound in effect, and differences between models can be the proposals'. The last
    column is the mean difference to one component at equal seeds, its standard deviation over
    seeds, and in how many of them it is negative.

    Parameters
    ----------
    rows
        One for each run, as :func:`~mixscvi.images.experiments.sweep.sweep` returns them; numbers
        may be text.

    Returns
    -------
    A Markdown table.

    Raises
    ------
    ValueError
        If rows are of different proposals.

    Examples
    --------
    >>> row = {"preset": "flow", "seed": 0, "k_hat_above_0.7": 0.25} | dict.fromkeys(_MEANS, 1.0)
    >>> rows = [row | {"components": 1, "nll": 90.0}, row | {"components": 4, "nll": 89.0}]
    >>> for line in sweep_table(rows).splitlines()[2:]:
    ...     print(line.split(" | ")[1:6], line.split(" | ")[-1])
    ['1', '1', 'encoder', '90.00', '75 %']  |
    ['4', '1', 'encoder', '89.00', '75 %'] -1.00, lower in 1 of 1 |
    """
    frame = _frame(rows)
    alone = frame[frame["components"] == 1].drop_duplicates(["preset", "seed"], keep="last")
    frame = frame.merge(
        alone[["preset", "seed", "nll"]], "left", on=["preset", "seed"], suffixes=("", "_alone")
    )
    lines = []
    for (preset, n_components), group in frame.groupby(["preset", "components"], observed=True):
        line = {
            "preset": preset,
            "A": n_components,
            "seeds": len(group),
            "proposal": group["proposal"].iloc[0],
            "NLL": mean_and_spread([*group["nll"]]),
            "k-hat < 0.7": percent(group["trusted"].mean()),
        }
        for name, (heading, digits) in _MEANS.items():
            mean = group[name].mean()
            line[heading] = f"{-mean if name == 'elbo' else mean:.{digits}f}"
        gains = (group["nll"] - group["nll_alone"]).dropna() if n_components > 1 else ()
        line["NLL against A = 1"] = (
            f"{mean_and_spread([*gains], signed=True)}, "
            f"lower in {sum(gain < 0 for gain in gains)} of {len(gains)}"
            if len(gains)
            else ""
        )
        lines.append(line)
    return markdown_table(lines)


def sweep_figure(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw NLL against the number of components, a panel per preset, every seed a dot.

    Below each mean stands the share of images whose k-hat is below 0.7.

    Raises
    ------
    ValueError
        If rows are of different proposals.
    """
    from matplotlib.figure import Figure

    frame = _frame(rows)
    panels = list(frame.groupby("preset", observed=True))
    n_columns = min(len(panels), _COLUMNS)
    n_rows = -(-len(panels) // n_columns)
    size = (max(2.7 * n_columns, 4.4), 2.5 * n_rows + 0.3)  # wide enough for what is below
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (preset, group) in zip(axes.flat, panels, strict=False):
        means = group.groupby("components")[["nll", "trusted"]].mean()
        axis.plot(group["components"], group["nll"], "o", color="0.6", markersize=4)
        axis.plot(means["nll"], "o-", color="C0")
        for n_components, mean in means.iterrows():
            axis.annotate(
                percent(mean["trusted"]),
                (n_components, 0.03),
                xycoords=("data", "axes fraction"),
                ha="center",
                fontsize=8,
            )
        axis.set(title=preset, xlabel="components A", xticks=means.index)
        axis.margins(x=0.25, y=0.3)  # the percentages are below
    for axis in axes[:, 0]:
        axis.set_ylabel("test NLL (nats)")
    figure.supxlabel(
        f"{frame['proposal'].iloc[0]} proposal; in percent: test images with k-hat < 0.7",
        fontsize=9,
    )
    _write_figure(figure, Path(path))


def _write_figure(figure: Figure, path: Path) -> None:
    write_beside(path, lambda partial: figure.savefig(partial, dpi=150, format="png"))


def _read_log(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: no epoch of this run has ended")
    try:
        log = pd.read_csv(path, dtype=str)  # pandas before 3 rounds the numbers that it reads
        if not len(log[["epoch", "train_bound", "validation_bound"]]):
            raise ValueError("it has no rows")
        log = log.astype({name: int if name == "epoch" else float for name in log})
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or is not the log of a run: {error}") from error
    return log


def curves(folders: Sequence[str | Path], path: str | Path) -> pd.DataFrame:
    """Write the validation bounds by epoch of runs, finished or not, as CSV and figure.

    Parameters
    ----------
    folders
        The runs.
    path
        Path to write to, without extension.

    Returns
    -------
    One row per run and epoch, with the bound on training images, in which the KL term is weighted
    as in that epoch, and the bound on validation images, in nats.

    Raises
    ------
    FileNotFoundError
        If a folder holds no run, or no epoch of it has ended.
    ValueError
        If the log of a run is damaged.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from mixscvi import images
    >>> gray = np.random.default_rng(0).random((80, 6, 6))
    >>> data = images.ImageData.from_arrays(gray, n_validation=20, n_test=10)
    >>> config = images.RunConfig.from_preset("vanilla", budget="smoke")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = images.train(config, folder, data=data)
    ...     table = curves([folder], Path(folder, "curves"))
    >>> table["epoch"].tolist()
    [0, 1]
    """
    from matplotlib.figure import Figure

    if not folders:
        raise ValueError("run_folders must name at least one run, got none")
    path, logs = Path(path), []
    check_folder(path.parent, "output")
    check_name(path, "output")
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    numbers: dict[int, None] = {}
    for folder in map(Path, folders):
        config = read_config(folder)
        log = _read_log(folder / "log.csv")
        n_components = config.mixture.n_components
        run = {
            "dataset": config.dataset,
            "preset": config.preset,
            "budget": config.budget,
            "components": n_components,
            "component_encoder": config.mixture.component_encoder,
            "seed": config.seed,
        }
        logs.append(log.assign(**run)[[*run, *log]])
        axis.plot(
            log["epoch"] + 1,
            log["validation_bound"],
            color=f"C{n_components}",
            linewidth=1,
            label=None if n_components in numbers else f"A = {n_components}",
        )
        numbers[n_components] = None
    table = pd.concat(logs)
    # The first epochs are far below and would flatten the rest of the curves.
    axis.set(xlabel="epoch", ylabel="validation bound (nats)")
    axis.set_ylim(table["validation_bound"].quantile(0.1), None)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(with_ending(path, ".csv"), csv_text(table.to_dict("records")))
    _write_figure(figure, with_ending(path, ".png"))
    return table
