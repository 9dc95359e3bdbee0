"""How the time of an epoch grows with components, genes and cells."""

from __future__ import annotations

import statistics
from pathlib import Path

from timed_models import in_turns, make, synthetic_counts, train

from mixscvi.pl.drawing import COLORS

SCALING: dict[str, tuple[int, ...]] = {
    "components": (1, 4, 16, 64, 100, 400),
    "genes": (1_000, 2_000, 5_000, 10_000, 20_000),
    "cells": (1_000, 10_000, 50_000, 200_000),
}


def scaling(axis: str) -> list[dict]:
    """Seconds per epoch as one size grows; the others are 2000 genes, 4000 cells, A = 4."""
    rows = []
    for size in SCALING[axis]:
        n_cells = size if axis == "cells" else 4_000
        adata = synthetic_counts(n_cells, size if axis == "genes" else 2_000)
        models = {"SCVI": make(adata, "SCVI")}
        if axis == "components":
            amortized = {"n_components": size, "component_encoder": "amortized"}
            for estimator in ("some_to_some", "some_to_all"):
                models[f"MixSCVI, amortized, S = 1, {estimator}"] = make(
                    adata, "MixSCVI", **amortized, estimator=estimator
                )
            if size <= 16:
                models["MixSCVI, separate, all_to_all"] = make(adata, "MixSCVI", n_components=size)
        else:
            models["MixSCVI, A = 1"] = make(adata, "MixSCVI", n_components=1)
            models["MixSCVI, A = 4"] = make(adata, "MixSCVI", n_components=4)
        large = n_cells > 50_000
        if not large:
            for model in models.values():
                train(model, 1)
        calls = {name: lambda model=model: train(model, 1) for name, model in models.items()}
        for name, times in in_turns(calls, 1 if large else 3).items():
            seconds = statistics.median(times)
            rows.append(
                {"axis": axis, "size": size, "model": name, "seconds": float(f"{seconds:.4g}")}
            )
            print(rows[-1], flush=True)
    return rows


def draw_scaling(rows: list[dict], axis: str, path: Path) -> None:
    """Seconds per epoch against the size, on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, StrMethodFormatter

    figure = Figure(figsize=(5, 4.4), layout="constrained")
    plot = figure.subplots()
    models = dict.fromkeys(row["model"] for row in rows)
    for place, model in enumerate(models):
        points = [
            (int(row["size"]), float(row["seconds"])) for row in rows if row["model"] == model
        ]
        color = "0.4" if model == "SCVI" else COLORS[place - 1]
        plot.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=model)
    plot.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds per epoch, logarithmic")
    plot.set_title(
        {"components": "4,000 cells, 2,000 genes", "genes": "4,000 cells"}.get(axis, "2,000 genes")
    )
    for of in (plot.xaxis, plot.yaxis):
        of.set_major_locator(LogLocator(subs=(1, 2, 5)))
        of.set_major_formatter(StrMethodFormatter("{x:,g}"))
        of.set_minor_locator(LogLocator(subs=()))
    plot.xaxis.set_major_formatter(EngFormatter(sep=""))
    low, high = plot.get_ylim()
    if high < 10 * low:  # few ticks would look like those of a linear axis
        plot.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    figure.legend(loc="outside lower center", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
