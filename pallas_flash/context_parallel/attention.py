"""The public functions: arguments -> shards -> strategy -> its passes, inside `shard_map` or around it."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_flash import arguments, compat, device, dispatch, errors, forks, masks
from pallas_flash.arguments import Ids
from pallas_flash.arrays import Array, Float, Shaped
from pallas_flash.context_parallel import all_gather, all_to_all, model, plan, ring
from pallas_flash.context_parallel.model import Strategy
from pallas_flash.context_parallel.order import LOAD_BALANCES, LoadBalance, positions
from pallas_flash.context_parallel.plan import Chunking
from pallas_flash.context_parallel.shards import Shards
from pallas_flash.masks import ArrayField, Mask
from pallas_flash.spec import AttentionSpec, Operands

__all__ = ["context_parallel_attention", "explain_context_parallel"]

ATTEND = {"ring": ring.attend, "all_gather": all_gather.attend, "all_to_all": all_to_all.attend}
"""(shards, operands) -> (out, lse), by strategy."""


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
      segment_ids: integers (batch or 1, length), or a tuple of those of queries and of keys. Neighbours among the
        documents of "zigzag_documents" have different ids.
      cu_seqlens: in place of them, the boundaries of the documents of a packed row, integers (documents + 1,), for the
        whole batch and the whole sequence; they may be traced. What lies past the last is padding.
      bias: (batch or 1, q_heads or 1, length or 1, S or 1): rows as queries, S keys of the whole sequence, in the order
        of the devices. It has a gradient.
      dropout_rate, dropout_rng: as in `flash_attention`. The bits are those of one device, also where this function
        makes the `shard_map`; inside one, the key must vary over the axes that cut batch and heads.
      sinks: (q_heads,): a logit of each head that takes part in the softmax and has no value. It has a gradient.
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
    dispatch.require_names(implementation)
    options = _Options(axis_name, strategy, load_balance, scale, softcap, dropout_rate, deterministic, implementation,
                       device.current((query, key, value)))
    query, key, value = (jnp.asarray(arguments.array(name, x)) for name, x in (
        ("query", query), ("key", key), ("value", value)))
    ids = segment_ids if isinstance(segment_ids, tuple) or segment_ids is None else (segment_ids, segment_ids)
    arrays = _Arrays(query, key, value, bias=_optional(bias), mask=masks.checked(mask).canonical(),
                     ids=None if ids is None else tuple(map(jnp.asarray, ids)), cu_seqlens=_optional(cu_seqlens),
                     sinks=_optional(sinks), dropout_rng=dropout_rng if dropout_rate else None)
    out, lse = _attend(options, None, arrays) if _is_bound(axis_name) else _spread(options, arrays, mesh, spec)
    return (out, lse) if return_lse else out


class _Options(NamedTuple):
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


class _Arrays(NamedTuple):
    """The arguments that hold data, of a device or of all."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    mask: Mask  # canonical
    ids: tuple[Array, ...] | None  # of queries and keys
    cu_seqlens: Array | None
    sinks: Array | None
    dropout_rng: Any


def _optional(x: arguments.Array | None) -> Array | None:
    return None if x is None else jnp.asarray(x)


def _is_bound(axis_name: str) -> bool:
    """Whether the caller is inside `shard_map` (or `vmap`) over the axis."""
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        return False
    return True


# --- on the shards of a device ---------------------------------------------------------------------------------------


def _attend(options: _Options, cut: "_Cut | None", arrays: _Arrays) -> tuple[Array, Float[Array, "b h t"]]:
    """(out, lse) of a device's shards; `cut` says how batch and heads are cut, where that is known."""
    _check_is_cut(options.axis_name, arrays.query)
    n = jax.lax.axis_size(options.axis_name)
    mask = _with_documents(options, arrays)
    shards = _shards(options, arrays, mask, n)
    strategy = _choice(shards, options.strategy).strategy
    seed = arguments.dropout_seed(shards.spec, arrays.dropout_rng)
    if seed is not None and cut is None:
        _check_dropout(options.axis_name, arrays.query, seed)
    origin = None if seed is None else jnp.zeros(4, jnp.int32) if cut is None else cut.origin(shards.spec)
    operands = Operands(q=arrays.query, k=arrays.key, v=arrays.value, bias=arrays.bias, mask=mask, dropout_seed=seed,
                        dropout_origin=origin)
    out, lse = ATTEND[strategy](shards, compat.vary_like(operands, operands))
    return (out, lse) if arrays.sinks is None else _with_sinks(out, lse, arrays.sinks)


