"""The public functions: arguments -> shards -> strategy -> its passes, inside `shard_map` or around it."""

import dataclasses
import functools
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_flash import arguments, compat, device, dispatch, errors, forks, masks, sharding
from pallas_flash.arguments import Ids
from pallas_flash.arrays import Array, Float
from pallas_flash.context_parallel import all_gather, all_to_all, checks, merged_ring, model
from pallas_flash.context_parallel.model import Strategy
from pallas_flash.context_parallel.order import LoadBalance, positions
from pallas_flash.context_parallel.plan import Chunking
from pallas_flash.context_parallel.settings import require_axis_name
from pallas_flash.context_parallel.shards import Shards
from pallas_flash.masks import ArrayField, Mask
from pallas_flash.sinks import with_sinks
from pallas_flash.spec import AttentionSpec, Operands, check_dtype

__all__ = ["Arrays", "Options", "choice", "context_parallel_attention", "shards_of"]

ATTEND = {"ring": merged_ring.attend, "all_gather": all_gather.attend, "all_to_all": all_to_all.attend}
"""(shards, operands) -> (out, lse), by strategy."""


@overload
def context_parallel_attention(
    query: arguments.Array, key: arguments.Array, value: arguments.Array, *, axis_name: str,
    strategy: Strategy | None = None, load_balance: LoadBalance = "zigzag", mask: Mask | None = None,
    segment_ids: Ids | tuple[Ids, Ids] | None = None, cu_seqlens: arguments.Array | None = None,
    bias: arguments.Array | None = None, dropout_rate: float = 0.0, dropout_rng: arguments.Array | None = None,
    sinks: arguments.Array | None = None, scale: float | None = None, softcap: float | None = None,
    return_lse: Literal[False] = False, deterministic: bool = False, implementation: dispatch.Requested = None,
    mesh: Mesh | AbstractMesh | None = None, spec: PartitionSpec | None = None,
) -> jax.Array: ...


@overload
def context_parallel_attention(
    query: arguments.Array, key: arguments.Array, value: arguments.Array, *, axis_name: str,
    strategy: Strategy | None = None, load_balance: LoadBalance = "zigzag", mask: Mask | None = None,
    segment_ids: Ids | tuple[Ids, Ids] | None = None, cu_seqlens: arguments.Array | None = None,
    bias: arguments.Array | None = None, dropout_rate: float = 0.0, dropout_rng: arguments.Array | None = None,
    sinks: arguments.Array | None = None, scale: float | None = None, softcap: float | None = None,
    return_lse: Literal[True], deterministic: bool = False, implementation: dispatch.Requested = None,
    mesh: Mesh | AbstractMesh | None = None, spec: PartitionSpec | None = None,
) -> tuple[jax.Array, jax.Array]: ...


@overload
def context_parallel_attention(
    query: arguments.Array, key: arguments.Array, value: arguments.Array, *, axis_name: str,
    strategy: Strategy | None = None, load_balance: LoadBalance = "zigzag", mask: Mask | None = None,
    segment_ids: Ids | tuple[Ids, Ids] | None = None, cu_seqlens: arguments.Array | None = None,
    bias: arguments.Array | None = None, dropout_rate: float = 0.0, dropout_rng: arguments.Array | None = None,
    sinks: arguments.Array | None = None, scale: float | None = None, softcap: float | None = None,
    return_lse: bool, deterministic: bool = False, implementation: dispatch.Requested = None,
    mesh: Mesh | AbstractMesh | None = None, spec: PartitionSpec | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]: ...


