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
    """Copy rows of a CSR matrix to one that has them alone.

    The results are whether the columns of each row rise, without which nothing more is copied, and
    whether all are the matrix's own.
    """
    n = 0
    for i in range(rows.size):
        starts[i] = n
        last = -1
        for entry in range(indptr[rows[i]], indptr[rows[i] + 1]):
            if not 0 <= indices[entry] < n_columns:
                return True, False
            if indices[entry] <= last:
                return False, True
            last = indices[entry]
            column[n] = last
            value[n] = data[entry]
            n += 1
    starts[rows.size] = n
    return True, True
