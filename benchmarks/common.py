"""What the benchmarks share: the data, and the machine they ran on."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import pandas as pd
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
    "cell_ranger" flavor; cells left without counts are dropped.
    """
    import anndata
    import scanpy as sc
    import torch

    n_threads = torch.get_num_threads()
    adata = anndata.read_h5ad(data_folder() / "single_cell" / f"{name}.h5ad")
    normalized = adata.copy()
    sc.pp.normalize_total(normalized, target_sum=1e4)
    sc.pp.log1p(normalized)
    sc.pp.highly_variable_genes(normalized, n_top_genes=n_genes, flavor="cell_ranger")
    adata = adata[:, normalized.var["highly_variable"].to_numpy()].copy()
    sc.pp.filter_cells(adata, min_counts=1)
    torch.set_num_threads(n_threads)  # scanpy's compiled functions have set it to all cores
    return adata


def kmeans(features: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """Clusters of the rows of `features`, `(n,)`: the best of ten starts."""
    from sklearn.cluster import KMeans

    return KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(features)


def agreement(types: Sequence, clusters: Sequence) -> dict[str, float]:
    """Adjusted Rand index and normalized mutual information of clusters with cell types."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    return {
        "ari": adjusted_rand_score(types, clusters),
        "nmi": normalized_mutual_info_score(types, clusters),
    }


def paired_difference(values: pd.Series, baseline: pd.Series, digits: int) -> str:
    """Mean of the differences in the seeds that both have, and its 95 % t-interval, as text.

    Of a single seed the mean alone; of none, nothing.
    """
    from scipy import stats

    differences = (values - baseline).dropna()
    if differences.empty:
        return ""
    mean = f"{differences.mean():+.{digits}f}"
    if len(differences) == 1:
        return mean
    least, most = stats.t.interval(
        0.95, len(differences) - 1, differences.mean(), stats.sem(differences)
    )
    return f"{mean} [{least:+.{digits}f}, {most:+.{digits}f}]"


def _processor() -> str:
    """Instruction set and, where Linux tells it, vendor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    vendors = {line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")}
    return " ".join((platform.machine(), *sorted(vendors)))


def machine() -> dict[str, Any]:
    """Columns that say where and how a number was made."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "scvi_tools": version("scvi-tools"),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "command": shlex.join(["python", *sys.argv]),
    }