def _shards(options: _Options, arrays: _Arrays, mask: Mask, n: int) -> Shards:
    q, k, v = arrays.query, arrays.key, arrays.value
    spec = AttentionSpec.of(q, k, v, scale=options.scale, softcap=options.softcap, dropout_rate=options.dropout_rate,
                            return_lse=True, deterministic=options.deterministic)
    chunking = Chunking(n, spec.q_len, options.load_balance)
    _check_lengths(spec, chunking)
    _check_mask(mask, options.load_balance, options.dropout_rate)
    spec = spec.masked(mask, None)
    if arrays.bias is not None:
        dataclasses.replace(spec, kv_len=n * spec.kv_len, mask=masks.Full()).masked(masks.Full(), arrays.bias)
    if arrays.sinks is not None and arrays.sinks.shape != (spec.q_heads,):
        raise errors.invalid(f"sinks must have shape (q_heads,) = ({spec.q_heads},)",
                             f"sinks.shape={arrays.sinks.shape}", "give one logit a query head of the shard")
    bias = None if arrays.bias is None else ArrayField.of(arrays.bias)
    return Shards(spec, bias, options.axis_name, chunking, options.implementation, options.device)


def _choice(shards: Shards, requested: Strategy | None) -> model.Choice:
    """The strategy, with what each would cost."""
    spec, chunking = shards.spec, shards.chunking
    length = chunking.num_devices * chunking.local_len
    pairs = _share(shards.static_mask, length)
    steps = plan.steps(shards.static_mask, chunking, shards.stacks)
    problem = model.Problem(batch=spec.batch, length=chunking.local_len, n=chunking.num_devices, q_heads=spec.q_heads,
                            kv_heads=spec.kv_heads, d=spec.d, d_v=spec.d_v, itemsize=spec.dtype.itemsize, share=pairs,
                            steps=max(1, len(steps)))
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


def _with_documents(options: _Options, arrays: _Arrays) -> Mask:
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
    """Twice the id (batch, length) of each row's document, and 1 for the second half of a device's rows of it, its late
    piece: see `Shards`.
    """
    rows, changes = jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids[:, 1:] != ids[:, :-1]
    edge = jnp.ones_like(ids[:, :1], bool)
    begin = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], axis=1), rows, 0), axis=1)
    last = jnp.concatenate([changes, edge], axis=1)
    end = jax.lax.cummin(jnp.where(last, rows + 1, ids.shape[1]), axis=1, reverse=True)
    return 2 * ids.astype(jnp.int32) + (2 * (rows - begin) >= end - begin).astype(jnp.int32)


def _with_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """The result with a further logit a head in each softmax, which has no value."""
    total = jnp.logaddexp(lse, jnp.broadcast_to(sinks.astype(lse.dtype)[None, :, None], lse.shape))
    kept = jnp.exp(lse - total).swapaxes(1, 2)[..., None]
    return (out.astype(lse.dtype) * kept).astype(out.dtype), total


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_is_cut(axis_name: str, query: Array) -> None:
    varying = compat.varying_axes(query)
    if varying and axis_name not in varying:  # none at all: check_vma=False, or vmap
        raise errors.invalid(f"query must be cut over the mesh axis {axis_name!r}", f"it varies over {sorted(varying)}",
                             "name the axis in the in_specs of shard_map")


def _check_lengths(spec: AttentionSpec, chunking: Chunking) -> None:
    if spec.q_len != spec.kv_len:
        raise errors.invalid("query and key must have the same length", f"q_len={spec.q_len}, kv_len={spec.kv_len}",
                             "pad one of them, and mask the padding with InBounds or segment_ids")
    if chunking.load_balance not in LOAD_BALANCES:
        raise errors.invalid('load_balance must be "zigzag", "zigzag_documents" or None',
                             f"load_balance={chunking.load_balance!r}", "pass one of these")
    if chunking.load_balance is not None and spec.q_len % 2:
        n = chunking.num_devices
        raise errors.invalid(f"the length of the sequence must divide by 2 n = {2 * n} for load_balance="
                             f"{chunking.load_balance!r}", f"length {n * spec.q_len} on n={n} devices",
                             f"pad it to {2 * n * math.ceil(spec.q_len / 2)}, or use load_balance=None")


