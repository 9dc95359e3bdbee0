"""What the benchmarks share: the data, the machine they ran on, and a table that can be resumed."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mixscvi.system import write_beside

if TYPE_CHECKING:
    from anndata import AnnData

RESULTS = Path(__file__).parent / "results"


def data_folder() -> Path:
    """The folder named by ``MIXSCVI_DATA``, else ``../shared/data`` beside the repository."""
    named = os.environ.get("MIXSCVI_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        raise SystemExit(f"no data in {folder}: set MIXSCVI_DATA to the folder that holds them")
    return folder


def read_counts(name: str, n_genes: int) -> AnnData:
    """One of the single-cell data sets with its `n_genes` most variable genes.

    Variability is the dispersion of log-normalized expression within bins of equal mean, scanpy's
    "cell_ranger" flavour; cells left without counts are dropped.
    """
    import anndata
    import scanpy as sc

    adata = anndata.read_h5ad(data_folder() / "single_cell" / f"{name}.h5ad")
    normalized = adata.copy()
    sc.pp.normalize_total(normalized, target_sum=1e4)
    sc.pp.log1p(normalized)
    sc.pp.highly_variable_genes(normalized, n_top_genes=n_genes, flavor="cell_ranger")
    adata = adata[:, normalized.var["highly_variable"].to_numpy()].copy()
    sc.pp.filter_cells(adata, min_counts=1)
    return adata


def machine() -> dict[str, Any]:
    """Columns that say where and how a number was made."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "scvi_tools": version("scvi-tools"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "command": shlex.join(["python", *sys.argv]),
    }


class ResumableTable:
    """A CSV with one row per run; runs that it holds already are not run again.

    Parameters
    ----------
    path
        The CSV.
    keys
        The columns that name a run.
    """

    def __init__(self, path: Path, keys: list[str]) -> None:
        self.path, self.keys = path, keys
        self.rows = pd.read_csv(path).to_dict("records") if path.exists() else []

    def holds(self, **run: Any) -> bool:
        """Whether this run is done."""
        return any(all(row[key] == run[key] for key in self.keys) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the whole table anew."""
        self.rows.append({**row, **machine()})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = pd.DataFrame(self.rows).to_csv(index=False, float_format="%.6g")
        write_beside(self.path, text)
