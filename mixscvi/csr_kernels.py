"""Rows of compressed sparse matrices, taken by functions that numba compiles."""

from __future__ import annotations

from mixscvi.compiling import cached

__all__ = ["add_rows", "copy_rows"]


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


@cached(error_model="numpy", nogil=True)
def copy_rows(rows, indptr, indices, data, n_columns, starts, column, value):
    """Copy rows of a CSR matrix to one that has them alone; whether all columns are its own."""
    n = 0
    for i in range(rows.size):
        starts[i] = n
        for entry in range(indptr[rows[i]], indptr[rows[i] + 1]):
            if not 0 <= indices[entry] < n_columns:
                return False
            column[n] = indices[entry]
            value[n] = data[entry]
            n += 1
    starts[rows.size] = n
    return True