def _check_mask(mask: Mask, load_balance: LoadBalance, dropout_rate: float) -> None:
    reasons = []
    for part in mask.parts:
        if part.has_arrays and part.position_axes and not isinstance(part, masks.SegmentIds):
            reasons.append(f"{type(part).__name__} holds an array over positions")
        if not part.has_arrays:
            part.moved(0, 0)  # raises for a class that does not define it
    if load_balance == "zigzag_documents":
        rules = [part for part in mask.parts if not isinstance(part, masks.SegmentIds | masks.Full)]
        if rules != [masks.Causal()]:
            reasons.append(f"load_balance='zigzag_documents' balances mask=Causal(), there is mask={mask}")
        if dropout_rate:
            reasons.append("load_balance='zigzag_documents' scatters positions, of which dropout needs runs")
    if reasons:
        raise errors.unsupported("context_parallel_attention cannot run this", reasons,
                                 'give documents as segment_ids or cu_seqlens, other arrays as bias, and use '
                                 'load_balance="zigzag" for other masks')


def _check_dropout(axis_name: str, query: Array, seed: Array) -> None:
    shared = sorted(compat.varying_axes(query) - compat.varying_axes(seed) - {axis_name})
    if shared:
        raise errors.invalid("dropout_rng must vary over the axes that cut batch and heads, or shards drop alike",
                             f"it does not vary over {shared}", "fold the shard in: jax.random.fold_in(dropout_rng, "
                             f"jax.lax.axis_index({tuple(shared)}))")


# --- around whole arrays ---------------------------------------------------------------------------------------------


class _Cut(NamedTuple):
    """The mesh axes that cut (batch, length, heads) of whole arrays; None: nothing does."""

    batch: Any
    length: Any
    heads: Any

    def origin(self, spec: AttentionSpec) -> Array:
        """The place of a shard's first pair in the whole, but for the sequence: (4,) int32."""
        index = [jnp.int32(0) if axes is None else jax.lax.axis_index(axes) for axes in (self.batch, self.heads)]
        zero = jnp.int32(0)
        return jnp.stack([index[0] * spec.batch, index[1] * spec.q_heads, zero, zero]).astype(jnp.int32)

    def specs(self, arrays: _Arrays) -> _Arrays:
        """Where each array lies; an axis of size 1 is on all devices."""
        def place(x: Array, *axes: Any) -> PartitionSpec:
            return PartitionSpec(*(None if size == 1 else axis for size, axis in zip(x.shape, axes)))
        whole = PartitionSpec(self.batch, self.length, self.heads, None)
        bias, ids, sinks = arrays.bias, arrays.ids, arrays.sinks
        return _Arrays(
            query=whole, key=whole, value=whole,  # type: ignore[arg-type]
            bias=None if bias is None else place(bias, self.batch, self.heads, self.length, None),  # type: ignore[arg-type]
            mask=jax.tree.map(lambda x: place(x, self.batch, self.heads), arrays.mask),
            ids=None if ids is None else tuple(place(x, self.batch, self.length) for x in ids),  # type: ignore[misc]
            cu_seqlens=PartitionSpec(),  # type: ignore[arg-type]
            sinks=None if sinks is None else PartitionSpec(self.heads), dropout_rng=PartitionSpec())  # type: ignore[arg-type]