@arguments.names_keywords
def context_parallel_attention(
    query: arguments.Array, key: arguments.Array, value: arguments.Array, *, axis_name: str,
    strategy: Strategy | None = None, load_balance: LoadBalance = "zigzag", mask: Mask | None = None,
    segment_ids: Ids | tuple[Ids, Ids] | None = None, cu_seqlens: arguments.Array | None = None,
    bias: arguments.Array | None = None, dropout_rate: float = 0.0, dropout_rng: arguments.Array | None = None,
    sinks: arguments.Array | None = None, scale: float | None = None, softcap: float | None = None,
    return_lse: bool = False, deterministic: bool = False, implementation: dispatch.Requested = None,
    mesh: Mesh | AbstractMesh | None = None, spec: PartitionSpec | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`flash_attention` of a sequence that is cut over the devices of a mesh axis: the same results and gradients.

    Inside `shard_map` over `axis_name` (other axes may cut batch and heads) arrays are the shards of a device.
    Elsewhere they are whole, and this function makes the `shard_map`: on explicit axes, where the arrays say how they
    lie, and on automatic axes with `mesh` and `spec`. A device holds its share of queries, keys and results, and of the
    others' keys what the strategy says.

    Every array with a sequence axis is given in the order that `load_balance` names: see `reorder` and `positions`.
    Masks count positions of the original sequence.

    Args:
      query: (batch, length, q_heads, d); see `flash_attention` for dtypes.
      key, value: (batch, length, kv_heads, d or d_v), the same length.
      axis_name: the mesh axis along the sequence.
      strategy: "ring", keys and values travel while the kernels compute; "all_gather", they are gathered first;
        "all_to_all", sequences become heads and back. None: the one that costs least, see `explain_context_parallel`.
      load_balance: "zigzag", device i of n holds the pieces i and 2n - 1 - i of the sequence; "zigzag_documents", those
        of each document, for `Causal()` and documents; None, piece i.
      mask: which pairs attend. Fields that are arrays have no axes but (batch, heads).
      segment_ids: integers (batch or 1, length), or a tuple of those of queries and of keys. With "zigzag_documents"
        each document of a row has an id of its own.
      cu_seqlens: in place of them, the boundaries of the documents of a packed row, integers (documents + 1,), for the
        whole batch and the whole sequence; they may be traced. What lies past the last is padding.
      bias: (batch or 1, q_heads or 1, length or 1, S or 1): rows as queries, S keys of the whole sequence, in the order
        of the devices. It has a gradient.
      dropout_rate, dropout_rng: as in `flash_attention`. The bits are those of one device, also where this function
        makes the `shard_map`; inside one, the key must vary over the axes that cut batch and heads.
      sinks: (q_heads,), inside `shard_map` of the shard's heads: see `flash_attention`.
      scale, softcap, return_lse, deterministic, implementation: as in `flash_attention`.
      mesh, spec: for whole arrays on automatic axes: the mesh, and the PartitionSpec of (batch, length, heads).

    Returns:
      out, (batch, length, q_heads, d_v); with `return_lse`, (out, lse), lse (batch, q_heads, length) in float32.

    Raises:
      ValueError: wrong arguments, lengths that do not divide (with what to pad to), a query that is not cut over the
        axis.
      UnsupportedError: the strategy or implementation named cannot run this, with every reason; a derivative of a
        derivative, or forward mode.

    Ring attention is Liu et al.'s (2023, arXiv:2310.01889), the order of "zigzag" that of Llama 3 (2024,
    arXiv:2407.21783), the exchange of heads DeepSpeed Ulysses' (Jacobs et al., 2023, arXiv:2309.14509).
    """
    forks.require_no_fork("context_parallel_attention")
    for name, given in (("return_lse", return_lse), ("deterministic", deterministic)):
        errors.require_bool(name, given)
    require_axis_name(axis_name)
    dispatch.require_names(implementation)
    problem = AttentionSpec.of(*(arguments.array(name, x) for name, x in (
        ("query", query), ("key", key), ("value", value))), scale=scale, softcap=softcap, dropout_rate=dropout_rate)
    options = Options(axis_name, strategy, load_balance, scale, softcap, dropout_rate, deterministic, implementation,
                      device.current((query, key, value)), return_lse)
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    arrays = Arrays(query, key, value, bias=_numbers("bias", bias), mask=masks.checked(mask).canonical(),
                    ids=_ids(problem, segment_ids),
                    cu_seqlens=None if cu_seqlens is None else jnp.asarray(cu_seqlens),
                    sinks=_numbers("sinks", sinks), dropout_rng=dropout_rng if dropout_rate else None)
    if _is_bound(axis_name):
        checks.documents(cu_seqlens, query.shape[1], jax.lax.axis_size(axis_name), load_balance)
        checks.ids(arrays.ids, 1, load_balance)
        out, lse = _attend(options, None, arrays)
    else:
        mesh, cut = _placement(options, query, mesh, spec)
        checks.divides(dict(query=query, key=key, value=value), mesh, cut, load_balance)
        n = mesh.shape[axis_name]
        checks.documents(cu_seqlens, query.shape[1] // n, n, load_balance)
        checks.ids(arrays.ids, n, load_balance)
        checks.whole_mask(arrays.mask)
        out, lse = _on_mesh(options, cut, mesh, arrays)
    return out if lse is None else (out, lse)


class Options(NamedTuple):
    """The arguments that are compiled into the program."""

    axis_name: str
    strategy: Strategy | None
    load_balance: LoadBalance
    scale: float | None
    softcap: float | None
    dropout_rate: float
    deterministic: bool
    implementation: dispatch.Requested
    device: device.Device  # schedules may depend on it
    return_lse: bool


class Arrays(NamedTuple):
    """The arguments that hold data, of a device or of all."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    mask: Mask  # canonical
    ids: tuple[Array, ...] | None  # of queries and keys
    cu_seqlens: Array | None
    sinks: Array | None
    dropout_rng: arguments.Array | None


