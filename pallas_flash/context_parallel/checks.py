"""What `context_parallel_attention` refuses, before anything runs."""

import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from pallas_flash import compat, errors, masks
from pallas_flash.arguments import Boundaries
from pallas_flash.arrays import Array
from pallas_flash.context_parallel.order import LOAD_BALANCES, LoadBalance, boundaries, require_integers, rise
from pallas_flash.context_parallel.plan import Chunking
from pallas_flash.masks import Mask
from pallas_flash.spec import AttentionSpec

__all__ = ["Axes", "divides", "documents", "dropout", "ids", "is_cut", "lengths", "mask", "whole_mask"]

Axes = str | tuple[str, ...] | None
"""The mesh axes that cut one axis of an array; None: nothing does."""


def is_cut(axis_name: str, query: Array) -> None:
    """Raises where every device along the axis has the same query."""
    varying = compat.varying_axes(query)
    known = compat.varying_axes(jax.lax.axis_index(axis_name))  # none with check_vma=False, or under vmap
    if axis_name in known - varying:
        raise errors.invalid(f"query must be cut over the mesh axis {axis_name!r}", f"it varies over {sorted(varying)}",
                             "name the axis in the in_specs of shard_map")


def lengths(spec: AttentionSpec, chunking: Chunking) -> None:
    """Raises where a device's rows cannot be cut as `chunking` says."""
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


def mask(rule: Mask, load_balance: LoadBalance, dropout_rate: float) -> None:
    """Raises where parts of the mask cannot be told for parts of the sequence."""
    for part in rule.parts:
        if part.has_arrays and part.position_axes and not isinstance(part, masks.SegmentIds):
            raise errors.unsupported(
                "context_parallel_attention cannot run this", [f"{type(part).__name__} holds an array over positions"],
                "give documents as segment_ids or cu_seqlens, and other arrays as bias")
        if not part.has_arrays:
            part.moved(0, 0)  # raises for a class that does not define it
    if load_balance != "zigzag_documents":
        return
    reasons = []
    rules = [part for part in rule.parts if not isinstance(part, masks.SegmentIds | masks.Full)]
    if rules != [masks.Causal()]:
        reasons.append(f"it balances mask=Causal(), there is mask={rule}")
    if dropout_rate:
        reasons.append("it scatters positions, of which dropout needs runs")
    if reasons:
        raise errors.unsupported('load_balance="zigzag_documents" cannot run this', reasons,
                                 'use load_balance="zigzag"')


def whole_mask(rule: Mask) -> None:
    """Raises for arrays over positions in the mask of whole arrays."""
    for part in rule.parts:
        if part.has_arrays and part.position_axes:
            raise errors.unsupported(
                f"a mask of whole arrays with {type(part).__name__}", ["it holds an array over positions"],
                "give documents as segment_ids or cu_seqlens, and other arrays as bias")


def ids(given: tuple[Array, ...] | None, n: int, load_balance: LoadBalance) -> None:
    """Raises for segment ids (batch or 1, length) of n devices of which one is not one document, where documents are
    balanced and the values are known.
    """
    if given is None or load_balance != "zigzag_documents":
        return
    for x in given:
        known = compat.concrete(x)
        for of_devices in () if known is None else np.asarray(known).reshape(known.shape[0], n, -1):
            runs = [_runs(row) for row in of_devices]
            if len(set(runs[0])) < len(runs[0]) or any(other != runs[0] for other in runs):
                raise errors.invalid(
                    'segment_ids must give each document an id of its own, and rows of each to every device, with '
                    'load_balance="zigzag_documents"', f"the documents {list(runs[0])} of the first device",
                    'number them, and deal them with reorder, or use load_balance="zigzag"')


def _runs(row: np.ndarray) -> tuple[int, ...]:
    """The ids of the documents in a row of ids, one after the other."""
    firsts = row[np.flatnonzero(np.diff(row, prepend=row[0] - 1))]
    return tuple(firsts[firsts >= 0].tolist())


def documents(cu_seqlens: Boundaries | None, local_len: int, n: int, load_balance: LoadBalance) -> None:
    """Raises where boundaries are none: what they hold is checked where it is on the host."""
    if cu_seqlens is None:
        return
    starts = require_integers(cu_seqlens)
    known = compat.concrete(starts) if isinstance(starts, jax.Array) else starts
    if known is None:
        return
    values = np.asarray(known)
    if load_balance == "zigzag_documents":
        boundaries(n, n * local_len, load_balance, values)
    elif not rise(values) or values[-1] > n * local_len:
        raise errors.invalid(f"cu_seqlens must rise from 0 to at most the length of the sequence, {n * local_len}",
                             f"cu_seqlens={values.tolist()}", "pass boundaries, not lengths: numpy.cumsum of them")


def dropout(axis_name: str, query: Array, seed: Array) -> None:
    """Raises where shards of batch or heads share a seed: each counts them from 0 and would drop alike."""
    shared = sorted(compat.dividing_axes(query) - compat.dividing_axes(seed) - {axis_name})
    if shared:
        raise errors.invalid("dropout_rng must vary over the axes that cut batch and heads, or shards drop alike",
                             f"it does not vary over {shared}", "fold the shard in: jax.random.fold_in(dropout_rng, "
                             f"jax.lax.axis_index({tuple(shared)}))")


def divides(arrays: Mapping[str, Array], mesh: Mesh | AbstractMesh, axes: tuple[Axes, Axes, Axes],
            load_balance: LoadBalance) -> None:
    """Raises where whole arrays cannot be cut over their axes of the mesh, those of (batch, length, heads)."""
    for name, x in arrays.items():
        for axis, size, along in zip(("batch", "length", "heads"), x.shape, axes):
            names = () if along is None else along if isinstance(along, tuple) else (along,)
            devices = math.prod(mesh.shape[each] for each in names)
            if size % devices:
                multiple = 2 * devices if axis == "length" and load_balance is not None else devices
                raise errors.invalid(
                    f"the {axis} of {name} must be divisible by the {devices} devices along {', '.join(names)}",
                    f"{name}.shape={x.shape}", f"pad it to {-(-size // multiple) * multiple}")
