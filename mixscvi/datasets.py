"""Real counts that need no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["pbmc68k"]

# Three decimals, and the rounding of float32 on top of them.
_ROUNDING = 5e-4 + 1e-6


def pbmc68k() -> AnnData:
    r"""Peripheral blood mononuclear cells: the counts behind a data set that scanpy ships.

    :func:`scanpy.datasets.pbmc68k_reduced` keeps no counts, only
    :math:`y = \log(1 + 10^4 x / n)`, rounded to three decimals, for the count :math:`x` of a gene
    in a cell of library size :math:`n`. The rounding is finer than the step from one count to the
    next, so :math:`x = \operatorname{rint}(n (e^y - 1) / 10^4)` gives the counts back exactly.

    Returns
    -------
    Annotated data of 700 cells and 765 genes.

    - ``X``: `(700, 765)` raw integer counts, CSR, float32.
    - ``obs["cell_type"]``: one of 10 types, categorical, the ``bulk_labels`` of scanpy's file.
    - ``obs["n_counts"]``: library size over all genes of the genome. The 765 genes here carry about
      20 % of it.
    - ``uns["provenance"]``: where the data come from.

    Raises
    ------
    RuntimeError
        If the installed scanpy ships a file whose counts cannot be told from it.

    Notes
    -----
    The cells are from Zheng et al. (2017), `Massively parallel digital transcriptional profiling of
    single cells <https://doi.org/10.1038/ncomms14049>`_, Nature Communications 8, 14049; the types
    are those of the purified bulk population that each cell resembles most, so they are not
    independent of expression.

    Examples
    --------
    >>> from mixscvi.datasets import pbmc68k
    >>> adata = pbmc68k()
    >>> adata.shape
    (700, 765)
    >>> adata.obs["cell_type"].value_counts().head(3).to_dict()
    {'Dendritic': 240, 'CD14+ Monocyte': 129, 'CD19+ B': 95}
    >>> int(adata.X.max()), int(adata.X.sum())
    (259, 486651)
    """
    import numpy as np
    import scanpy as sc
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    source = sc.datasets.pbmc68k_reduced()
    if source.raw is None or not {"bulk_labels", "n_counts"} <= set(source.obs):
        raise RuntimeError(
            "scanpy.datasets.pbmc68k_reduced() has changed: expected `raw`, obs['bulk_labels'] and "
            "obs['n_counts']."
        )

    log_normalized = csr_matrix(source.raw.X, dtype=np.float64)
    log_normalized.sum_duplicates()
    per_count = 1e4 / source.obs["n_counts"].to_numpy(dtype=np.float64)
    # One value for every stored entry of the matrix: the size of one count in that entry's cell.
    per_count = np.repeat(per_count, np.diff(log_normalized.indptr))
    counts = np.rint(np.expm1(log_normalized.data) / per_count)

    error = np.abs(np.log1p(counts * per_count) - log_normalized.data)
    # A NaN anywhere must count as a failure, so the comparison asks what is right.
    exact = (error <= _ROUNDING) & (counts >= 0)
    if not exact.all():
        raise RuntimeError(
            "scanpy.datasets.pbmc68k_reduced() has changed: "
            f"{np.count_nonzero(~exact)} of {exact.size} values of `raw` are not "
            "log1p(1e4 * count / n_counts) of an integer count, rounded to 3 decimals."
        )

    X = csr_matrix(
        (counts.astype(np.float32), log_normalized.indices, log_normalized.indptr),
        shape=log_normalized.shape,
    )
    X.eliminate_zeros()
    obs = source.obs[["bulk_labels", "n_counts"]].rename(columns={"bulk_labels": "cell_type"})
    adata = AnnData(X, obs=obs, var=source.raw.var[[]])
    adata.uns["provenance"] = (
        "10x Genomics fresh 68k PBMC, Zheng et al. 2017, Nature Communications 8:14049; the subset "
        "in scanpy.datasets.pbmc68k_reduced(), counts rebuilt exactly from its `raw`."
    )
    return adata
