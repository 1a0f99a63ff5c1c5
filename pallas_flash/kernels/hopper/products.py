"""Tensor core products whose result stays in registers and in flight, on operands as TMA leaves them.

Operands in shared memory are stored as (chunks, rows, 64): columns in chunks of 64, one row of a chunk being the 128
bytes that TMA swizzles. So a tile of any number of rows and of any width is loaded without a word about tiles of 8
rows: Pallas' own tiling cannot express lengths that are not multiples of 8. Plain `plgpu.wgmma` does not take that
form, hence this file.

A product is issued at once, as one commit group, and its result must not be read before `ready` has returned it.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from pallas_flash.kernels.mosaic import interpret, ptx
from pallas_flash.kernels.mosaic.interpret import interpreted_as

__all__ = [
    "ACC", "CHUNK", "CHUNKED", "COLUMNS", "ROWS", "TILE", "accumulate", "beside", "load_chunks", "load_row",
    "load_row_stats", "positions", "ready", "scores", "store_chunks", "store_row_stats", "zeros",
]

CHUNK = 64
"""Columns of a chunk: 128 bytes of a 16-bit type, the widest swizzle."""

CHUNKED = (plgpu.SwizzleTransform(128),)  # type: ignore[abstract]
"""Transforms of a buffer of shape (..., chunks, rows, 64)."""

ACC = plgpu.Layout._WGMMA_ACC_32BIT  # (one 32-bit register an element, as wgmma wants accumulators)
TILE = plgpu.Layout.WGMMA
ROWS = plgpu.Layout.WGMMA.reduce(1)
COLUMNS = plgpu.Layout.WGMMA.reduce(0)

_K = 16
_ROW_BYTES = 128
_GROUP_BYTES = 8 * _ROW_BYTES


def _scores_plain(q_ref: Any, k_ref: Any, d: int) -> Any:
    if len(q_ref.shape) == 2:
        interpret.issue(k_ref)
        k = jnp.swapaxes(k_ref[...], 0, 1).reshape(k_ref.shape[1], -1)
        return jnp.dot(q_ref, k.T, preferred_element_type=jnp.float32)
    interpret.issue(q_ref, k_ref)
    return jnp.einsum("crd,ckd->rk", q_ref[...], k_ref[...], preferred_element_type=jnp.float32)


@interpreted_as(_scores_plain)
def scores(q_ref: Any, k_ref: Any, d: int) -> Any:
    """Issues q k^T: (64, keys) float32, in flight.

    Args:
      q_ref: (chunks, 64, 64) in shared memory; or (64, columns) in the layout TILE, of k's type.
      k_ref: (chunks, keys, 64) in shared memory.
      d: the columns that count, rounded up to a multiple of 16; the rest of them must be zero.
    """
    keys = k_ref.shape[1]
    if len(q_ref.shape) == 2:
        return _scores_held(q_ref, k_ref, d)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(CHUNKED),) * 2,
                       return_type=plgpu.ShapeDtypeStruct((64, keys), jnp.float32, ACC))
    def issue(_: Any, q: ir.Value, k: ir.Value) -> Any:
        a, b = _descriptor(q), _descriptor(k)
        a_stride, b_stride = _chunk_bytes(q), _chunk_bytes(k)
        nvvm.wgmma_fence_aligned()
        acc: list[ir.Value] = []
        for step in range(-(-d // _K)):
            chunk, column = divmod(step * _K, CHUNK)
            acc = _wgmma(acc, [_advance(a, chunk * a_stride + 2 * column)], _advance(b, chunk * b_stride + 2 * column),
                         keys, _element(q), transpose_b=False)
        _commit()
        return _as_accumulator(acc, keys)

    return issue(q_ref, k_ref)


def _scores_held(q: Any, k_ref: Any, d: int) -> Any:
    keys = k_ref.shape[1]

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(CHUNKED)),
                       return_type=plgpu.ShapeDtypeStruct((64, keys), jnp.float32, ACC))
    def issue(_: Any, q: Any, k: ir.Value) -> Any:
        b, b_stride, q = _descriptor(k), _chunk_bytes(k), fa.optimization_barrier(q)
        nvvm.wgmma_fence_aligned()
        acc: list[ir.Value] = []
        for step in range(-(-d // _K)):
            chunk, column = divmod(step * _K, CHUNK)
            a = [_word(r) for r in q[:, step * _K:(step + 1) * _K].registers.flat]
            b_step = _advance(b, chunk * b_stride + 2 * column)
            acc = _wgmma(acc, a, b_step, keys, _element(k), transpose_b=False)
        _commit()
        return _as_accumulator(acc, keys)

    return issue(q, k_ref)


def _accumulate_plain(acc: Any, p: Any, v_ref: Any) -> Any:
    interpret.issue(v_ref)
    v = jnp.swapaxes(v_ref[...], 0, 1).reshape(p.shape[1], -1)[:, :acc.shape[1]]
    return acc + jnp.dot(p, v, preferred_element_type=jnp.float32)


@interpreted_as(_accumulate_plain)
def accumulate(acc: Any, p: Any, v_ref: Any) -> Any:
    """Issues acc + p v: (64, columns) float32, in flight.

    Args:
      acc: (64, columns) float32 in the layout ACC; columns a multiple of 8, at most 256.
      p: (64, keys) of v's type in the layout TILE; keys a multiple of 16.
      v_ref: (chunks, keys, 64) in shared memory.
    """
    columns, keys = acc.shape[1], p.shape[1]

    @plgpu.inline_mgpu(arg_types=(ACC, TILE, plgpu.RefType(CHUNKED)),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, ACC))
    def issue(_: Any, acc: Any, p: Any, v: ir.Value) -> Any:
        acc, p = fa.optimization_barrier(acc, p)
        b = _descriptor(v, leading_bytes=_chunk_bytes(v))
        nvvm.wgmma_fence_aligned()
        registers = list(acc.registers.flat)
        for step in range(keys // _K):
            a = [_word(r) for r in p[:, step * _K:(step + 1) * _K].registers.flat]
            rows = _advance(b, step * _K * _ROW_BYTES)
            registers = _wgmma(registers, a, rows, columns, _element(v), transpose_b=True)
        _commit()
        return _as_accumulator(registers, columns)

    return issue(acc, p, v_ref)


def _ready_plain(x: Any, pending: int) -> Any:
    interpret.wait(pending)
    plgpu.commit_smem()  # plain reads stand for those of wgmma, which need no fence before TMA's next write
    return x


@interpreted_as(_ready_plain)
def ready(x: Any, pending: int) -> Any:
    """x, once at most `pending` products are in flight. The result of the wait depends on x, so no use of x moves above
    it.
    """
    @plgpu.inline_mgpu(arg_types=(ACC,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, ACC))
    def wait(_: Any, x: Any) -> Any:
        registers = _tied(list(x.registers.flat), f"wgmma.wait_group.sync.aligned {pending};")
        return _as_accumulator(registers, x.shape[1])

    return wait(x)


@interpreted_as(lambda columns, axis, first: first + lax.broadcasted_iota(jnp.int32, (64, columns), axis))
def positions(columns: int, axis: int, first: Any) -> Any:
    """(64, columns) int32 in the layout TILE: first + the index along `axis`; made where it is used, from one register
    a row.

    `plgpu.broadcasted_iota` would do, but its values do not change in a loop, and LLVM keeps (and spills) all of them.
    """
    @plgpu.inline_mgpu(arg_types=(ptx.SCALAR,), return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.int32, TILE))
    def make(_: Any, first: Any) -> Any:
        i32, pair = ptx.i32(), ir.VectorType.get((2,), ptx.i32())
        const = lambda value: mgpu.utils.c(value, i32)
        thread = arith.remui(mgpu.utils.thread_idx(), const(ptx.WARPGROUP))
        lane = arith.remui(thread, const(32))
        # registers (column / 8, row / 8 % 2): rows 16 warp + 8 i + lane / 4, columns 8 j + 2 (lane % 4) + 0, 1
        own = (arith.addi(arith.muli(arith.divui(thread, const(32)), const(16)), arith.divui(lane, const(4))),
               arith.muli(arith.remui(lane, const(4)), const(2)))[axis]
        base = ptx.moved(arith.addi(first.registers.item(), own))
        layout = TILE.to_mgpu()
        registers = np.empty(layout.registers_shape((64, columns)), dtype=object)
        flat = registers.reshape(columns // 8, 2)
        for j, i in np.ndindex(flat.shape):
            values = [arith.addi(base, const(8 * i if axis == 0 else 8 * j + e)) for e in (0, 1)]
            flat[j, i] = vector.from_elements(pair, values)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)

    return make(ptx.scalar(first))


def zeros(columns: int) -> Any:
    """A (64, columns) accumulator of zeros."""
    return plgpu.layout_cast(jnp.zeros((64, columns), jnp.float32), ACC)


def _store_chunks_plain(x: Any, ref: Any) -> None:
    padded = jnp.pad(x, ((0, 0), (0, ref.shape[0] * CHUNK - x.shape[1])))
    ref[...] = jnp.swapaxes(padded.reshape(64, ref.shape[0], CHUNK), 0, 1)


@interpreted_as(_store_chunks_plain)
def store_chunks(x: Any, ref: Any) -> None:
    """Writes x, (64, columns) in the layout TILE, into ref, (chunks, 64, 64) in shared memory; columns past x hold
    anything.
    """
    columns = x.shape[1]
    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType(CHUNKED)))
    def store(_: Any, x: Any, ref: ir.Value) -> None:
        for chunk in range(-(-columns // CHUNK)):
            part = _padded(x[:, chunk * CHUNK:min((chunk + 1) * CHUNK, columns)])
            part.store_tiled(_core_matrices(ref, chunk), swizzle=_ROW_BYTES)

    store(x, ref)


def _load_chunks_plain(ref: Any, first: int, columns: int, dtype: Any) -> Any:
    del dtype
    return jnp.swapaxes(ref[...], 0, 1).reshape(64, -1)[:, first:first + columns]


@interpreted_as(_load_chunks_plain)
def load_chunks(ref: Any, first: int, columns: int, dtype: Any) -> Any:
    """Columns from `first` on of ref, (chunks, 64, 64) in shared memory, as (64, columns) in the layout TILE; both
    multiples of 8.
    """
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(CHUNKED),),
                       return_type=plgpu.ShapeDtypeStruct((64, columns), dtype, TILE))
    def load(_: Any, ref: ir.Value) -> Any:
        i32, pair = ptx.i32(), ir.VectorType.get((2,), ir.MemRefType(ref.type).element_type)
        const = lambda value: mgpu.utils.c(value, i32)
        warp, row, quarter = _place()
        start = arith.addi(arith.muli(warp, const(16 * CHUNK)), arith.addi(
            arith.muli(row, const(CHUNK)), arith.muli(quarter, const(2))))
        layout = TILE.to_mgpu()
        registers = np.empty(layout.registers_shape((64, columns)), dtype=object)
        flat = registers.reshape(columns // 8, 2)
        for j, i in np.ndindex(flat.shape):
            chunk, column = divmod(first + 8 * j, CHUNK)
            swizzled = arith.muli(arith.xori(row, const(column // 8)), const(8))
            index = arith.addi(arith.addi(start, swizzled), const(chunk * _chunk_bytes(ref) // 2 + 8 * i * CHUNK))
            flat[j, i] = llvm.load(pair, mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index],
                                                                 pair.element_type))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref)


@interpreted_as(lambda parts: jnp.concatenate(parts, axis=1))
def beside(parts: list[Any]) -> Any:
    """Arrays (64, n) of one dtype in the layout TILE, side by side."""
    if len(parts) == 1:
        return parts[0]
    shape = (64, sum(part.shape[1] for part in parts))

    @plgpu.inline_mgpu(arg_types=(TILE,) * len(parts),
                       return_type=plgpu.ShapeDtypeStruct(shape, parts[0].dtype, TILE))
    def join(_: Any, *parts: Any) -> Any:
        registers = np.concatenate([part.registers for part in parts], axis=1)
        return mgpu.FragmentedArray(_registers=registers, _layout=parts[0].layout, _is_signed=parts[0].is_signed)

    return join(*parts)


@interpreted_as(lambda ref, place, first, columns: ref[*place, pl.ds(first, columns)])
def load_row(ref: Any, place: tuple[Any, Any, Any], first: Any, columns: int) -> Any:
    """ref[place][first:first + columns] in the layout COLUMNS, from an array of four axes in global memory; both
    multiples of 8.
    """
    dtype, (_, second, third, width) = ref.dtype, ref.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(ptx.SCALAR,) * 4),
                       return_type=plgpu.ShapeDtypeStruct((columns,), dtype, COLUMNS))
    def load(_: Any, ref: ir.Value, *place: Any) -> Any:
        i32, i64 = ptx.i32(), ir.IntegerType.get_signless(64)
        a, b, c, first = (arith.extui(i64, index.registers.item()) for index in place)
        times = lambda x, n: arith.muli(x, mgpu.utils.c(n, i64))
        row = arith.addi(times(arith.addi(times(arith.addi(times(a, second), b), third), c), width), first)
        *_, quarter = _place()  # columns 8 j + 2 quarter + 0, 1
        row = arith.addi(row, arith.extui(i64, arith.muli(quarter, mgpu.utils.c(2, i32))))
        element = ir.MemRefType(ref.type).element_type
        layout = COLUMNS.to_mgpu()
        registers = np.empty(layout.registers_shape((columns,)), dtype=object)
        for j in range(columns // 8):
            index = arith.addi(row, mgpu.utils.c(8 * j, i64))
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], element)
            registers.reshape(-1)[j] = llvm.load(ir.VectorType.get((2,), element), address)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref, *map(ptx.scalar, (*place, first)))


def _load_row_stats_plain(ref: Any, row: Any, first: Any, length: int, otherwise: float) -> Any:
    place = _unravelled(row, ref.shape[:-1])
    at = lambda i: jnp.where(first + i < length, ref[*place, jnp.minimum(first + i, length - 1)], otherwise)
    return jnp.stack([at(i) for i in range(64)])


@interpreted_as(_load_row_stats_plain)
def load_row_stats(ref: Any, row: Any, first: Any, length: int, otherwise: float) -> Any:
    """ref[row, first + i] for the rows i that lie below `length`, and `otherwise` for those past it: (64,) float32 in
    the layout ROWS.

    Args:
      ref: (rows, length) float32 in global memory, in any shape that flattens to it.
      row, first: int32 scalars.
    """
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR, ptx.SCALAR),
                       return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, ROWS))
    def load(_: Any, ref: ir.Value, row: Any, first: Any) -> Any:
        layout, f32 = ROWS.to_mgpu(), ir.F32Type.get()
        registers = np.empty(layout.registers_shape((64,)), dtype=object)
        missing = mgpu.utils.c(otherwise, f32)
        for i, (index, inside, _) in enumerate(_row_places(row.registers.item(), first.registers.item(), length,
                                                           registers.size)):
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], f32)
            flag = arith.extui(ptx.i32(), inside)
            asm = "{ .reg .pred p; setp.ne.u32 p, $2, 0; mov.f32 $0, $3; @p ld.global.f32 $0, [$1]; }"
            value = llvm.inline_asm(f32, [address, flag, missing], asm, "=&f,l,r,f", has_side_effects=True)
            registers.reshape(-1)[i] = vector.from_elements(ir.VectorType.get((1,), f32), [value])
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref, ptx.scalar(row), ptx.scalar(first))


def _row_places(row: ir.Value, first: ir.Value, length: int, count: int) -> Any:
    """For each register of the layout ROWS: its index in (rows, length), whether it lies below `length`, and whether
    this thread is the first of the four that hold it.
    """
    i32, i64 = ptx.i32(), ir.IntegerType.get_signless(64)
    const = lambda value: mgpu.utils.c(value, i32)
    thread = arith.remui(mgpu.utils.thread_idx(), const(ptx.WARPGROUP))
    lane, warp = arith.remui(thread, const(32)), arith.divui(thread, const(32))
    leads = arith.cmpi(arith.CmpIPredicate.eq, arith.remui(lane, const(4)), const(0))
    base = arith.muli(arith.extui(i64, row), mgpu.utils.c(length, i64))
    for i in range(count):  # rows 16 warp + 8 i + lane / 4, each in four lanes
        local = arith.addi(arith.addi(arith.muli(warp, const(16)), const(8 * i)), arith.divui(lane, const(4)))
        position = arith.addi(first, local)
        inside = arith.cmpi(arith.CmpIPredicate.slt, position, const(length))
        yield arith.addi(base, arith.extui(i64, position)), inside, leads


def _unravelled(row: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """The indices of a flat row number in `shape`."""
    places: list[Any] = []
    for size in reversed(shape[1:]):
        places.insert(0, lax.rem(row, size))
        row = lax.div(row, size)
    return row, *places


def _store_row_stats_plain(x: Any, ref: Any, row: Any, first: Any, length: int) -> None:
    place = _unravelled(row, ref.shape[:-1])

    def write(i: Any, _: None) -> None:
        @pl.when(first + i < length)
        def inside() -> None:
            ref[*place, first + i] = lax.dynamic_index_in_dim(x, i, keepdims=False)

    lax.fori_loop(0, x.shape[0], write, None)


@interpreted_as(_store_row_stats_plain)
def store_row_stats(x: Any, ref: Any, row: Any, first: Any, length: int) -> None:
    """ref[row, first + i] = x[i] for the rows i that lie below `length`; straight from registers, as TMA wants 16-byte
    strides.

    Args:
      x: (64,) float32 in the layout ROWS.
      ref: (rows, length) float32 in global memory, in any shape that flattens to it.
      row, first: int32 scalars.
    """
    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def store(_: Any, x: Any, ref: ir.Value, row: Any, first: Any) -> None:
        registers = list(x.registers.flat)
        places = _row_places(row.registers.item(), first.registers.item(), length, len(registers))
        for register, (index, inside, leads) in zip(registers, places):
            address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], ir.F32Type.get())
            mgpu.utils.inline_ptx("st.global.f32 [$0], $1;", address, vector.extract(register, [], [0]),
                                  predicate=arith.andi(leads, inside), has_side_effects=True)

    store(x, ref, ptx.scalar(row), ptx.scalar(first))


def _place() -> tuple[ir.Value, ir.Value, ir.Value]:
    """Warp, row and quarter of a row of this thread in an 8-row group of the layout TILE; made where they are used, or
    LLVM would keep what follows from them through every loop.
    """
    const = lambda value: mgpu.utils.c(value, ptx.i32())
    thread = arith.remui(ptx.moved(mgpu.utils.thread_idx()), const(ptx.WARPGROUP))
    lane = arith.remui(thread, const(32))
    return arith.divui(thread, const(32)), arith.divui(lane, const(4)), arith.remui(lane, const(4))


def _core_matrices(ref: ir.Value, chunk: int) -> ir.Value:
    """A chunk of a (chunks, rows, 64) buffer, as Mosaic's tiled loads and stores want it."""
    rows = mgpu.memref_unfold(mgpu.memref_slice(ref, chunk), 0, (None, 8))  # (rows / 8, 8, 64)
    return mgpu.memref_transpose(mgpu.memref_unfold(rows, 2, (None, CHUNK)), (0, 2, 1, 3))


