"""The products and copies that only the backward needs, beside those of `products`: the same operands, the same rules.

Scores are transposed, keys along the rows, so that P^T and dS^T come out of one product as the register operand of the
next.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm

from pallas_flash.kernels.hopper import products
from pallas_flash.kernels.hopper.products import ACC, CHUNK, CHUNKED, TILE
from pallas_flash.kernels.mosaic import interpret
from pallas_flash.kernels.mosaic.interpret import interpreted_as

__all__ = ["add_to_global", "fence", "from_linear", "load_chunk", "outer", "scores", "spread_columns",
           "spread_rows", "store_linear", "store_zeros", "zeros"]

_K = 16
_ROW_BYTES = 128


def spread_columns(x: Any) -> Any:
    """(n,) in the layout COLUMNS -> a (64, n) accumulator whose every row is x."""
    return _settled(lax.broadcast_in_dim(x, (64, x.shape[0]), [1]))


def spread_rows(x: Any, columns: int) -> Any:
    """(64,) in the layout ROWS -> a (64, columns) accumulator whose every column is x."""
    return _settled(lax.broadcast_in_dim(x, (64, columns), [0]))


@interpreted_as(lambda x: x)
def _settled(x: Any) -> Any:
    """x in the layout ACC, each element in a register of its own from here on.

    Else the copies would be made right before the product that needs them, where ptxas first waits for those in flight
    (C7517).
    """
    x = plgpu.layout_cast(plgpu.layout_cast(x, TILE), ACC)

    @plgpu.inline_mgpu(arg_types=(ACC,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, ACC))
    def settle(_: Any, x: Any) -> Any:
        return products._as_accumulator(products._tied(list(x.registers.flat), ""), x.shape[1])

    return settle(x)


def zeros(columns: int) -> Any:
    """A (64, columns) accumulator of zeros, in registers from here on."""
    return _settled(jnp.zeros((64, columns), jnp.float32))


def _scores_plain(start: Any, a_ref: Any, b_ref: Any, d: int) -> Any:
    interpret.issue(a_ref, b_ref)
    return start + jnp.einsum("crd,cnd->rn", a_ref[...], b_ref[...], preferred_element_type=jnp.float32)


@interpreted_as(_scores_plain)
def scores(start: Any, a_ref: Any, b_ref: Any, d: int) -> Any:
    """Issues start + a b^T: (64, n) float32, in flight.

    Args:
      start: (64, n) float32 in the layout ACC.
      a_ref: (chunks, 64, 64) in shared memory.
      b_ref: (chunks, n, 64) in shared memory.
      d: the columns that count, rounded up to a multiple of 16; the rest of them must be zero.
    """
    n = b_ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(ACC, plgpu.RefType(CHUNKED), plgpu.RefType(CHUNKED)),
                       return_type=plgpu.ShapeDtypeStruct((64, n), jnp.float32, ACC))
    def issue(_: Any, start: Any, a: ir.Value, b: ir.Value) -> Any:
        a_base, b_base = products._descriptor(a), products._descriptor(b)
        a_stride, b_stride = products._chunk_bytes(a), products._chunk_bytes(b)
        nvvm.wgmma_fence_aligned()
        acc = list(start.registers.flat)
        for step in range(-(-d // _K)):
            chunk, column = divmod(step * _K, CHUNK)
            acc = products._wgmma(acc, [products._advance(a_base, chunk * a_stride + 2 * column)],
                                  products._advance(b_base, chunk * b_stride + 2 * column), n, products._element(b),
                                  transpose_b=False)
        products._commit()
        return products._as_accumulator(acc, n)

    return issue(start, a_ref, b_ref)


def _outer_plain(a_ref: Any, b_ref: Any, columns: int) -> Any:
    interpret.issue(a_ref, b_ref)
    b = jnp.swapaxes(b_ref[...], 0, 1).reshape(a_ref.shape[0], -1)[:, :columns]
    return jnp.dot(a_ref[...].T, b, preferred_element_type=jnp.float32)


@interpreted_as(_outer_plain)
def outer(a_ref: Any, b_ref: Any, columns: int) -> Any:
    """Issues a^T b: (64, columns) float32, in flight.

    Args:
      a_ref: (keys, 64) in shared memory, one chunk; keys a multiple of 16.
      b_ref: (chunks, keys, 64) in shared memory.
      columns: how many of b's columns count; a multiple of 8.
    """
    keys = a_ref.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(CHUNKED), plgpu.RefType(CHUNKED)),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, ACC))
    def issue(_: Any, a: ir.Value, b: ir.Value) -> Any:
        a_base = _transposed_descriptor(a)
        b_base = products._descriptor(b, leading_bytes=products._chunk_bytes(b))
        nvvm.wgmma_fence_aligned()
        acc: Any = None
        for step in range(keys // _K):
            offset = step * _K * _ROW_BYTES
            acc = _wgmma_transposed(acc, products._advance(a_base, offset), products._advance(b_base, offset), columns,
                                    products._element(b))
        products._commit()
        return products._as_accumulator(acc, columns)

    return issue(a_ref, b_ref)


@interpreted_as(lambda: None)
def fence() -> None:
    """Makes this thread's writes to shared memory visible to TMA and wgmma; a barrier must follow."""
    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    emit()