def _numbers(name: str, x: arguments.Array | None) -> Array | None:
    """An array of JAX's, whose dtype is checked before JAX would round it."""
    if x is None:
        return None
    check_dtype(name, x)
    return jnp.asarray(x)


def _ids(spec: AttentionSpec, segment_ids: object) -> tuple[Array, ...] | None:
    """Segment ids of queries and of keys, (batch or 1, length) each."""
    if segment_ids is None:
        return None
    part = arguments.segments(spec, segment_ids).canonical()
    assert isinstance(part, masks.SegmentIds)
    return jnp.asarray(part.q_ids)[:, 0], jnp.asarray(part.kv_ids)[:, 0]


def _is_bound(axis_name: str) -> bool:
    """Whether the caller is inside `shard_map` (or `vmap`) over the axis."""
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        return False
    return True


# --- on the shards of a device ---------------------------------------------------------------------------------------


def _attend(options: Options, cut: "_Cut | None", arrays: Arrays) -> tuple[Array, Float[Array, "b h t"] | None]:
    """(out, lse) of a device's shards, lse if it is asked for; `cut` says how batch and heads are cut, where that is
    known."""
    checks.is_cut(options.axis_name, arrays.query)
    n = jax.lax.axis_size(options.axis_name)
    mask = _with_documents(options, arrays)
    shards = shards_of(options, arrays, mask, n)
    strategy = choice(shards, options.strategy).strategy
    seed = arguments.dropout_seed(shards.spec, arrays.dropout_rng)
    if seed is not None and cut is None:
        checks.dropout(options.axis_name, arrays.query, seed)
    origin = None if seed is None else jnp.zeros(4, jnp.int32) if cut is None else cut.origin(shards.spec)
    bias = arrays.bias
    if bias is not None and options.axis_name not in compat.varying_axes(bias):
        bias = bias.astype(shards.spec.acc_dtype)  # its gradient is summed over devices before it is rounded
    operands = Operands(q=arrays.query, k=arrays.key, v=arrays.value, bias=bias, score=(), mask=mask, score_integers=(),
                        dropout_seed=seed, dropout_origin=origin, page_table=None)
    out, lse = ATTEND[strategy](shards, sharding.vary_together(operands))
    if arrays.sinks is not None:
        out, lse = with_sinks(shards.spec.layout, out, lse, arrays.sinks)
    return out, lse if options.return_lse else None


def shards_of(options: Options, arrays: Arrays, mask: Mask, n: int) -> Shards:
    """The problem as one of n devices has it; raises for what cannot be."""
    q, k, v = arrays.query, arrays.key, arrays.value
    spec = AttentionSpec.of(q, k, v, scale=options.scale, softcap=options.softcap, dropout_rate=options.dropout_rate,
                            return_lse=True, deterministic=options.deterministic)
    chunking = Chunking(n, spec.q_len, options.load_balance)
    checks.lengths(spec, chunking)
    checks.mask(mask, options.load_balance, options.dropout_rate)
    moved = max(1, chunking.chunk_len) if options.dropout_rate else 0
    spec = dataclasses.replace(spec, dropout_moved=moved).masked(mask, None)
    if arrays.bias is not None:
        dataclasses.replace(spec, kv_len=n * spec.kv_len, mask=masks.Full()).masked(masks.Full(), arrays.bias)
    if arrays.sinks is not None:
        arguments.sinks(spec, arrays.sinks)
    bias = None if arrays.bias is None else ArrayField.of(arrays.bias)
    return Shards(spec, bias, options.axis_name, chunking, options.implementation, options.device)