def _element(ref: ir.Value) -> str:
    return str(ir.MemRefType(ref.type).element_type)


def _chunk_bytes(ref: ir.Value) -> int:
    """Bytes from one chunk of columns to the next."""
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    return 2 * strides[0]


def _descriptor(ref: ir.Value, leading_bytes: int = 0) -> ir.Value:
    """The matrix descriptor of a (chunks, rows, 64) buffer; `leading_bytes` from chunk to chunk counts for a transposed
    operand.
    """
    return mma_utils.encode_descriptor(ref, leading_byte_offset=leading_bytes, stride_byte_offset=_GROUP_BYTES,
                                       swizzle=_ROW_BYTES)


def _advance(descriptor: ir.Value, offset_bytes: int) -> ir.Value:
    i64 = ir.IntegerType.get_signless(64)
    return llvm.add(descriptor, llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, offset_bytes >> 4)).result,
                    overflow_flags=llvm.IntegerOverflowFlags.none)


def _word(register: ir.Value) -> ir.Value:
    """Two 16-bit elements as one 32-bit word."""
    return vector.extract(vector.bitcast(ir.VectorType.get((1,), ptx.i32()), register), [], [0])


def _commit() -> None:
    mgpu.utils.inline_ptx("wgmma.commit_group.sync.aligned;", has_side_effects=True)