@interpreted_as(lambda ref: ref[...])
def load_chunk(ref: Any) -> Any:
    """(64, 64) of one chunk of shared memory, in the layout TILE, by ldmatrix."""
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(CHUNKED),),
                       return_type=plgpu.ShapeDtypeStruct((64, 64), ref.dtype, TILE))
    def load(_: Any, ref: ir.Value) -> Any:
        rows = mgpu.memref_unfold(mgpu.memref_unfold(ref, 0, (None, 8)), 2, (None, CHUNK))
        matrices = mgpu.memref_transpose(rows, (0, 2, 1, 3))
        return mgpu.FragmentedArray.load_tiled(matrices, swizzle=_ROW_BYTES, layout=TILE.to_mgpu())

    return load(ref)


def _linear_shape(columns: int) -> tuple[int, int]:
    return 64 * columns // 256, 256


def _store_linear_plain(x: Any, ref: Any) -> None:
    ref[...] = x.reshape(_linear_shape(x.shape[1]))


@interpreted_as(_store_linear_plain)
def store_linear(x: Any, ref: Any) -> None:
    """Writes x, (64, columns) float32 in the layout TILE, into ref, (columns / 4, 256), in the order of threads.

    Nothing moves between threads: each stores four of its own numbers at a time. `from_linear` reads that order back.
    """
    shape = _linear_shape(x.shape[1])
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=4)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout))
    def reinterpret(_: Any, x: Any) -> Any:
        registers = list(x.registers.flat)
        pairs = [mgpu.utils.vector_concat([a, b]) for a, b in zip(registers[::2], registers[1::2])]
        return mgpu.FragmentedArray(_registers=np.array(pairs, dtype=object), _layout=layout.to_mgpu(), _is_signed=None)

    ref[...] = reinterpret(x)


@interpreted_as(lambda ref, columns: ref[...].reshape(64, columns))
def from_linear(ref: Any, columns: int) -> Any:
    """(columns / 4, 256) float32 in global memory, as `store_linear` orders it -> (64, columns) in the layout TILE."""
    shape = _linear_shape(columns)
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=4)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, TILE))
    def reinterpret(_: Any, x: Any) -> Any:
        pairs = [mgpu.utils.vector_slice(register, slice(i, i + 2)) for register in x.registers.flat for i in (0, 2)]
        tile = TILE.to_mgpu()
        registers = np.array(pairs, dtype=object).reshape(tile.registers_shape((64, columns)))
        return mgpu.FragmentedArray(_registers=registers, _layout=tile, _is_signed=None)

    return reinterpret(plgpu.load(ref, layout=layout, optimized=False))


def _store_zeros_plain(ref: Any) -> None:
    ref[...] = jnp.zeros(ref.shape, jnp.float32)


@interpreted_as(_store_zeros_plain)
def store_zeros(ref: Any) -> None:
    """Writes zeros into a float32 buffer of global memory, sixteen bytes at a time."""
    layout = plgpu.Layout.WG_STRIDED(ref.shape, vec_size=4)
    ref[...] = plgpu.layout_cast(jnp.zeros(ref.shape, jnp.float32), layout)


def _add_to_global_plain(source: Any, target: Any, first: Any = None) -> None:
    target[...] = source[...] + (target[...] if first is None else jnp.where(first, 0.0, target[...]))


@interpreted_as(_add_to_global_plain)
def add_to_global(source: Any, target: Any, first: Any = None) -> None:
    """Starts to add a float32 buffer of shared memory to global memory, or to write it there if it is the first;
    `plgpu.wait_smem_to_gmem` waits for it.
    """
    add = functools.partial(plgpu.copy_smem_to_gmem, source, target, reduction_op="add")
    if first is None:
        add()
    else:
        lax.cond(first, lambda: plgpu.copy_smem_to_gmem(source, target), add)


def _transposed_descriptor(ref: ir.Value) -> ir.Value:
    """The matrix descriptor of one (keys, 64) chunk, read with its columns as rows."""
    return mma_utils.encode_descriptor(ref, leading_byte_offset=0, stride_byte_offset=8 * _ROW_BYTES,
                                       swizzle=_ROW_BYTES)


def _wgmma_transposed(acc: list[ir.Value] | None, a: ir.Value, b: ir.Value, n: int, element: str) -> list[ir.Value]:
    """One m64 n k16 instruction with both operands in shared memory, both transposed: acc + a b, or a b."""
    count = n // 2
    vec = ir.VectorType.get((1,), ir.F32Type.get())
    tied = [] if acc is None else acc
    out = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    first = count + len(tied)
    asm = (f"{{ .reg .pred p; setp.ne.b32 p, {int(acc is not None)}, 0; wgmma.mma_async.sync.aligned.m64n{n}k{_K}.f32."
           f"{element}.{element} {out}, ${first}, ${first + 1}, p, 1, 1, 1, 1; }}")
    constraints = ",".join(["=f"] * count + [str(i) for i in range(len(tied))] + ["l", "l"])
    result = llvm.inline_asm(llvm.StructType.get_literal([vec] * count), [*tied, a, b], asm, constraints, asm_dialect=0,
                             has_side_effects=True)
    return [llvm.extractvalue(vec, result, [i]) for i in range(count)]
