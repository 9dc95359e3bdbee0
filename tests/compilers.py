"""Functions that numba cannot compile."""

from numba import njit, types
from numba.extending import intrinsic


def not_compiled(error):
    """A function at whose compilation this error is raised, whatever it is given."""

    @intrinsic
    def fail(context):
        def codegen(*args):
            raise error

        return types.void(), codegen

    @njit
    def function(*args):
        fail()

    return function
