"""Log-likelihoods of counts with their gradients, compiled for the CPU by numba.

One call walks cells and, within a cell, its draws. Each row of genes stays in the cache from its
first read to the last write. Rows do not depend on each other, nor on how they are shared between
threads.

Sums are loops of their own, which write nothing. Where a loop reads one array and writes another,
the compiled code looks at run time whether they overlap, and a sum within it would be taken in an
order that depends on where they happen to lie in memory.

Per cell, on the counts that are not zero: log-gamma and digamma terms, which all draws share if
they share a dispersion. Per draw and for all genes: softmax, logarithms, gradients, as vector
instructions. Per draw, on the counts that are not zero: the term in log(mean).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mixscvi.compiling import cached
from mixscvi.lanes import SLACK, places_above
from mixscvi.likelihoods.terms import BUFFER, BY_THETA, BY_ZI, TILE, terms_of_genes
from mixscvi.likelihoods.vector_math import (
    add,
    larger,
    log,
    log_gamma_ratio,
    softmax_exp,
    use_wide_vectors,
)

__all__ = ["TABLE_SIZE", "fill_table", "rows", "table_length"]

# Counts below it look their log-gamma terms up.
TABLE_SIZE = 16

# Of what is inlined here.
_SOURCES = ("mixscvi.likelihoods.vector_math", "mixscvi.likelihoods.terms", "mixscvi.lanes")

_TABLE = TABLE_SIZE * TILE


def table_length(n_genes: int) -> int:
    """Elements of the table that :func:`fill_table` fills."""
    return -(-n_genes // TILE) * 2 * _TABLE


_inlined = njit(error_model="numpy", forceinline=True)


@cached(*_SOURCES, error_model="numpy", nogil=True)
def fill_table(theta, table):
    """Log-gamma terms of the counts 0, 1, ... under the dispersion of each gene.

    They are log Gamma(k + theta) - log Gamma(theta) - log k!, a sum of `k` logarithms. They lie in
    blocks of as many genes as a tile has: `TABLE_SIZE` times the terms of each gene, then as many
    times their derivatives by theta.
    """
    real = theta.dtype.type
    zero, one = real(0), real(1)
    for start in range(0, theta.size, TILE):
        n = min(TILE, theta.size - start)
        at = start * 2 * TABLE_SIZE
        for i in range(n):
            table[at + i] = zero
            table[at + _TABLE + i] = zero
        for count in range(1, TABLE_SIZE):
            at += TILE
            step, inverse = real(count - 1), real(1.0 / count)
            for i in range(n):
                now, before = np.uintp(at + i), np.uintp(at - TILE + i)
                shifted = theta[np.uintp(start + i)] + step
                table[now] = table[before] + log(shifted * inverse)
                now, before = np.uintp(at + _TABLE + i), np.uintp(at + _TABLE - TILE + i)
                table[now] = table[before] + one / shifted


@njit(error_model="numpy")
def _log_gamma_terms(n, count, theta, values, slopes):
    """Sum of log Gamma(x + theta) - log Gamma(theta), and derivatives for each of `n` counts."""
    for j in range(n):
        value, slope = log_gamma_ratio(float(count[j]), float(theta[j]))
        values[j] = value
        slopes[j] = slope
    total = 0.0
    for j in range(n):
        total = add(total, values[j])
    return total


@_inlined
def _look_up(n, index, count, theta, table, slopes, far, far_count, far_theta):
    """Sum of the tabulated log-gamma terms, and their slopes; how many counts are beyond them.

    Those are listed in `far`, `far_count` and `far_theta`.
    """
    total, n_far = 0.0, 0
    for j in range(n):
        k = int(count[j]) if count[j] < TABLE_SIZE else 0
        if k == count[j]:
            at = index[j] // TILE * (2 * _TABLE) + k * TILE + index[j] % TILE
            total += table[at]
            slopes[j] = table[at + _TABLE]
        else:
            far[n_far] = j
            far_count[n_far] = count[j]
            far_theta[n_far] = theta[j]
            n_far += 1
    return total, n_far


@_inlined
def _nonzero_counts(x, indptr, indices, data, cell, smallest, scattered, index, nonzero):
    """All counts of a cell; where they are above `smallest`, and what they are there."""
    n = 0
    if indptr.size:
        for j in range(indptr[cell], indptr[cell + 1]):
            index[n] = indices[j]
            nonzero[n] = data[j]
            n += 0 if data[j] <= smallest else 1
        for j in range(n):
            scattered[index[j]] = nonzero[j]
        return scattered, n
    counts = x[cell]
    n = places_above(counts, smallest, index, 0, counts.size)
    for j in range(n):
        nonzero[j] = counts[index[j]]
    return counts, n


@_inlined
def _exponentials(logits, bias, row, out):
    """Softmax of a row, not yet divided by its sum; that sum."""
    use_wide_vectors()
    n_genes = out.size
    for gene in range(n_genes):
        out[gene] = logits[row, gene] if bias is None else logits[row, gene] + bias[gene]
    highest = out[0]
    for gene in range(n_genes):
        highest = larger(highest, out[gene])
    for gene in range(n_genes):
        out[gene] = softmax_exp(out[gene] - highest)
    total = out.dtype.type(0)
    for gene in range(n_genes):
        total = add(total, out[gene])
    return total


@cached(*_SOURCES, error_model="numpy", nogil=True)
def rows(
    first_cell,
    last_cell,
    first_draw,
    last_draw,
    task,
    n_cells,
    n_per_stratum,
    x,
    indptr,
    indices,
    data,
    mean,
    mean_bias,
    log_library,
    theta,
    theta_strides,
    zi,
    zi_bias,
    table,
    value,
    d_mean,
    d_theta,
    d_zi,
    d_log_library,
    sums,
):
    """Log-likelihoods of some draws of some cells, and their gradients.

    Row ``(l * n_cells + cell) * n_per_stratum + s`` belongs to draw ``l * n_per_stratum + s`` of a
    cell. Arrays are C-contiguous, and those with `R` rows may be given by every row of a batch.

    Parameters
    ----------
    first_cell, last_cell, first_draw, last_draw
        Cells and draws to work on; the last ones are left out.
    task
        Number of this call among those that share the work.
    x
        Counts `(B, G)`; not read if they are in `indptr`, `indices` and `data`.
    indptr, indices, data
        Compressed sparse rows of counts, or empty arrays.
    mean
        Means, or logits of a softmax that is multiplied by ``exp(log_library)``, `(R, G)`.
    mean_bias, zi_bias
        Added to the logits, `(G,)`, or ``None``.
    log_library
        `(R,)`, or ``None`` if `mean` holds means.
    theta
        Inverse dispersions `(n, G)`, and in `theta_strides` how far their row moves with `l`, with
        the cell and with `s`; ``None`` for a Poisson likelihood.
    zi
        Logits of dropping out, `(R, G)`, or ``None`` if nothing drops out.
    table
        From :func:`fill_table`, or empty.
    value, d_log_library
        Written, `(R,)`.
    d_mean, d_theta, d_zi
        Written, `(R, G)`: gradients of the value of each row; all ``None`` to have none. `d_mean`
        may be `mean` if that holds logits, and `d_zi` may be `zi`. `d_theta` may be ``None`` alone.
    sums
        Gradients by mean, theta and zi are added up over rows into ``sums[task]``, `(n, 3, G)`;
        ``None`` not to.
    """
    use_wide_vectors()
    real = mean.dtype.type
    eps, zero, one = real(1e-8), real(0), real(1)
    smallest = eps if zi is not None else zero
    n_genes = mean.shape[1]
    index = np.empty(n_genes + SLACK, np.uint32)  # signed ones would be checked for wrapping around
    count = np.empty(n_genes, mean.dtype)
    theta_nz = np.empty(n_genes, mean.dtype)
    far = np.empty(n_genes, np.uint32)
    far_count = np.empty(n_genes, mean.dtype)
    far_theta = np.empty(n_genes, mean.dtype)
    ones = np.ones(n_genes, mean.dtype)
    terms = np.empty(n_genes, np.float64)
    slopes = np.empty(n_genes, np.float64)
    far_slopes = np.empty(n_genes, np.float64)
    mean_nz = np.empty(n_genes, mean.dtype)
    d_theta_nz = np.empty(n_genes, mean.dtype)
    scattered = np.zeros(n_genes if indptr.size else 0, mean.dtype)
    share = np.empty(n_genes, mean.dtype)
    slope = np.empty(n_genes, mean.dtype)
    buffer = np.empty(BUFFER, mean.dtype)
    along_l, along_b, along_s = theta_strides
    shared = along_l == 0 and along_s == 0

    for cell in range(first_cell, last_cell):
        counts, n = _nonzero_counts(
            x, indptr, indices, data, cell, smallest, scattered, index, count
        )
        if theta is not None and shared:
            for j in range(n):
                theta_nz[j] = theta[cell * along_b, index[j]]
        constant = 0.0
        if table.size == 0:
            constant -= _log_gamma_terms(n, count, ones, terms, slopes)
            if theta is not None and shared:
                constant += _log_gamma_terms(n, count, theta_nz, terms, slopes)
        else:
            constant, n_far = _look_up(
                n, index, count, theta_nz, table, slopes, far, far_count, far_theta
            )
            constant -= _log_gamma_terms(n_far, far_count, ones, terms, far_slopes)
            constant += _log_gamma_terms(n_far, far_count, far_theta, terms, far_slopes)
            for j in range(n_far):
                slopes[far[j]] = far_slopes[j]

        for draw in range(first_draw, last_draw):
            stratum, s = draw // n_per_stratum, draw % n_per_stratum
            row = (stratum * n_cells + cell) * n_per_stratum + s
            theta_row = stratum * along_l + cell * along_b + s * along_s
            own = constant
            if theta is not None and not shared:
                for j in range(n):
                    theta_nz[j] = theta[theta_row, index[j]]
                own += _log_gamma_terms(n, count, theta_nz, terms, slopes)

            scale, total = one, one
            if log_library is None:
                means = mean[row]
            else:
                total = _exponentials(mean, mean_bias, row, share)
                scale = real(np.exp(log_library[row])) / total
                means = share

            dense, row_slope = 0.0, zero
            for start in range(0, n_genes, TILE):
                n_tile = min(TILE, n_genes - start)
                part, part_slope = terms_of_genes(
                    counts, means, scale, log_library, theta, theta_row, zi, zi_bias, row, start,
                    n_tile, eps, d_mean, buffer,
                )  # fmt: skip
                dense += float(part)
                row_slope += part_slope
                if d_mean is not None:
                    for i in range(n_tile):
                        gene = np.uintp(start + i)
                        slope[gene] = buffer[i]
                        if d_theta is not None:
                            d_theta[row, gene] = buffer[BY_THETA + i]
                        if zi is not None:
                            d_zi[row, gene] = buffer[BY_ZI + i]
                    if sums is not None:
                        for i in range(n_tile):
                            gene = np.uintp(start + i)
                            if theta is not None:
                                sums[task, 1, gene] += buffer[BY_THETA + i]
                            if zi is not None:
                                sums[task, 2, gene] += buffer[BY_ZI + i]

            for j in range(n):
                mean_nz[j] = means[index[j]]
            for j in range(n):
                k, mu = count[j], mean_nz[j] * scale
                factor = one if log_library is None else mu
                if theta is None:
                    terms[j] = float(k * log(mu))
                    added = k if log_library is not None else k / mu
                else:
                    th = theta_nz[j]
                    inverse = one / (mu + (th + eps))
                    terms[j] = float(k * log((mu + eps) * inverse))
                    added = k * (th * inverse * (factor / (mu + eps)))
                if d_mean is not None:
                    mean_nz[j] = added
                    if theta is not None:
                        d_theta_nz[j] = real(slopes[j]) - k * inverse
            sparse = 0.0
            for j in range(n):
                sparse = add(sparse, terms[j])
            if d_mean is not None:
                for j in range(n):
                    row_slope = add(row_slope, mean_nz[j])
            value[row] = real(own + dense + sparse)

            if d_mean is not None:
                for j in range(n):
                    slope[index[j]] += mean_nz[j]
                    if d_theta is not None:
                        d_theta[row, index[j]] += d_theta_nz[j]
                    if theta is not None and sums is not None:
                        sums[task, 1, index[j]] += d_theta_nz[j]
                if log_library is None:
                    for gene in range(n_genes):
                        d_mean[row, gene] = slope[gene]
                else:
                    d_log_library[row] = row_slope
                    for gene in range(n_genes):
                        slope[gene] -= share[gene] * (row_slope / total)
                    for gene in range(n_genes):
                        d_mean[row, gene] = slope[gene]
                if sums is not None:
                    for gene in range(n_genes):
                        sums[task, 0, gene] += slope[gene]

        for j in range(n if scattered.size else 0):
            scattered[index[j]] = zero