def choice(shards: Shards, requested: Strategy | None) -> model.Choice:
    """The strategy, with what each would cost."""
    spec, chunking = shards.spec, shards.chunking
    length = chunking.num_devices * chunking.local_len
    with jax.ensure_compile_time_eval():  # a user's mask may ask JAX
        pairs = _share(shards.static_mask, length)
    problem = model.Problem(batch=spec.batch, length=chunking.local_len, n=chunking.num_devices, q_heads=spec.q_heads,
                            kv_heads=spec.kv_heads, d=spec.d, d_v=spec.d_v, itemsize=spec.dtype.itemsize, share=pairs,
                            steps=max(1, len(shards.steps)))
    against: dict[Strategy, list[str]] = {
        "all_gather": all_gather.why_not(shards), "all_to_all": all_to_all.why_not(shards)}
    return model.choose(problem, model.rates(shards.device), requested, against)


def _share(mask: Mask, length: int) -> float:
    """The pairs that attend, of all: asked of 64 x 64 tiles, which is near enough for a choice."""
    block = max(1, length // 64)
    found = 0.0
    for q_lo in range(0, length, block):
        bounds = mask.kv_bounds(q_lo, min(q_lo + block, length))
        lo, hi = (min(max(int(x), 0), length) for x in (bounds.lo, bounds.hi))
        full_lo, full_hi = (min(max(int(x), lo), hi) for x in (bounds.full_lo, bounds.full_hi))
        found += (max(0, hi - lo) + max(0, full_hi - full_lo)) / 2 * min(block, length - q_lo)
    return found / length**2 if length else 0.0


def _with_documents(options: Options, arrays: Arrays) -> Mask:
    """The mask with segment ids, given or made from the boundaries of documents."""
    by_document, ids = options.load_balance == "zigzag_documents", arrays.ids
    if ids is not None and arrays.cu_seqlens is not None:
        raise errors.invalid("segment_ids and cu_seqlens say the same", "both", "leave one of them out")
    if arrays.cu_seqlens is not None:
        starts = arrays.cu_seqlens.astype(jnp.int32)
        rows = positions(options.axis_name, arrays.query.shape[1], load_balance=options.load_balance,
                         cu_seqlens=starts if by_document else None)
        document = jnp.searchsorted(starts, rows, side="right").astype(jnp.int32) - 1
        ids = (jnp.where(rows < starts[-1], document, -1)[None],) * 2
    if ids is None:
        if by_document:
            raise errors.invalid('documents must be given with load_balance="zigzag_documents"',
                                 "cu_seqlens=None, segment_ids=None", 'pass one of these, or use load_balance="zigzag"')
        return arrays.mask
    return arrays.mask & masks.SegmentIds(*(map(_with_pieces, ids) if by_document else ids)).canonical()


def _with_pieces(ids: Array) -> Array:
    """For each row (batch, length) of a device, twice the number of its document, and 1 for the second half of the
    device's rows of it, its late piece: see `Shards`. Every device has rows of all documents, so that a document has
    the same number on all. Padding stays below 0.
    """
    rows, changes = jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids[:, 1:] != ids[:, :-1]
    edge = jnp.ones_like(ids[:, :1], bool)
    first = jnp.concatenate([edge, changes], axis=1)
    begin = jax.lax.cummax(jnp.where(first, rows, 0), axis=1)
    last = jnp.concatenate([changes, edge], axis=1)
    end = jax.lax.cummin(jnp.where(last, rows + 1, ids.shape[1]), axis=1, reverse=True)
    number = jnp.cumsum(first, axis=1, dtype=jnp.int32)
    return jnp.where(ids < 0, -1, 2 * number + (2 * (rows - begin) >= end - begin).astype(jnp.int32))


# --- around whole arrays ---------------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """The mesh axes that cut (batch, length, heads) of whole arrays; None: nothing does."""

    batch: checks.Axes
    length: checks.Axes
    heads: checks.Axes

    def origin(self, spec: AttentionSpec) -> Array:
        """The place of a shard's first pair in the whole, but for the sequence: (4,) int32."""
        index = [jnp.int32(0) if axes is None else jax.lax.axis_index(axes) for axes in (self.batch, self.heads)]
        zero = jnp.int32(0)
        return jnp.stack([index[0] * spec.batch, index[1] * spec.q_heads, zero, zero]).astype(jnp.int32)

    def specs(self, arrays: Arrays) -> Arrays:
        """Where each array lies; an axis of size 1 is on all devices."""
        def place(x: Array, *axes: checks.Axes) -> PartitionSpec:
            return PartitionSpec(*(None if size == 1 else axis for size, axis in zip(x.shape, axes)))
        whole = PartitionSpec(self.batch, self.length, self.heads, None)
        bias, ids, sinks = arrays.bias, arrays.ids, arrays.sinks
        return Arrays(
            query=whole, key=whole, value=whole,  # type: ignore[arg-type]
            bias=None if bias is None else place(bias, self.batch, self.heads, self.length, None),  # type: ignore[arg-type]
            mask=jax.tree.map(lambda x: place(x, self.batch, self.heads), arrays.mask),
            ids=None if ids is None else tuple(place(x, self.batch, self.length) for x in ids),  # type: ignore[misc]
            cu_seqlens=PartitionSpec(),  # type: ignore[arg-type]
            sinks=None if sinks is None else PartitionSpec(self.heads), dropout_rng=PartitionSpec())  # type: ignore[arg-type]


def _placement(options: Options, query: Array, mesh: Mesh | AbstractMesh | None,
               spec: PartitionSpec | None) -> tuple[Mesh | AbstractMesh, _Cut]:
    """The mesh, and which of its axes cut whole arrays: as told, or as the query lies on explicit axes."""
    explicit, name = sharding.explicit_mesh(query), options.axis_name
    given = f"{spec=}"
    if spec is None and explicit is not None:
        spec = sharding.place(query)
        given = f"a query that lies as {spec}"
    mesh = mesh if mesh is not None else explicit
    if mesh is None or spec is None:
        raise errors.invalid(
            "context_parallel_attention must be inside shard_map over axis_name, or know how whole arrays are cut",
            f"axis_name={name!r} and {'no mesh' if mesh is None else 'no spec'}",
            'pass mesh= and spec=PartitionSpec("batch axis", axis_name, "heads axis")')
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise errors.invalid("mesh must be a Mesh or an AbstractMesh of JAX", f"type(mesh)={type(mesh).__name__}",
                             "make one with jax.make_mesh")
    cut = _Cut(*(*spec, None, None, None)[:3])
    unknown = {axis for axes in spec for axis in (axes if isinstance(axes, tuple) else (axes,))} - {
        None, *mesh.axis_names}
    if unknown or (len(spec) > 3 and spec[3] is not None):
        raise errors.invalid("spec must name axes of the mesh for (batch, length, heads)",
                             f"{given}, mesh axes {mesh.axis_names}", "name axes that the mesh has; dims are not cut")
    if name not in mesh.axis_names or cut.length not in (name, (name,)):
        raise errors.invalid(f"the length must be cut over {name!r} alone, an axis of the mesh",
                             f"{given}, mesh axes {mesh.axis_names}", "name the axis second: (batch, length, heads)")
    if explicit is None and AxisType.Explicit in mesh.axis_types:
        raise errors.invalid(
            "arrays must lie on the mesh where its axes are explicit (jax.make_mesh's default)",
            f"query.sharding={jax.typeof(query).sharding}",
            "place them with jax.device_put(x, NamedSharding(mesh, spec)), or make the mesh with "
            "axis_types=(jax.sharding.AxisType.Auto, ...)")
    return mesh, cut


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # outside of jit: one program, compiled once
def _on_mesh(options: Options, cut: _Cut, mesh: Mesh | AbstractMesh, arrays: Arrays) -> tuple[Array, Array | None]:
    specs = cut.specs(arrays)
    if (explicit := sharding.explicit_mesh(arrays.query)) is not None:
        arrays = _placed(arrays, specs, explicit)
    run = jax.shard_map(functools.partial(_attend, options, cut), mesh=mesh, in_specs=(specs,),
                        out_specs=(specs.query, PartitionSpec(cut.batch, cut.heads, cut.length)
                                   if options.return_lse else None))
    out, lse = run(arrays)
    return out, lse


def _placed(arrays: Arrays, specs: Arrays, mesh: AbstractMesh) -> Arrays:
    """The arrays where `specs` says: on explicit axes `shard_map` takes no others."""
    def placed(place: PartitionSpec, x: Array | None) -> Array | None:
        return None if x is None else jax.sharding.reshard(x, NamedSharding(mesh, place))
    found: Arrays = jax.tree.map(placed, specs, arrays, is_leaf=lambda x: x is None or isinstance(x, PartitionSpec))
    return found
