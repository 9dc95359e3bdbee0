"""The models that are timed, and their data."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import machine, read_counts

DATA: dict[str, tuple[str | None, int, int]] = {  # file, genes, epochs that are timed at once
    "pbmc4k": ("pbmc4k", 2000, 8),
    "cortex": ("cortex", 4172, 8),
    "pbmc3k": ("pbmc3k", 13656, 1),
    "synthetic": (None, 2000, 1),
}
SEED = 0  # of the synthetic counts, of weights, minibatches and draws


def synthetic_counts(n_cells: int, n_genes: int, *, nonzero: float = 0.1):
    """Sparse counts of eight clusters of cells, as many of them zero as in droplet data."""
    import anndata
    from scipy import sparse

    rng = np.random.default_rng(SEED)
    cluster = rng.integers(8, size=n_cells)
    share = rng.gamma(0.3, size=(8, n_genes)).astype(np.float32) + 0.02
    n_of_cell = rng.binomial(n_genes, nonzero, size=n_cells)
    indptr = np.concatenate(([0], n_of_cell.cumsum()))
    indices = np.empty(indptr[-1], np.int32)
    data = np.empty(indptr[-1], np.float32)
    for cell in range(n_cells):
        some = slice(indptr[cell], indptr[cell + 1])
        genes = rng.permutation(n_genes)[: n_of_cell[cell]]
        genes.sort()
        indices[some] = genes
        data[some] = 1 + rng.poisson(2 * share[cluster[cell], genes])
    counts = sparse.csr_matrix((data, indices, indptr), shape=(n_cells, n_genes))
    return anndata.AnnData(counts)


def read(name: str):
    """One of the data sets, or synthetic counts where it is none."""
    file, n_genes, _ = DATA[name]
    return read_counts(file, n_genes) if file else synthetic_counts(50_000, n_genes)


def make(adata, cls: str, **kwargs: Any):
    """A model of one of the two classes on registered data."""
    import scvi

    import mixscvi

    model_cls = mixscvi.MixSCVI if cls == "MixSCVI" else scvi.model.SCVI
    scvi.settings.seed = SEED
    model_cls.setup_anndata(adata)
    return model_cls(adata, **kwargs)


def made() -> dict[str, Any]:
    """Columns that say how a number was made."""
    return {"seed": SEED, **machine()}


def train(model, epochs: int) -> None:
    """Train further, as in a first training: scvi-tools leaves a trained module in eval mode."""
    model.module.train()
    model.train(max_epochs=epochs, enable_progress_bar=False)


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, made in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            gc.collect()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds
