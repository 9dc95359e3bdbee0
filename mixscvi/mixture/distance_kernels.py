"""Distances of points from the components of mixtures, compiled for the CPU by numba.

As matrix products they take memory, as large as points times components times dimensions, which is
written once and read twice. Here a tile of points stays in the cache, only lower triangles are
multiplied, and no distance depends on which cells or points share a call.
"""

from __future__ import annotations

import numpy as np

from mixscvi.compiling import cached

__all__ = ["squared_distances"]

_TILE = 64  # points; of forty dimensions in double precision: most of a core's first cache
_AT_ONCE = 4  # columns: the sum so far is read and written once for all of them


@cached(error_model="numpy", nogil=True, fastmath={"contract"})
def squared_distances(
    first_cell, last_cell, first_point, last_point, value, center, inverse, whitened, out
):
    """Write the squared lengths of ``inverse[b, k] @ (value[b, n] - center[b]) - whitened[b, k]``.

    Parameters
    ----------
    first_cell, last_cell, first_point, last_point
        Cells and points to work on; the last ones are left out.
    value
        Points, `(B, N, D)`.
    center
        `(B, D)`.
    inverse
        Lower triangular, `(B, K, D, D)`; what is above the diagonal is not read.
    whitened
        `(B, K, D)`.
    out
        `(B, N, K)`.
    """
    n_latent, n_components = value.shape[2], inverse.shape[1]
    columns = np.zeros((n_latent, _TILE))
    product, total = np.empty(_TILE), np.empty(_TILE)
    for cell in range(first_cell, last_cell):
        for start in range(first_point, last_point, _TILE):
            n = min(_TILE, last_point - start)
            for i in range(n):
                for d in range(n_latent):
                    columns[d, i] = value[cell, start + i, d] - center[cell, d]
            for k in range(n_components):
                rows = inverse[cell, k]
                total[:] = 0.0
                for d in range(n_latent):
                    product[:] = -whitened[cell, k, d]
                    whole = (d + 1) // _AT_ONCE * _AT_ONCE
                    for e in range(0, whole, _AT_ONCE):
                        a, b, c, f = rows[d, e], rows[d, e + 1], rows[d, e + 2], rows[d, e + 3]
                        for i in range(_TILE):
                            product[i] = (
                                product[i]
                                + a * columns[e, i]
                                + b * columns[e + 1, i]
                                + c * columns[e + 2, i]
                                + f * columns[e + 3, i]
                            )
                    for e in range(whole, d + 1):
                        a = rows[d, e]
                        for i in range(_TILE):
                            product[i] += a * columns[e, i]
                    for i in range(_TILE):
                        total[i] += product[i] * product[i]
                for i in range(n):
                    out[cell, start + i, k] = total[i]
