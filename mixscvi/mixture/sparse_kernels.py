"""Products of matrices that are mostly zero, compiled for the CPU by numba.

A row of the product is a weighted sum of rows of a table. A tile of its columns stays in vector
registers while the table's rows are added, which a loop over arrays would not be compiled to: the
sum is written in LLVM's own terms. Each row is summed by one thread, in the order of its non-zeros.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mixscvi.compiling import cached
from mixscvi.lanes import SLACK, places_other_than

__all__ = [
    "SCATTERED_TILE",
    "SLACK",
    "TILE",
    "find_nonzeros",
    "sort_by_column",
    "sums_by_column",
    "sums_of_rows",
]

# Columns that are summed at once: eight vector registers of 64 bytes in single precision.
TILE = 128
_NARROW_TILE = 32
# As many sums of 128 rows stay in the first cache.
SCATTERED_TILE = 64
_VECTOR_BYTES = 64

_INTEGER = ir.IntType(64)


@cached("mixscvi.lanes", error_model="numpy", nogil=True)
def find_nonzeros(x, starts, index, value):
    """Columns and values of what is not zero in `x`, by rows; whether there is room for all.

    `index` has room for `SLACK` more than may be found.
    """
    n = 0
    for row in range(x.shape[0]):
        starts[row] = n
        n = places_other_than(x[row], x.dtype.type(0), index, n, index.size - SLACK)
        if n < 0:
            return False
        for entry in range(starts[row], n):
            value[entry] = x[row, index[entry]]
    starts[x.shape[0]] = n
    return True


@cached(error_model="numpy", nogil=True)
def sort_by_column(starts, index, value, new_starts, new_index, new_value):
    """The same non-zeros by columns: the compressed sparse rows of the transpose."""
    n_rows, n_columns = starts.size - 1, new_starts.size - 1
    new_starts[:] = 0
    for entry in range(starts[n_rows]):
        new_starts[index[entry] + 1] += 1
    for column in range(n_columns):
        new_starts[column + 1] += new_starts[column]
    for row in range(n_rows):
        for entry in range(starts[row], starts[row + 1]):
            column = index[entry]
            at = new_starts[column]
            new_index[at] = row
            new_value[at] = value[entry]
            new_starts[column] = at + 1
    for column in range(n_columns, 0, -1):  # each has moved on to where the next one starts
        new_starts[column] = new_starts[column - 1]
    new_starts[0] = 0


class _Tile:
    """LLVM's terms for `width` columns from `column` on of the rows of arrays."""

    def __init__(self, context, builder, kind, width, column):
        self.context, self.builder, self.width, self.column = context, builder, width, column
        self.size = context.get_abi_sizeof(kind)
        self.lanes = min(width, _VECTOR_BYTES // self.size)
        self.vector = ir.VectorType(kind, self.lanes)

    def pointers(self, array, row):
        """Where the vectors of one row lie."""
        builder, stride = self.builder, self.builder.extract_value(array.strides, 0)
        start = builder.add(
            builder.mul(row, stride), builder.mul(self.column, ir.Constant(_INTEGER, self.size))
        )
        address = builder.add(builder.ptrtoint(array.data, _INTEGER), start)
        for vector in range(self.width // self.lanes):
            offset = ir.Constant(_INTEGER, self.size * self.lanes * vector)
            yield builder.inttoptr(builder.add(address, offset), self.vector.as_pointer())

    def load(self, array, row):
        """The vectors of one row."""
        return [
            self.builder.load(pointer, align=self.size) for pointer in self.pointers(array, row)
        ]

    def store(self, values, array, row):
        """Write the vectors of one row."""
        for value, pointer in zip(values, self.pointers(array, row), strict=True):
            self.builder.store(value, pointer, align=self.size)

    def add(self, totals, weight, values):
        """`totals + weight * values`."""
        builder, zero = self.builder, ir.Constant(ir.IntType(32), 0)
        weights = builder.insert_element(ir.Constant(self.vector, ir.Undefined), weight, zero)
        weights = builder.shuffle_vector(
            weights, weights, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None)
        )
        contract = ("contract",)  # a multiplication and an addition may be one instruction
        return [
            builder.fadd(total, builder.fmul(weights, value, flags=contract), flags=contract)
            for total, value in zip(totals, values, strict=True)
        ]


def _entries(width, gather):
    """A function that goes over entries from `first` to `last` of compressed sparse rows.

    Each has an index and a value. To gather is to write to the row `row` of `target` the sum of
    those rows of `source` that the entries name, weighted by the values, both of `width` columns
    from `column` on. To scatter is to add the row `row` of `source`, of such columns, to those rows
    of `target`, which has no other columns.
    """

    @intrinsic
    def go_over_entries(context, index, value, first, last, source, column, target, row):
        def codegen(context, builder, signature, arguments):
            index, value, first, last, source, column, target, row = arguments
            kind = context.get_value_type(signature.args[4].dtype)
            tile = _Tile(context, builder, kind, width, column)
            whole = _Tile(context, builder, kind, width, ir.Constant(_INTEGER, 0))

            def array(position, data):
                return context.make_array(signature.args[position])(context, builder, data)

            indices, values = array(0, index).data, array(1, value).data
            source, target = array(4, source), array(6, target)
            n_vectors, nothing = width // tile.lanes, ir.Constant(tile.vector, None)
            scattered = None if gather else tile.load(source, row)
            before = builder.block
            loop, after = builder.append_basic_block(), builder.append_basic_block()
            builder.cbranch(builder.icmp_signed("<", first, last), loop, after)

            builder.position_at_end(loop)
            entry = builder.phi(_INTEGER)
            sums = [builder.phi(tile.vector) for _ in range(n_vectors)] if gather else []
            at = builder.load(builder.gep(indices, [entry]))
            weight = builder.load(builder.gep(values, [entry]))
            if gather:
                new = tile.add(sums, weight, tile.load(source, at))
            else:
                whole.store(tile.add(whole.load(target, at), weight, scattered), target, at)
            following = builder.add(entry, ir.Constant(_INTEGER, 1))
            builder.cbranch(builder.icmp_signed("<", following, last), loop, after)
            entry.add_incoming(first, before)
            entry.add_incoming(following, loop)

            builder.position_at_end(after)
            if gather:
                results = [builder.phi(tile.vector) for _ in new]
                for total, result, added in zip(sums, results, new, strict=True):
                    total.add_incoming(nothing, before)
                    total.add_incoming(added, loop)
                    result.add_incoming(nothing, before)
                    result.add_incoming(added, loop)
                tile.store(results, target, row)
            return context.get_dummy_value()

        arguments = (index, value, first, last, source, column, target, row)
        return types.void(*arguments), codegen

    return go_over_entries


_gather_tile, _gather_narrow_tile = (_entries(width, True) for width in (TILE, _NARROW_TILE))
_scatter_tile = _entries(SCATTERED_TILE, False)


@cached(error_model="numpy", nogil=True)
def sums_of_rows(first_tile, last_tile, first, last, starts, index, value, table, out):
    """Some tiles of columns and some rows of `out`: weighted sums of the table's rows.

    The sum of row `r` is over the entries from ``starts[r]`` to ``starts[r + 1]``, of which each
    adds the row ``index`` of the table, times ``value``. Columns lie together in memory.
    """
    n_columns = out.shape[1]
    for tile in range(first_tile, last_tile):
        column, end = tile * TILE, min(n_columns, (tile + 1) * TILE)
        width = TILE if end - column == TILE else _NARROW_TILE
        while column + width <= end:
            for row in range(first, last):
                start, stop = starts[row], starts[row + 1]
                if width == TILE:
                    _gather_tile(index, value, start, stop, table, column, out, row)
                else:
                    _gather_narrow_tile(index, value, start, stop, table, column, out, row)
            column += width
        if column == end:
            continue
        for row in range(first, last):
            for i in range(column, end):
                out[row, i] = 0
            for entry in range(starts[row], starts[row + 1]):
                at, weight = index[entry], value[entry]
                for i in range(column, end):
                    out[row, i] += weight * table[at, i]


@cached(error_model="numpy", nogil=True)
def sums_by_column(first_tile, last_tile, starts, index, value, table, out):
    """The same sums for some tiles of `SCATTERED_TILE` columns of `out`, row by row of the table.

    Entries from ``starts[r]`` to ``starts[r + 1]`` add row `r` of the table, times ``value``, to
    the row ``index`` of `out`. So a table beyond the cache is read once. Each sum takes its entries
    in the order of `r`. The number of columns is a multiple of the tile.
    """
    n_tiles, n_out = last_tile - first_tile, out.shape[0]
    # Rows of a tile lie together: far apart, they would meet in the same few lines of the cache.
    sums = np.zeros((n_tiles, n_out, SCATTERED_TILE), out.dtype)
    for row in range(starts.size - 1):
        for tile in range(n_tiles):
            column = (first_tile + tile) * SCATTERED_TILE
            _scatter_tile(
                index, value, starts[row], starts[row + 1], table, column, sums[tile], row
            )
    for tile in range(n_tiles):
        column = (first_tile + tile) * SCATTERED_TILE
        for row in range(n_out):
            for i in range(SCATTERED_TILE):
                out[row, column + i] = sums[tile, row, i]
