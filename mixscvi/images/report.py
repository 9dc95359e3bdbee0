"""Tables and pictures of runs."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixscvi.images.configs import PRESETS
from mixscvi.images.datasets import ImageData
from mixscvi.images.runs import (
    csv_text,
    default_device,
    finished_run_data,
    load_run,
    read_config,
)
from mixscvi.system import write_beside

__all__ = [
    "curves",
    "markdown_table",
    "picture_grid",
    "reconstruct",
    "sample",
    "sweep_figure",
    "sweep_table",
    "with_ending",
]


def with_ending(path: Path, ending: str) -> Path:
    """A path and an ending, whatever dots the path has.

    Examples
    --------
    >>> with_ending(Path("mnist-v0.2"), ".csv").name
    'mnist-v0.2.csv'
    """
    return path.with_name(path.name + ending)


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


def _groups(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["preset"], int(row["components"])].append(row)
    return dict(sorted(groups.items(), key=lambda item: (_order(item[0][0]), item[0][1])))


def _order(preset: str) -> int:
    return [*PRESETS].index(preset)


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sweep's rows, averaged over seeds: one line for each preset and number of components.

    The last column is the mean difference to one component at equal seeds, its standard deviation
    over seeds, and in how many of them it is negative.
    """
    alone = {
        (row["preset"], int(row["seed"])): float(row["nll"])
        for row in rows
        if int(row["components"]) == 1
    }
    lines = []
    for (preset, n_components), group in _groups(rows).items():
        nll = [float(row["nll"]) for row in group]
        gains = [
            float(row["nll"]) - alone[preset, int(row["seed"])]
            for row in group
            if n_components > 1 and (preset, int(row["seed"])) in alone
        ]
        n_lower = sum(gain < 0 for gain in gains)

        def mean(name: str, digits: int = 2, group: list = group) -> str:
            return f"{statistics.fmean(float(row[name]) for row in group):.{digits}f}"

        lines.append(
            {
                "preset": preset,
                "A": n_components,
                "seeds": len(group),
                "NLL": f"{statistics.fmean(nll):.2f}{_spread(nll)}",
                "NLL (paper form)": mean("nll_paper"),
                "-ELBO": f"{-float(mean('elbo')):.2f}",
                "JSD": mean("jsd"),
                "ESS": mean("ess", 1),
                "k-hat": mean("k_hat_median"),
                "active": mean("active_units", 1),
                "NLL against A = 1": (
                    f"{statistics.fmean(gains):+.2f}{_spread(gains)}, "
                    f"lower in {n_lower} of {len(gains)}"
                    if gains
                    else ""
                ),
            }
        )
    return markdown_table(lines)


def _spread(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""


def sweep_figure(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Draw NLL against the number of components, a panel per preset, every seed a dot."""
    from matplotlib.figure import Figure

    groups = _groups(rows)
    presets = list(dict.fromkeys(preset for preset, _ in groups))
    figure = Figure(figsize=(2.4 * len(presets), 2.6), layout="constrained")
    axes = figure.subplots(1, len(presets), squeeze=False)[0]
    for axis, preset in zip(axes, presets, strict=True):
        numbers = [n for name, n in groups if name == preset]
        values = [[float(row["nll"]) for row in groups[preset, n]] for n in numbers]
        for n, group in zip(numbers, values, strict=True):
            axis.plot([n] * len(group), group, "o", color="0.6", markersize=4)
        axis.plot(numbers, [statistics.fmean(group) for group in values], "o-", color="C0")
        axis.set(title=preset, xlabel="components A", xticks=numbers)
    axes[0].set_ylabel("test NLL (nats)")
    write_beside(Path(path), lambda partial: figure.savefig(partial, dpi=150, format="png"))


def curves(folders: Sequence[str | Path], path: str | Path) -> list[dict[str, Any]]:
    """Write the validation bounds of runs by epoch, finished or not, as CSV and figure.

    Parameters
    ----------
    folders
        The runs.
    path
        Where to write, without an ending.

    Returns
    -------
    One row per run and epoch, with the bound on training images, its KL term weighted as in that
    epoch, and the bound on validation images, in nats.
    """
    from matplotlib.figure import Figure

    path, rows = Path(path), []
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    numbers: dict[int, None] = {}
    for folder in map(Path, folders):
        config = read_config(folder)
        with open(folder / "log.csv", newline="") as file:
            log = list(csv.DictReader(file))
        n_components = config.mixture.n_components
        run = {
            "dataset": config.dataset,
            "preset": config.preset,
            "budget": config.budget,
            "components": n_components,
            "component_encoder": config.mixture.component_encoder,
            "seed": config.seed,
        }
        rows += [run | epoch for epoch in log]
        axis.plot(
            [int(epoch["epoch"]) + 1 for epoch in log],
            [float(epoch["validation_bound"]) for epoch in log],
            color=f"C{n_components}",
            linewidth=1,
            label=None if n_components in numbers else f"A = {n_components}",
        )
        numbers[n_components] = None
    # The first epochs, far below, would flatten what follows.
    seen = [float(row["validation_bound"]) for row in rows]
    axis.set(xlabel="epoch", ylabel="validation bound (nats)")
    axis.set_ylim(float(np.quantile(seen, 0.1)), None)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(with_ending(path, ".csv"), csv_text(rows))
    write_beside(
        with_ending(path, ".png"), lambda partial: figure.savefig(partial, dpi=150, format="png")
    )
    return rows


def picture_grid(images: Tensor, path: str | Path, *, n_columns: int = 8) -> None:
    """Write images `(n, 1, height, width)` in [0, 1] as one picture, row by row."""
    from matplotlib.image import imsave

    n, _, height, width = images.shape
    n_rows = math.ceil(n / n_columns)
    grid = np.ones((n_rows * (height + 1) + 1, n_columns * (width + 1) + 1))
    for i, image in enumerate(images[:, 0].cpu().numpy()):
        top = i // n_columns * (height + 1) + 1
        left = i % n_columns * (width + 1) + 1
        grid[top : top + height, left : left + width] = image
    enlarged = np.kron(grid, np.ones((2, 2)))
    write_beside(
        Path(path),
        lambda partial: imsave(partial, enlarged, cmap="gray", vmin=0, vmax=1, format="png"),
    )


def sample(
    folder: str | Path,
    *,
    n_images: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Path:
    """Write a grid of images drawn from a run's model; a PixelCNN's are drawn pixel by pixel.

    Returns
    -------
    The picture, ``samples.png`` in the run's folder.
    """
    device = default_device() if device is None else torch.device(device)
    path = Path(folder) / "samples.png"
    picture_grid(load_run(folder, device)[1].sample(n_images, seed), path)
    return path


@torch.no_grad()
def reconstruct(
    folder: str | Path,
    *,
    n_images: int = 8,
    data: ImageData | None = None,
    data_folder: str | Path | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Path:
    """Write test images above their reconstructions, one row for each component.

    Returns
    -------
    The picture, ``reconstructions.png`` in the run's folder.
    """
    device = default_device() if device is None else torch.device(device)
    _, model = load_run(folder, device)
    x = finished_run_data(folder, data, data_folder).test[:n_images].to(device)
    generator = torch.Generator(x.device).manual_seed(seed)
    z = model.draw(x, generator=generator).z[0]
    # (A, B, ...): a row of the picture is a component.
    rows = model.decoder.sample(z.transpose(0, 1).flatten(0, 1), generator)
    path = Path(folder) / "reconstructions.png"
    picture_grid(torch.cat((x, rows)), path, n_columns=len(x))
    return path
