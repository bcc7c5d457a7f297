"""What compiled functions of this room share: numba's compiler, wide loads, a step of a hash.

Importing it fails where numba is missing. Does not: know what is read with it.
"""

import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

U = np.uint64
FACTOR = U(0x9E3779B97F4A7C15)  # 2**64 / golden ratio (Knuth, TAOCP 6.4)
SEED = U(secrets.randbits(64))
"""Of this process, so that nobody writes a file whose names collide; no output depends on it. An
argument of what is compiled, since numba would keep a global's value in its cache."""


def jit(function: Callable[..., Any]) -> Any:
    """Compiled at the first call, and kept beside the source or in the user's cache."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


def _load8_intrinsic(context: Any, array: Any, start: Any) -> Any:
    """Eight bytes of a uint8 array from `start` as one little-endian uint64, at any alignment."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())
        return builder.load(address, align=1)

    return types.uint64(array, types.int64), codegen


load8: Any = intrinsic(_load8_intrinsic)


@jit
def mix(code, word):  # type: ignore[no-untyped-def]
    code = (code ^ word) * FACTOR
    return code ^ (code >> U(29))