def _wgmma(acc: list[ir.Value], a: list[ir.Value], b: ir.Value, n: int, element: str, *,
           transpose_b: bool) -> list[ir.Value]:
    """One m64 n k16 instruction: acc + a b, or a b where acc is empty. `a` is a descriptor or four words of
    registers.
    """
    count = n // 2
    vec = ir.VectorType.get((1,), ir.F32Type.get())
    numbers = iter(range(count + len(acc), count + len(acc) + len(a) + 1))
    a_text = f"${next(numbers)}" if len(a) == 1 else "{" + ",".join(f"${next(numbers)}" for _ in a) + "}"
    out = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    tail = f"p, 1, 1, {'0, ' if len(a) == 1 else ''}{int(transpose_b)}"
    asm = (f"{{ .reg .pred p; setp.ne.b32 p, {int(bool(acc))}, 0; wgmma.mma_async.sync.aligned.m64n{n}k{_K}.f32."
           f"{element}.{element} {out}, {a_text}, ${next(numbers)}, {tail}; }}")
    kind_of_a = "l" if len(a) == 1 else "r"
    constraints = ",".join(["=f"] * count + [str(i) for i in range(len(acc))] + [kind_of_a] * len(a) + ["l"])
    result = llvm.inline_asm(llvm.StructType.get_literal([vec] * count), [*acc, *a, b], asm, constraints,
                             asm_dialect=0, has_side_effects=True)
    return [llvm.extractvalue(vec, result, [i]) for i in range(count)]


def _tied(registers: list[ir.Value], asm: str) -> list[ir.Value]:
    """`asm` as a statement that reads and writes every register."""
    count = len(registers)
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)])
    kind = registers[0].type
    result = llvm.inline_asm(llvm.StructType.get_literal([kind] * count), registers, asm, constraints, asm_dialect=0,
                             has_side_effects=True)
    return [llvm.extractvalue(kind, result, [i]) for i in range(count)]


def _as_accumulator(registers: list[ir.Value], columns: int) -> Any:
    layout = ACC.to_mgpu()
    array = np.array(registers, dtype=object).reshape(layout.registers_shape((64, columns)))
    return mgpu.FragmentedArray(_registers=array, _layout=layout, _is_signed=None)


def _padded(x: Any) -> Any:
    """x with columns of some value after its own, up to a whole chunk."""
    missing = (CHUNK - x.shape[1]) // 8
    if not missing:
        return x
    registers = np.concatenate([x.registers, np.repeat(x.registers[:, -1:], missing, axis=1)], axis=1)
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)
