"""Training on counts that stay on disk: memory and time as the number of cells grows.

Synthetic sparse counts are written to a temporary h5ad file, some cells at a time. Each
configuration trains one epoch and embeds all cells in a process of its own, whose peak memory is
recorded. A table that has a configuration is not run for it again.

    python benchmarks/out_of_core.py                     # writes results/out_of_core.csv
    python benchmarks/out_of_core.py --ways annbatch     # with scvi-tools 1.5 and annbatch
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from common import RESULTS, machine

from mixscvi.pl.drawing import COLORS
from mixscvi.system import write_beside
from mixscvi.tables import run_missing

TABLE = RESULTS / "out_of_core.csv"
CELLS = (50_000, 100_000, 200_000)
# What trains, with how many components, and where the counts are.
WAYS = {
    "A4": ("MixSCVI", 4, "disk"),
    "A1": ("MixSCVI", 1, "disk"),
    "scvi": ("SCVI", 1, "disk"),
    "A4-memory": ("MixSCVI", 4, "memory"),
    "annbatch": ("MixSCVI", 4, "annbatch"),
}
DEFAULT_WAYS = ("A4", "A1", "scvi", "A4-memory")


def write_counts(path: Path, n_cells: int, n_genes: int, cells_at_once: int = 5_000) -> None:
    """Counts of twenty kinds of cells, a tenth of them not zero; the first cells are always the
    same."""
    import h5py
    import numpy as np
    import pandas as pd
    from anndata.io import sparse_dataset, write_elem
    from scipy import sparse

    rates = np.random.default_rng(0).gamma(0.25, 0.5, size=(20, n_genes))
    with h5py.File(path, "w") as file:
        for start in range(0, n_cells, cells_at_once):
            rng = np.random.default_rng([0, start])
            n = min(cells_at_once, n_cells - start)
            depth = rng.lognormal(0, 0.4, size=(n, 1))
            counts = rng.poisson(rates[rng.integers(20, size=n)] * depth).astype(np.float32)
            counts[:, 0] += 1
            counts = sparse.csr_matrix(counts)
            if start:
                sparse_dataset(file["X"]).append(counts)
            else:
                write_elem(file, "X", counts)
        names = [f"cell{i}" for i in range(n_cells)]
        batches = pd.Categorical.from_codes(np.arange(n_cells) % 2, ["b0", "b1"])
        write_elem(file, "obs", pd.DataFrame({"batch": batches}, index=names))
        genes = [f"gene{i}" for i in range(n_genes)]
        write_elem(file, "var", pd.DataFrame(index=genes))
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, path: Path) -> dict:
    """Train and embed in this process."""
    import anndata
    import scvi
    import torch

    import mixscvi

    # Numba compiles on first use, and importing takes memory, whatever the data.
    warnings.simplefilter("ignore")
    name, n_components, place = WAYS[way]
    cls = mixscvi.MixSCVI if name == "MixSCVI" else scvi.model.SCVI
    options = {"n_components": n_components} if name == "MixSCVI" else {}
    training = {"accelerator": "cpu", "enable_progress_bar": False, "logger": None}
    warm_up = mixscvi.datasets.pbmc68k()
    cls.setup_anndata(warm_up)
    model = cls(warm_up, **options)
    model.train(max_epochs=1, **training)
    model.get_latent_representation()
    row = {"peak_before_mb": round(peak_megabytes())}

    scvi.settings.seed = 0
    start = time.perf_counter()
    if place == "annbatch":
        data = cls.setup_annbatch(
            collection_path=str(path.with_suffix(".zarr")),
            paths=[str(path)],
            rebuild=False,
            batch_key="batch",
            batch_size=128,
            chunk_size=64,
            preload_nchunks=32,
            preload_to_gpu=False,
            shuffle=True,
        )
        model = cls(registry=data.registry, **options)
        training["datamodule"] = data
        n_cells = data.n_obs
    else:
        data = anndata.read_h5ad(path, backed="r" if place == "disk" else None)
        cls.setup_anndata(data, batch_key="batch")
        model = cls(data, **options)
        n_cells = data.n_obs
    row["seconds_setup"] = round(time.perf_counter() - start, 2)
    start = time.perf_counter()
    model.train(max_epochs=1, train_size=1.0, **training)
    seconds = time.perf_counter() - start
    row["ms_per_cell_train"] = round(1e3 * seconds / n_cells, 4)
    row["peak_mb"] = round(peak_megabytes())
    start = time.perf_counter()
    if place == "annbatch":
        latents = model.get_latent_representation(dataloader=data.inference_dataloader())
    else:
        latents = model.get_latent_representation()
    row["ms_per_cell_embed"] = round(1e3 * (time.perf_counter() - start) / n_cells, 4)
    row["peak_after_embedding_mb"] = round(peak_megabytes())
    assert latents.shape == (n_cells, 10)
    return row | {"threads": torch.get_num_threads()}


def convert(path: Path) -> None:
    """Write the zarr collection that annbatch reads, in this process."""
    import mixscvi

    warnings.simplefilter("ignore")
    mixscvi.MixSCVI.setup_annbatch(
        collection_path=str(path.with_suffix(".zarr")),
        paths=[str(path)],
        batch_key="batch",
        batch_size=128,
        chunk_size=64,
        preload_to_gpu=False,
        shuffle=True,
    )


def draw(rows: list[dict], path: Path) -> None:
    """Memory and times against the number of cells."""
    from matplotlib.figure import Figure

    labels = {
        "A4": "MixSCVI, 4 components, h5ad",
        "A1": "MixSCVI, 1 component, h5ad",
        "scvi": "SCVI, h5ad",
        "A4-memory": "MixSCVI, 4 components, in memory",
        "annbatch": "MixSCVI, 4 components, annbatch",
    }
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        ("more_mb", "memory taken beyond start-up (MB)"),
        ("ms_per_cell_train", "training (ms per cell)"),
        ("ms_per_cell_embed", "embedding (ms per cell)"),
    )
    for (way, label), color in zip(labels.items(), COLORS, strict=False):
        mine = sorted((int(r["cells"]), r) for r in rows if r["way"] == way)
        if not mine:
            continue
        for ax, (column, _) in zip(axes, panels, strict=True):
            values = [
                float(r["peak_after_embedding_mb"]) - float(r["peak_before_mb"])
                if column == "more_mb"
                else float(r[column])
                for _, r in mine
            ]
            ax.plot([n / 1e3 for n, _ in mine], values, marker="o", color=color, label=label)
    for ax, (_, title) in zip(axes, panels, strict=True):
        ax.set(xlabel="thousand cells", ylabel=title, ylim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=DEFAULT_WAYS)
    parser.add_argument("--cells", nargs="*", type=int, default=CELLS)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--folder", type=Path, help="for the counts; by default a temporary one")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--convert", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return
    if options.convert:
        convert(Path(options.convert))
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)

        def run(name: str, configuration: dict, device: None) -> dict:
            path = folder / f"{configuration['cells']}x{configuration['genes']}.h5ad"
            if not path.exists():
                write_beside(
                    path,
                    lambda beside: write_counts(
                        beside, configuration["cells"], configuration["genes"]
                    ),
                )
            this = [sys.executable, __file__]
            if configuration["way"] == "annbatch" and not path.with_suffix(".zarr").exists():
                subprocess.run([*this, "--convert", str(path)], check=True)
            start = [*this, "--measure", configuration["way"], str(path)]
            output = subprocess.run(start, check=True, stdout=subprocess.PIPE, text=True).stdout
            row = configuration | json.loads(output.splitlines()[-1]) | machine()
            print(row, flush=True)
            return row

        runs = {
            f"{way}, {cells}": {"way": way, "cells": cells, "genes": options.genes}
            for cells in options.cells
            for way in options.ways
        }
        run_missing(runs, run, TABLE, identity=dict)


if __name__ == "__main__":
    main()
