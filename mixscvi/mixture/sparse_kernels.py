"""Products of matrices that are mostly zero, compiled for the CPU by numba.

A row of the product is a weighted sum of rows of a table. A tile of its columns stays in vector
registers while the table's rows are added, which a loop over arrays would not be compiled to: the
sum is written in LLVM's own terms. Each row is summed by one thread, in the order of its non-zeros.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mixscvi.compiling import cached

__all__ = ["TILE", "find_nonzeros", "sort_by_column", "sums_of_rows"]

# Columns that are summed at once: eight vector registers of 64 bytes in single precision.
TILE = 128
_NARROW_TILE = 32
_VECTOR_BYTES = 64


@cached(error_model="numpy", nogil=True)
def find_nonzeros(x, starts, index, value):
    """Columns and values of what is not zero in `x`, by rows; whether there is room for all."""
    n, room = 0, index.size - 1
    for row in range(x.shape[0]):
        starts[row] = n
        if n > room - x.shape[1]:
            left = 0
            for column in range(x.shape[1]):
                left += 1 if x[row, column] != 0 else 0
            if n + left > room:
                return False
        for column in range(x.shape[1]):  # a zero is written over by what follows
            index[n] = column
            value[n] = x[row, column]
            n += 1 if x[row, column] != 0 else 0
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


def _sum_of(width):
    """A function that writes `width` columns of a weighted sum of rows."""

    @intrinsic
    def sum_of_rows(context, index, value, first, last, table, column, out, row):
        def codegen(context, builder, signature, arguments):
            index, value, first, last, table, column, out, row = arguments
            size = context.get_abi_sizeof(context.get_value_type(signature.args[4].dtype))
            lanes = min(width, _VECTOR_BYTES // size)
            vector = ir.VectorType(context.get_value_type(signature.args[4].dtype), lanes)
            integer, zero = ir.IntType(64), ir.Constant(ir.IntType(32), 0)

            def array(position, data):
                return context.make_array(signature.args[position])(context, builder, data)

            def vectors(data, at_row):
                """Pointers to the tile's columns in one row of an array."""
                stride = builder.extract_value(data.strides, 0)
                start = builder.add(
                    builder.mul(at_row, stride),
                    builder.mul(column, ir.Constant(integer, size)),
                )
                address = builder.add(builder.ptrtoint(data.data, integer), start)
                for vector_of in range(width // lanes):
                    offset = ir.Constant(integer, size * lanes * vector_of)
                    yield builder.inttoptr(builder.add(address, offset), vector.as_pointer())

            indices, values = array(0, index).data, array(1, value).data
            table, out = array(4, table), array(6, out)
            before = builder.block
            loop, after = builder.append_basic_block(), builder.append_basic_block()
            builder.cbranch(builder.icmp_signed("<", first, last), loop, after)

            builder.position_at_end(loop)
            entry = builder.phi(integer)
            sums = [builder.phi(vector) for _ in range(width // lanes)]
            at = builder.load(builder.gep(indices, [entry]))
            weight = builder.load(builder.gep(values, [entry]))
            weights = builder.insert_element(ir.Constant(vector, ir.Undefined), weight, zero)
            weights = builder.shuffle_vector(
                weights, weights, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            )
            contract = ("contract",)  # a multiplication and an addition may be one instruction
            new = [
                builder.fadd(
                    total,
                    builder.fmul(weights, builder.load(pointer, align=size), flags=contract),
                    flags=contract,
                )
                for total, pointer in zip(sums, vectors(table, at), strict=True)
            ]
            following = builder.add(entry, ir.Constant(integer, 1))
            builder.cbranch(builder.icmp_signed("<", following, last), loop, after)

            nothing = ir.Constant(vector, None)
            entry.add_incoming(first, before)
            entry.add_incoming(following, loop)
            for total, added in zip(sums, new, strict=True):
                total.add_incoming(nothing, before)
                total.add_incoming(added, loop)

            builder.position_at_end(after)
            results = [builder.phi(vector) for _ in new]
            for result, added in zip(results, new, strict=True):
                result.add_incoming(nothing, before)
                result.add_incoming(added, loop)
            for result, pointer in zip(results, vectors(out, row), strict=True):
                builder.store(result, pointer, align=size)
            return context.get_dummy_value()

        arguments = (index, value, first, last, table, column, out, row)
        return types.void(*arguments), codegen

    return sum_of_rows


_sum_of_tile, _sum_of_narrow_tile = _sum_of(TILE), _sum_of(_NARROW_TILE)


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
                    _sum_of_tile(index, value, start, stop, table, column, out, row)
                else:
                    _sum_of_narrow_tile(index, value, start, stop, table, column, out, row)
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
