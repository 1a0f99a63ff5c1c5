"""Matrix products of the tensor cores (wgmma): their result stays in registers and in flight.

An operand is in registers, or in shared memory as (chunks, rows, 64): columns in chunks of 64, one row of a chunk being
the 128 bytes that TMA swizzles. In this form a tile may have any number of rows, which lengths that are not multiples
of 8 need; plain `plgpu.wgmma` wants tiles of 8 rows.

A product is issued at once, as one commit group. Its result must not be read before `ready` has returned it.
"""

import functools
from collections.abc import Callable
from typing import TypeGuard

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, nvvm, vector

from pallas_flash.kernels.hopper.registers import ACC, CHUNKED, SWIZZLE_BYTES, TILE, Fragment, chunk_bytes
from pallas_flash.kernels.hopper.schedule import CHUNK
from pallas_flash.kernels.mosaic import interpret, ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as
from pallas_flash.kernels.mosaic.types import Ref

__all__ = ["STEP", "Steps", "accumulate", "awaited", "descriptors", "fence", "finish", "issue_steps",
           "multiply_transposed", "outer", "ready", "settled", "transposed_descriptors", "words"]

type Steps = list[tuple[list[ir.Value], ir.Value]]
"""Left and right operands of instructions, as `_wgmma` takes them."""

STEP = 16
"""Columns of a, or rows of b, that one instruction multiplies."""
_GROUP_BYTES = 8 * SWIZZLE_BYTES


def _is_in_memory(a: Fragment | Ref) -> TypeGuard[Ref]:
    """Whether an operand is (chunks, 64, 64) in shared memory, not (64, columns) in registers."""
    return len(a.shape) == 3


def _multiply_transposed_plain(a: Fragment | Ref, b_ref: Ref, d: int, start: Fragment | None = None) -> Fragment:
    del d  # the columns past it are zeros
    rows = a[...]
    if _is_in_memory(a):
        interpret.issue(a, b_ref)
        rows = jnp.swapaxes(rows, 0, 1).reshape(64, -1)
    else:
        interpret.issue(b_ref)
    columns = jnp.swapaxes(b_ref[...], 0, 1).reshape(b_ref.shape[1], -1)
    product = jnp.dot(rows, columns.T, preferred_element_type=jnp.float32)
    return product if start is None else start + product


