"""Places of numbers that are not zero, found many at a time in functions that numba compiles."""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["SLACK", "places_above", "places_other_than"]

_LANES = 16
_AT_ONCE = 4

# Places that are written beyond those found, and overwritten by the next ones.
SLACK = _AT_ONCE


def _which(predicate):
    """A function for which of the numbers from a position on compare like that to a threshold.

    The result has a bit for each number, the first one's is the lowest.
    """

    @intrinsic
    def which(context, numbers, position, threshold):
        def codegen(context, builder, signature, arguments):
            numbers, position, threshold = arguments
            array = context.make_array(signature.args[0])(context, builder, numbers)
            kind = context.get_value_type(signature.args[0].dtype)
            vector, bits = ir.VectorType(kind, _LANES), ir.IntType(_LANES)
            start = builder.bitcast(builder.gep(array.data, [position]), vector.as_pointer())
            values = builder.load(start, align=context.get_abi_sizeof(kind))
            one = builder.insert_element(
                ir.Constant(vector, ir.Undefined), threshold, ir.Constant(ir.IntType(32), 0)
            )
            indices = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), None)
            thresholds = builder.shuffle_vector(one, one, indices)
            found = builder.fcmp_unordered(predicate, values, thresholds)
            return builder.zext(builder.bitcast(found, bits), ir.IntType(64))

        return types.int64(numbers, types.int64, numbers.dtype), codegen

    return which


@intrinsic
def _lowest(context, bits):
    """Number of the lowest bit that is set, 64 if none is."""

    def codegen(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.int64), codegen


@intrinsic
def _n_set(context, bits):
    def codegen(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(types.int64), codegen


def _finder(which, is_one):
    @njit(error_model="numpy", forceinline=True)
    def places(numbers, threshold, index, n, most):
        whole = numbers.size - numbers.size % _LANES
        for start in range(0, whole, _LANES):
            bits = which(numbers, start, threshold)
            left = _n_set(bits)
            if n + left > most:
                return -1
            while left > 0:
                # No branch for each of them: how many there are cannot be predicted.
                for i in range(_AT_ONCE):
                    index[n + i] = start + _lowest(bits)
                    bits &= bits - 1
                n += min(left, _AT_ONCE)
                left -= _AT_ONCE
        for place in range(whole, numbers.size):
            if is_one(numbers[place], threshold):
                if n == most:
                    return -1
                index[n] = place
                n += 1
        return n

    return places


@njit(forceinline=True)
def _is_above(number, threshold):
    return not number <= threshold


@njit(forceinline=True)
def _is_other(number, threshold):
    return number != threshold


# Called with numbers `(n,)`, a threshold of their type, where to write to, how many places have
# been written there, and how many there may be. They give how many there are then, or -1 if there
# are more. Not-a-number is found. The array to write to has room for `SLACK` more.
places_above = _finder(_which(">"), _is_above)
places_other_than = _finder(_which("!="), _is_other)
