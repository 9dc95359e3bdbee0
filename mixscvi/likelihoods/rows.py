"""Rows of compressed sparse counts as dense ones, compiled for the CPU by numba."""

from __future__ import annotations

from mixscvi.compiling import cached

__all__ = ["add_rows"]


@cached(error_model="numpy", nogil=True)
def add_rows(rows, indptr, indices, data, out):
    """Add rows of a CSR matrix to those of `out`; whether all entries have a column there.

    Entries of one place are added up.
    """
    n_columns = out.shape[1]
    for i in range(rows.size):
        for entry in range(indptr[rows[i]], indptr[rows[i] + 1]):
            column = indices[entry]
            if not 0 <= column < n_columns:
                return False
            out[i, column] += data[entry]
    return True
