"""exp2 of a tile, by two units of an SM side by side: the special function unit takes 8 clocks for 32 of them, four or
more times what an instruction of the FMA unit takes, and products wait for it.

A share of every tile's columns is computed by a polynomial instead (as FlashAttention-4 does, Shah et al., 2025):
2^x = 2^n 2^f, where n is the nearest integer and f in [-1/2, 1/2]; the polynomial is a minimax fit of degree 5, whose
relative error, 2.4e-7 with rounding, is that of ex2.approx (2^-22). 0 below 2^-126; NaN stays NaN.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_flash.kernels.ampere.registers import TILE, Fragment
from pallas_flash.kernels.mosaic.fragments import concatenate
from pallas_flash.kernels.mosaic.interpret import interpreted_as

__all__ = ["exp2"]

_GROUP = 8
"""Columns that are computed alike: those of which a thread has two."""

_COEFFICIENTS = (1.0000001192092896, 0.6931469440460205, 0.24022120237350464, 0.05550713092088699,
                 0.009675540961325169, 0.001327647129073739)
"""Of f^0, f^1, ..."""
_SHIFT = 3 << 22
"""Added to a float32 number of at most 2^22, it leaves the nearest integer in the last bits."""
_BIAS = 127


def exp2(x: Fragment, polynomial: int) -> Fragment:
    """2^x, of which `polynomial` of every eight groups of eight columns are computed by the polynomial; x below 128.

    Args:
      x: (64, n) float32 in the layout TILE.
    """
    count = x.shape[1] // _GROUP
    chosen = [(i + 1) * polynomial // 8 > i * polynomial // 8 for i in range(count)]
    if not any(chosen):
        return jnp.exp2(x)
    columns = lambda i: x[:, _GROUP * i:_GROUP * (i + 1)]
    return concatenate([_polynomial(columns(i)) if chosen[i] else jnp.exp2(columns(i)) for i in range(count)])


def _polynomial_plain(x: Fragment) -> Fragment:
    x = jnp.maximum(x, -127.0)
    n = jnp.round(x)
    p = jnp.full_like(x, _COEFFICIENTS[-1])
    for coefficient in _COEFFICIENTS[-2::-1]:
        p = p * (x - n) + coefficient
    return jnp.where(n <= -_BIAS, 0.0, jnp.ldexp(p, n.astype(jnp.int32)))


def _literal(x: float) -> str:
    return f"0f{np.float32(x).view(np.uint32):08X}"


def _text() -> str:
    """PTX for one number. The integer comes with its bias, so that its last bits are the exponent of 2^n."""
    shift, (highest, *others) = _literal(_SHIFT + _BIAS), map(_literal, reversed(_COEFFICIENTS))
    steps = "".join(f"fma.rn.f32 p, p, f, {coefficient}; " for coefficient in others)
    return ("{ .reg .f32 x, z, f, p; .reg .b32 b; "
            f"max.NaN.f32 x, $1, {_literal(-127.0)}; add.rn.f32 z, x, {shift}; sub.rn.f32 f, z, {shift}; "
            f"sub.rn.f32 f, x, f; mov.f32 p, {highest}; {steps}"
            "mov.b32 b, z; shl.b32 b, b, 23; mov.b32 z, b; mul.rn.f32 $0, p, z; }")


@interpreted_as(_polynomial_plain)
def _polynomial(x: Fragment) -> Fragment:
    text = _text()

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, TILE))
    def make(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        f32 = ir.F32Type.get()
        registers = np.empty_like(x.registers)
        for i, register in np.ndenumerate(x.registers):
            made = [llvm.inline_asm(f32, [vector.extract(register, [], [e])], text, "=f,f", has_side_effects=False)
                    for e in (0, 1)]
            registers[i] = vector.from_elements(ir.VectorType.get((2,), f32), made)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return make(x)