def _spread(options: _Options, arrays: _Arrays, mesh: Mesh | AbstractMesh | None,
            spec: PartitionSpec | None) -> tuple[Array, Array]:
    """(out, lse) of whole arrays, by a `shard_map` over all axes of the mesh that cut them."""
    explicit = _explicit_mesh(arrays.query)
    spec = jax.typeof(arrays.query).sharding.spec if spec is None and explicit is not None else spec
    mesh = mesh if mesh is not None else explicit
    if mesh is None or spec is None:
        raise errors.invalid(
            "context_parallel_attention must be inside shard_map over axis_name, or know how whole arrays are cut",
            f"axis_name={options.axis_name!r} and {'no mesh' if mesh is None else 'no spec'}",
            'pass mesh= and spec=PartitionSpec("batch axis", axis_name, "heads axis")')
    cut = _Cut(*(*spec, None, None, None)[:3])
    if options.axis_name not in mesh.axis_names or cut.length not in (options.axis_name, (options.axis_name,)):
        raise errors.invalid(f"spec must cut the length over {options.axis_name!r} alone, an axis of the mesh",
                             f"{spec=}, mesh axes {mesh.axis_names}", "name the axis second: (batch, length, heads)")
    _check_divides(arrays, mesh, cut)
    found: tuple[Array, Array] = _on_mesh(options, cut, mesh, arrays)
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # outside of jit: one program, compiled once
def _on_mesh(options: _Options, cut: _Cut, mesh: Mesh | AbstractMesh, arrays: _Arrays) -> tuple[Array, Array]:
    specs = cut.specs(arrays)
    if (explicit := _explicit_mesh(arrays.query)) is not None:
        arrays = _placed(arrays, specs, explicit)
    run = jax.shard_map(functools.partial(_attend, options, cut), mesh=mesh, in_specs=(specs,),
                        out_specs=(specs.query, PartitionSpec(cut.batch, cut.heads, cut.length)))
    out, lse = run(arrays)
    return out, lse


def _placed(arrays: _Arrays, specs: _Arrays, mesh: AbstractMesh) -> _Arrays:
    """The arrays where `specs` says: on explicit axes `shard_map` takes no others."""
    def placed(place: PartitionSpec, x: Array | None) -> Array | None:
        return None if x is None else jax.sharding.reshard(x, NamedSharding(mesh, place))
    found: _Arrays = jax.tree.map(placed, specs, arrays, is_leaf=lambda x: x is None or isinstance(x, PartitionSpec))
    return found


def _check_divides(arrays: _Arrays, mesh: Mesh | AbstractMesh, cut: _Cut) -> None:
    for name, x in (("query", arrays.query), ("key", arrays.key), ("value", arrays.value)):
        for axis, size, axes in zip(cut._fields, x.shape, cut):
            names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
            devices = math.prod(mesh.shape[each] for each in names)
            if size % devices:
                raise errors.invalid(f"the {axis} of {name} must divide by the {devices} devices along {names}",
                                     f"{name}.shape={x.shape}", f"pad it to {-(-size // devices) * devices}")


def _explicit_mesh(query: Array) -> AbstractMesh | None:
    mesh: AbstractMesh = jax.typeof(query).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


# --- explain ---------------------------------------------------------------------------------------------------------


def explain_context_parallel(
    query: Shaped, key: Shaped, value: Shaped, *, num_devices: int, strategy: Strategy | None = None,
    load_balance: LoadBalance = "zigzag", mask: Mask | None = None, bias: Shaped | None = None,
    dropout_rate: float = 0.0, scale: float | None = None, softcap: float | None = None, deterministic: bool = False,
    implementation: dispatch.Requested = None,
) -> str:
    """What `context_parallel_attention` would run: the strategy, what each would cost, and the calls of a ring.

    Only shapes and dtypes count; nothing is computed, and no other device is needed.

    Args:
      query, key, value: what one device holds.
      num_devices: along the sequence.
      bias: what one device holds of it.
      strategy, load_balance, mask, dropout_rate, scale, softcap, deterministic, implementation: as in
        `context_parallel_attention`.
    """
    options = _Options("", strategy, load_balance, scale, softcap, dropout_rate, deterministic, implementation,
                       device.current())
    rule = masks.checked(mask).canonical()
    arrays = _Arrays(query, key, value, bias, rule, None, None, None, None)  # type: ignore[arg-type]
    shards = _shards(options, arrays, rule, num_devices)
    try:
        choice = _choice(shards, strategy)
    except errors.UnsupportedError as error:
        return f"UnsupportedError: {error}"
    lines = [f"{num_devices} devices, each {shards.spec}", str(choice)]
    if choice.strategy == "ring":
        for step in plan.steps(shards.static_mask, shards.chunking, shards.stacks):
            calls = "; ".join(shards.described(call) for call in step.calls)
            lines.append(f"  keys of the device {step.distance} before: {calls}")
    return "\n".join(lines)