@interpreted_as(_multiply_transposed_plain)
def multiply_transposed(a: Fragment | Ref, b_ref: Ref, d: int, start: Fragment | None = None) -> Fragment:
    """Issues a b^T, or start + a b^T: (64, n) float32, in flight.

    Args:
      a: (chunks, 64, 64) in shared memory; or (64, columns) in the layout TILE, of b's type.
      b_ref: (chunks, n, 64) in shared memory.
      d: the columns that count, rounded up to a multiple of 16; the rest of them must be zero.
      start: (64, n) float32 in the layout ACC, or None.
    """
    n, held = b_ref.shape[1], not _is_in_memory(a)

    @plgpu.inline_mgpu(
        arg_types=(TILE if held else plgpu.RefType(CHUNKED), plgpu.RefType(CHUNKED), *[ACC] * (start is not None)),
        return_type=plgpu.ShapeDtypeStruct((64, n), jnp.float32, ACC))
    def issue(_: mgpu.LaunchContext, a: mgpu.FragmentedArray | ir.Value, b: ir.Value,
              *start: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        a_at: Callable[[int], list[ir.Value]]
        if isinstance(a, mgpu.FragmentedArray):
            b_at = descriptors(b)
            a_at = functools.partial(words, fa.optimization_barrier(a))
        else:
            descriptor, b_at = descriptors(a), descriptors(b)
            a_at = lambda column: [descriptor(column)]
        nvvm.wgmma_fence_aligned()
        acc = [register for x in start for register in x.registers.flat]
        for column in range(0, d, STEP):
            acc = _wgmma(acc, a_at(column), b_at(column), n, _element(b), transposed=(0, 0))
        _commit()
        return _as_accumulator(acc, n)

    return issue(a, b_ref, *[start] * (start is not None))


def _accumulate_plain(acc: Fragment, p: Fragment, v_ref: Ref) -> Fragment:
    interpret.issue(v_ref)
    v = jnp.swapaxes(v_ref[...], 0, 1).reshape(p.shape[1], -1)[:, :acc.shape[1]]
    return acc + jnp.dot(p, v, preferred_element_type=jnp.float32)


@interpreted_as(_accumulate_plain)
def accumulate(acc: Fragment, p: Fragment, v_ref: Ref) -> Fragment:
    """Issues acc + p v: (64, columns) float32, in flight.

    Args:
      acc: (64, columns) float32 in the layout ACC; columns a multiple of 8, at most 256.
      p: (64, keys) of v's type in the layout TILE; keys a multiple of 16.
      v_ref: (chunks, keys, 64) in shared memory.
    """
    columns, keys = acc.shape[1], p.shape[1]

    @plgpu.inline_mgpu(arg_types=(ACC, TILE, plgpu.RefType(CHUNKED)),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, ACC))
    def issue(_: mgpu.LaunchContext, acc: mgpu.FragmentedArray, p: mgpu.FragmentedArray,
              v: ir.Value) -> mgpu.FragmentedArray:
        acc, p = fa.optimization_barrier(acc, p)
        b = _descriptor(v, leading_bytes=chunk_bytes(v))
        nvvm.wgmma_fence_aligned()
        registers = list(acc.registers.flat)
        for step in range(keys // STEP):
            own, rows = words(p, step * STEP), _advance(b, step * STEP * SWIZZLE_BYTES)
            registers = _wgmma(registers, own, rows, columns, _element(v), transposed=(0, 1))
        _commit()
        return _as_accumulator(registers, columns)

    return issue(acc, p, v_ref)


def _outer_plain(a_ref: Ref, b_ref: Ref, columns: int) -> Fragment:
    interpret.issue(a_ref, b_ref)
    b = jnp.swapaxes(b_ref[...], 0, 1).reshape(a_ref.shape[0], -1)[:, :columns]
    return jnp.dot(a_ref[...].T, b, preferred_element_type=jnp.float32)


@interpreted_as(_outer_plain)
def outer(a_ref: Ref, b_ref: Ref, columns: int) -> Fragment:
    """Issues a^T b: (64, columns) float32, in flight.

    Args:
      a_ref: (keys, 64) in shared memory, one chunk; keys a multiple of 16.
      b_ref: (chunks, keys, 64) in shared memory.
      columns: how many of b's columns count; a multiple of 8.
    """
    keys = a_ref.shape[0]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(CHUNKED), plgpu.RefType(CHUNKED)),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, ACC))
    def issue(_: mgpu.LaunchContext, a: ir.Value, b: ir.Value) -> mgpu.FragmentedArray:
        a_base, b_base = _descriptor(a), _descriptor(b, leading_bytes=chunk_bytes(b))
        nvvm.wgmma_fence_aligned()
        acc: list[ir.Value] = []
        for step in range(keys // STEP):
            offset = step * STEP * SWIZZLE_BYTES
            a_step, b_step = _advance(a_base, offset), _advance(b_base, offset)
            acc = _wgmma(acc, [a_step], b_step, columns, _element(b), transposed=(1, 1))
        _commit()
        return _as_accumulator(acc, columns)

    return issue(a_ref, b_ref)


def _ready_plain(x: Fragment, pending: int) -> Fragment:
    interpret.wait(pending)
    plgpu.commit_smem()  # plain reads stand for those of wgmma, which need no fence before TMA's next write
    return x


@interpreted_as(_ready_plain)
def ready(x: Fragment, pending: int) -> Fragment:
    """Returns x once at most `pending` products are in flight. The result of the wait depends on x, so no use of x
    moves above it.
    """
    @plgpu.inline_mgpu(arg_types=(ACC,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, ACC))
    def wait(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        return awaited(x, pending)

    return wait(x)


def _finish_plain(pending: int) -> None:
    interpret.wait(pending)
    plgpu.commit_smem()


@interpreted_as(_finish_plain)
def finish(pending: int) -> None:
    """Returns once at most `pending` products are in flight: what the others read may be written over. Their results
    are not to be read yet: that takes `ready`.
    """
    @plgpu.inline_mgpu()
    def wait(_: mgpu.LaunchContext) -> None:
        mgpu.utils.inline_ptx(f"wgmma.wait_group.sync.aligned {pending};", has_side_effects=True)

    wait()


@interpreted_as(lambda x: x)
def settled(x: Fragment) -> Fragment:
    """Returns x, (64, columns), in the layout ACC, each element in a register of its own from here on.

    Otherwise copies would be made right before the product that needs them, where ptxas first waits for those in flight
    (C7517).
    """
    x = plgpu.layout_cast(plgpu.layout_cast(x, TILE), ACC)
    @plgpu.inline_mgpu(arg_types=(ACC,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, ACC))
    def settle(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        return _as_accumulator(_tied(list(x.registers.flat), ""), x.shape[1])

    return settle(x)


@interpreted_as(lambda: None)
def fence() -> None:
    """Makes this thread's writes to shared memory visible to TMA and wgmma; a barrier must follow."""
    @plgpu.inline_mgpu()
    def emit(_: mgpu.LaunchContext) -> None:
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    emit()


def _element(ref: ir.Value) -> str:
    return str(ir.MemRefType(ref.type).element_type)


def descriptors(ref: ir.Value, opaque: bool = False) -> Callable[[int], ir.Value]:
    """The matrix descriptors of a (chunks, rows, 64) buffer, by their first column."""
    base, stride = _descriptor(ref), chunk_bytes(ref)
    if opaque:
        base = llvm.inline_asm(base.type, [base], "mov.b64 $0, $1;", "=l,l", has_side_effects=True)

    def at(first: int) -> ir.Value:
        chunk, column = divmod(first, CHUNK)
        return _advance(base, chunk * stride + 2 * column)

    return at


def transposed_descriptors(ref: ir.Value) -> Callable[[int, int], ir.Value]:
    """The matrix descriptors of a transposed (chunks, rows, 64) buffer, by their first chunk and row."""
    base, stride = _descriptor(ref, leading_bytes=chunk_bytes(ref)), chunk_bytes(ref)
    return lambda chunk, row: _advance(base, chunk * stride + row * SWIZZLE_BYTES)


def issue_steps(steps: Steps, columns: int, b: ir.Value,
                transposed: tuple[int, int], over: mgpu.FragmentedArray | None = None) -> mgpu.FragmentedArray:
    """Issues the sum of products of a step each, (64, columns), as one commit group.

    Args:
      steps: what `_wgmma` takes as a and b.
      b: the buffer, for its type.
      over: the registers in which the sum is made; what is in them does not count.
    """
    nvvm.wgmma_fence_aligned()
    acc: list[ir.Value] = [] if over is None else list(over.registers.flat)
    for i, (a_step, b_step) in enumerate(steps):
        acc = _wgmma(acc, a_step, b_step, columns, _element(b), transposed=transposed, adds=i > 0)
    _commit()
    return _as_accumulator(acc, columns)


def awaited(x: mgpu.FragmentedArray, pending: int) -> mgpu.FragmentedArray:
    """What `ready` does, of an array in the layout ACC."""
    registers = _tied(list(x.registers.flat), f"wgmma.wait_group.sync.aligned {pending};")
    return _as_accumulator(registers, x.shape[1])


def words(x: mgpu.FragmentedArray, first: int) -> list[ir.Value]:
    """16 columns of x, in the layout TILE and of a 16-bit type, as four 32-bit words of two elements."""
    pair = ir.VectorType.get((1,), ptx.i32())
    return [vector.extract(vector.bitcast(pair, register), [], [0])
            for register in x[:, first:first + STEP].registers.flat]


def _descriptor(ref: ir.Value, leading_bytes: int = 0) -> ir.Value:
    """The matrix descriptor of a (chunks, rows, 64) buffer; `leading_bytes` from chunk to chunk counts for a transposed
    operand.
    """
    return mma_utils.encode_descriptor(ref, leading_byte_offset=leading_bytes, stride_byte_offset=_GROUP_BYTES,
                                       swizzle=SWIZZLE_BYTES)


def _advance(descriptor: ir.Value, offset_bytes: int) -> ir.Value:
    i64 = ir.IntegerType.get_signless(64)
    return llvm.add(descriptor, llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, offset_bytes >> 4)).result,
                    overflow_flags=llvm.IntegerOverflowFlags.none)


def _commit() -> None:
    mgpu.utils.inline_ptx("wgmma.commit_group.sync.aligned;", has_side_effects=True)


def _wgmma(acc: list[ir.Value], a: list[ir.Value], b: ir.Value, n: int, element: str, *,
           transposed: tuple[int, int], adds: bool = True) -> list[ir.Value]:
    """Emits one m64 n k16 instruction: acc + a b, or a b where acc is empty or unless it `adds`.

    Args:
      a: a descriptor, or four words of registers.
      transposed: whether a and b are stored with their columns as rows; what a says counts in shared memory only.
    """
    count = n // 2
    vec = ir.VectorType.get((1,), ir.F32Type.get())
    numbers = iter(range(count + len(acc), count + len(acc) + len(a) + 1))
    a_text = f"${next(numbers)}" if len(a) == 1 else "{" + ",".join(f"${next(numbers)}" for _ in a) + "}"
    out = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    flags = ", ".join(str(flag) for flag in (transposed if len(a) == 1 else transposed[1:]))
    asm = (f"{{ .reg .pred p; setp.ne.b32 p, {int(bool(acc) and adds)}, 0; "
           f"wgmma.mma_async.sync.aligned.m64n{n}k{STEP}.f32.{element}.{element} {out}, {a_text}, "
           f"${next(numbers)}, p, 1, 1, {flags}; }}")
    kind_of_a = "l" if len(a) == 1 else "r"
    constraints = ",".join(["=f"] * count + [str(i) for i in range(len(acc))] + [kind_of_a] * len(a) + ["l"])
    result = llvm.inline_asm(llvm.StructType.get_literal([vec] * count), [*acc, *a, b], asm, constraints,
                             asm_dialect=0, has_side_effects=True)
    return [llvm.extractvalue(vec, result, [i]) for i in range(count)]


def _tied(registers: list[ir.Value], asm: str) -> list[ir.Value]:
    """Emits `asm` as a statement that reads and writes every register, and returns them."""
    count = len(registers)
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)])
    kind = registers[0].type
    result = llvm.inline_asm(llvm.StructType.get_literal([kind] * count), registers, asm, constraints, asm_dialect=0,
                             has_side_effects=True)
    return [llvm.extractvalue(kind, result, [i]) for i in range(count)]


def _as_accumulator(registers: list[ir.Value], columns: int) -> mgpu.FragmentedArray:
    layout = ACC.to_mgpu()
    array = np.array(registers, dtype=object).reshape(layout.registers_shape((64, columns)))
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=None)
