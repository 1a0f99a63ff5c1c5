"""vmap for functions that contain a kernel call: the mapped axis joins the batch axis, so one launch serves it all.

Operands that are not mapped are repeated (keys shared by `in_axes=None` are copied for each element); masks and biases
that are the same for every batch element stay as they are. Elements of an axis whose size is a symbol (`jax.export`)
are computed one after the other, and so are those of a score function that differs between them, or that asks for the
batch entry.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_flash import device
from pallas_flash.device import Device
from pallas_flash.kernels.mosaic import traced
from pallas_flash.masks import ArrayField
from pallas_flash.scores import Score
from pallas_flash.spec import AttentionSpec, Operands

__all__ = ["in_turns", "vmappable"]


def vmappable[*Arrays, R](function: Callable[[AttentionSpec, Device, Operands, *Arrays], R],
                          ) -> Callable[[AttentionSpec, Operands, *Arrays], R]:
    """Makes a function(spec, operands, *arrays), which vmap can map, of `function(spec, device, operands, *arrays)`, in
    which the batch is the leading axis of every array.

    The device is `device.current()` when the call is traced; JAX may map the program long after.
    """
    @functools.lru_cache(maxsize=1024)
    def for_spec(spec: AttentionSpec, where: Device) -> jax.custom_batching.custom_vmap:
        @jax.custom_batching.custom_vmap
        def call(operands: Operands, *arrays: *Arrays) -> R:
            return function(spec, where, operands, *arrays)

        @call.def_vmap
        def rule(axis_size: int, in_batched: list[object], *args: *tuple[Operands, *Arrays]) -> tuple[R, R]:
            if not isinstance(axis_size, int) or axis_size == 0:
                return in_turns(call, in_batched, args)
            given, mapped = args[0], in_batched[0]
            assert isinstance(mapped, Operands)  # a boolean for each array
            if spec.score is not None and not _is_shared(spec.score, mapped):
                return in_turns(call, in_batched, args)
            apart = {"score", "score_integers", *(("k", "v", "page_table") if spec.pages is not None else ())}
            names = [name for name in Operands._fields if name not in apart]
            own, flags = ([getattr(x, name) for name in names] for x in (given, mapped))
            found, *arrays = jax.tree.map(functools.partial(_fold, axis_size, spec.batch), (own, *args[1:]),
                                          (flags, *in_batched[1:]))
            folded = dict(zip(names, found, strict=True))
            if spec.pages is not None:
                folded |= _folded_pages(axis_size, spec, given, mapped)
            operands = given._replace(**folded)
            whole = for_spec(_folded_spec(spec, axis_size, operands), where)(operands, *arrays)
            results = jax.tree.map(lambda x: x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:]), whole)
            return results, jax.tree.map(lambda _: True, results)
        return call

    def on_current_device(spec: AttentionSpec, operands: Operands, *arrays: *Arrays) -> R:
        return for_spec(spec, device.current())(operands, *arrays)

    return on_current_device


def _is_shared(function: Score, mapped: Operands) -> bool:
    """Whether a score function is the same for all elements: then those of another element are more batch entries."""
    return not any((*mapped.score, *mapped.score_integers)) and not traced.uses_batch(function)


def in_turns[R](call: Callable[..., R], in_batched: list[object], args: tuple[object, ...]) -> tuple[R, R]:
    """The call for one element after the other: an axis of symbolic size has no one launch, and an empty one has none.
    """
    leaves, structure = jax.tree.flatten(args)
    mapped = jax.tree.leaves(in_batched)

    def step(_: None, elements: list[jax.Array]) -> tuple[None, R]:
        own = iter(elements)
        given = (next(own) if is_mapped else x for x, is_mapped in zip(leaves, mapped))
        return None, call(*jax.tree.unflatten(structure, given))

    _, results = jax.lax.scan(step, None, [x for x, is_mapped in zip(leaves, mapped, strict=True) if is_mapped])
    return results, jax.tree.map(lambda _: True, results)


def _fold(axis_size: int, batch: int, x: jax.Array, mapped: bool) -> jax.Array:
    """(axis_size, b, ...), or (b, ...) if not mapped -> (axis_size * batch, ...). An array that is not mapped and has
    no batch of its own (b = 1 < batch) stays as it is.
    """
    if not mapped:
        if x.shape[0] != batch:
            return x
        x = jnp.broadcast_to(x[None], (axis_size, *x.shape))
    return jnp.broadcast_to(x, (axis_size, batch, *x.shape[2:])).reshape(axis_size * batch, *x.shape[2:])


def _folded_pages(axis_size: int, spec: AttentionSpec, operands: Operands,
                  mapped: Operands) -> dict[str, jax.Array]:
    """k, v and page_table for all elements. Where pages are mapped, each element's come after those of the one before;
    else all elements share them.
    """
    assert spec.pages is not None and operands.page_table is not None
    table = _fold(axis_size, spec.batch, operands.page_table, bool(mapped.page_table))
    if not (mapped.k or mapped.v):
        return dict(k=operands.k, v=operands.v, page_table=table)
    number = spec.pages.number
    k, v = (_fold(axis_size, number, x, bool(is_mapped))
            for x, is_mapped in ((operands.k, mapped.k), (operands.v, mapped.v)))
    first = number * (jnp.arange(table.shape[0], dtype=table.dtype) // spec.batch)[:, None]
    return dict(k=k, v=v, page_table=jnp.where((table >= 0) & (table < number), table + first, -1))


def _folded_spec(spec: AttentionSpec, axis_size: int, operands: Operands) -> AttentionSpec:
    bias, sinks = (None if x is None else ArrayField.of(x) for x in (operands.bias, operands.sinks))
    pages = None if spec.pages is None else dataclasses.replace(spec.pages, number=operands.k.shape[0])
    k_scale, v_scale = operands.cache_scales or (None, None)
    scales = None if k_scale is None or v_scale is None else (k_scale.shape, v_scale.shape)
    return dataclasses.replace(spec, batch=axis_size * spec.batch, mask=operands.mask.with_placeholders(),
                               pages=pages, bias=bias, sinks=sinks, cache_scales=scales)
