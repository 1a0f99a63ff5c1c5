"""Parts of a problem whose results are merged by the kernels, in place: for the steps of a ring of devices.

forward: q, k, v, places -> the state, of out in float32 and statistics, with which each warpgroup begins and which it
leaves (`forward.merge`). The first part makes out: no zeros are written and read.

backward: `prepare` once for all parts; of each part the fused kernel, which makes dk and dv and adds dq to the same
float32 sums; and `finish` once. So of dq nothing is zeroed, read and written between parts.

Arrays are whole, and "places" (`places`) says where the rows of each batch entry of the part lie: nothing is copied to
stack parts along the batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_flash import device, masks
from pallas_flash.device import Device
from pallas_flash.kernels.hopper import defaults, memory, support, work
from pallas_flash.kernels.hopper.backward import finish, kv, prepare
from pallas_flash.kernels.hopper.forward import kernel as forward_kernel
from pallas_flash.kernels.hopper.places import Place
from pallas_flash.kernels.hopper.schedule import ROWS_PER_WARPGROUP, BackwardSchedule, ForwardSchedule, KvSchedule
from pallas_flash.kernels.mosaic import batching
from pallas_flash.kernels.mosaic.call import unpartitioned
from pallas_flash.kernels.mosaic.launch import Launch, Pass
from pallas_flash.spec import AttentionSpec, Results

__all__ = ["Place", "Sums", "backward", "backward_pass", "dq", "first_part", "first_part_pass", "first_pass",
           "forward", "forward_pass", "last_pass", "sums", "why_not"]

Array = jax.Array


class Sums(NamedTuple):
    """What a backward keeps between parts.

    Attributes:
      statistics: of each query (`backward.statistics`), for all parts the same.
      dq: float32 sums, as the fused kernel has them (`memory.dq_acc_shape`).
    """

    statistics: Array
    dq: Array


def why_not(spec: AttentionSpec, where: Device) -> tuple[list[str], list[str]]:
    """The reasons why the kernels of the forward, and of the backward, do not merge the results of a part of a problem,
    which Hopper's can run; empty: they do.
    """
    plain = (not spec.mask.has_arrays and spec.bias is None and spec.score is None and not spec.dropout_rate
             and spec.dtype.itemsize == 2 and spec.d % 8 == 0 == spec.d_v % 8 and not support.is_wide(spec))
    if not support.KERNELS_MERGE:
        return (["support.KERNELS_MERGE is off"],) * 2
    if not plain:
        return (["needs numbers of 16 bits, a mask without arrays, and no bias, score function or dropout"],) * 2
    forward, backward = defaults.default_forward(spec, where), defaults.default_parts(spec, where)
    assert isinstance(forward, ForwardSchedule)
    rows = (spec.q_len % ROWS_PER_WARPGROUP == 0,
            f"needs lengths that are multiples of {ROWS_PER_WARPGROUP}, there are {spec.q_len} queries")
    of_forward = (rows, (spec.kv_len % forward.block_kv == 0,
                         f"needs lengths that are multiples of {forward.block_kv}, there are {spec.kv_len} keys"))
    of_backward = (
        rows, (not spec.deterministic, "parts add to dq in any order, and gradients are to repeat bit by bit"),
        (not work.may_have_idle_queries(spec), "needs a mask that leaves each query a key"),
        (backward is not None, "needs a backward of one fused kernel"),
        (backward is None or (spec.q_len % backward.block_q == 0 == spec.kv_len % backward.block_kv),
         f"needs lengths that tiles of {backward} divide"))
    found, of_dq = ([reason for holds, reason in rules if not holds] for rules in (of_forward, of_backward))
    return found, of_dq


# -- passes ------------------------------------------------------------------------------------------------------------

type _Shapes = tuple[tuple[int, ...], ...]


@functools.lru_cache(maxsize=256)
def forward_pass(part: AttentionSpec, schedule: ForwardSchedule, shapes: _Shapes) -> Pass:
    """The forward of a part, of q, k, v, places and the state's out and statistics, in these shapes."""
    return _of_forward(part, schedule, (*_GIVEN, *_STATE), shapes, forward_kernel.launch(part, schedule, merges=True))


@functools.lru_cache(maxsize=256)
def first_part_pass(part: AttentionSpec, schedule: ForwardSchedule, shapes: _Shapes) -> Pass:
    """The forward of the first part, of q, k, v, places and the state's statistics, in these shapes: it makes the
    state's out, of which it writes the rows of the part.
    """
    batch, heads, _, rows = shapes[-1]
    state = jax.ShapeDtypeStruct((batch, rows, heads, part.d_v), jnp.float32)
    launch = forward_kernel.launch(part, schedule, merges=True, state=state)
    return _of_forward(part, schedule, (*_GIVEN, _STATE[1]), shapes, launch)


_GIVEN = "q", "k", "v", "places"
_STATE = "state_out", "state_stats"


def _of_forward(part: AttentionSpec, schedule: ForwardSchedule, names: tuple[str, ...], shapes: _Shapes,
                launch: Launch) -> Pass:
    dtypes = *(part.dtype,) * 3, jnp.int32, *(jnp.float32,) * (len(names) - len(_GIVEN))
    inputs = {name: jax.ShapeDtypeStruct(*kind) for name, *kind in zip(names, shapes, dtypes, strict=True)}
    return Pass(inputs=inputs, constants={"table": work.forward_table(part, schedule)}, launches=(launch,),
                results=_STATE)


@functools.lru_cache(maxsize=256)
def backward_pass(part: AttentionSpec, schedule: KvSchedule, shapes: _Shapes) -> Pass:
    """The backward of a part, of q, k, v, dout, statistics, places and dq's sums, in these shapes."""
    names = "q", "k", "v", "dout", "statistics", "places", "dq_sums"
    dtypes = *(part.dtype,) * 4, jnp.float32, jnp.int32, jnp.float32
    inputs = {name: jax.ShapeDtypeStruct(*kind) for name, *kind in zip(names, shapes, dtypes, strict=True)}
    return Pass(inputs=inputs, constants={}, launches=(kv.launch(part, schedule, merges=True),),
                results=("dk", "dv", "dq_sums"))


@functools.lru_cache(maxsize=256)
def first_pass(whole: AttentionSpec, schedule: KvSchedule) -> Pass:
    """What a backward begins with, of the forward's statistics and their cotangents."""
    stats = jax.ShapeDtypeStruct(whole.stats_shape, jnp.float32)
    return Pass(inputs={"stats": stats, "dstats": stats}, constants={},
                launches=(prepare.launch(whole, BackwardSchedule(schedule)),), results=("statistics", "dq_sums"))


@functools.lru_cache(maxsize=256)
def last_pass(whole: AttentionSpec, schedule: KvSchedule) -> Pass:
    """What a backward ends with, of dq's sums."""
    sums = jax.ShapeDtypeStruct(memory.dq_acc_shape(whole, schedule), jnp.float32)
    return Pass(inputs={"dq_sums": sums}, constants={}, launches=(finish.launch(whole, schedule),), results=("dq",))


def _run(part: AttentionSpec, build: Callable[[AttentionSpec, _Shapes], Pass], *arrays: Array,
         places: int | None = None) -> tuple[Array, ...]:
    """Runs the pass of a part, made from it and the shapes of the arrays. Under vmap elements are more entries of the
    batch: of the part, and of all arrays, whose first axis it is.

    Args:
      places: which of the arrays says where entries of the part lie in the others.
    """
    where = device.current()  # what follows may be traced later, elsewhere

    @jax.custom_batching.custom_vmap
    def call(*arrays: Array) -> tuple[Array, ...]:
        with device.on(where):
            return unpartitioned(build(part, tuple(x.shape for x in arrays)), where, *arrays)

    @call.def_vmap
    def mapped(axis_size: int, is_mapped: list[bool], *arrays: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        if not isinstance(axis_size, int) or not axis_size:
            return batching.in_turns(call, is_mapped, arrays)  # type: ignore[arg-type]
        whole = [x if own else jnp.broadcast_to(x[None], (axis_size, *x.shape))
                 for x, own in zip(arrays, is_mapped, strict=True)]
        if places is not None:
            moved = whole[0].shape[1] * jnp.arange(axis_size, dtype=jnp.int32)
            whole[places] = whole[places].at[:, :, int(Place.ENTRY)].add(moved[:, None])
        folded = [x.reshape(-1, *x.shape[2:]) for x in whole]
        with device.on(where):
            found = _run(dataclasses.replace(part, batch=axis_size * part.batch), build, *folded, places=places)
        return tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in found), (True,) * len(found)

    found: tuple[Array, ...] = call(*arrays)
    return found


# -- what a ring calls -------------------------------------------------------------------------------------------------

def first_part(part: AttentionSpec, q: Array, k: Array, v: Array, places: Array, stats: Array) -> Results[Array]:
    """The state that begins with a part: `forward` of a state that has met no key.

    Args:
      stats: those of no key, (batch, heads, 2, rows) for as many rows as are to be kept apart. Of rows for which they
        stay, out is not written, and may be anything.
    """
    return Results(*_run(part, _with_schedule(first_part_pass), q, k, v, places, stats, places=3))


def _with_schedule(build: Callable[[AttentionSpec, ForwardSchedule, _Shapes], Pass],
                   ) -> Callable[[AttentionSpec, _Shapes], Pass]:
    def built(part: AttentionSpec, shapes: _Shapes) -> Pass:
        schedule = defaults.default_forward(part, device.current())
        assert isinstance(schedule, ForwardSchedule)
        return build(part, schedule, shapes)
    return built


def forward(part: AttentionSpec, q: Array, k: Array, v: Array, places: Array, state: Results[Array]) -> Results[Array]:
    """The state with the results of a part merged into it, in place.

    Args:
      part: partial; its batch counts the rows of `places`, its lengths are those of each.
      q, k, v: whole arrays in the layout of the spec, with as many heads.
      places: int32 (batch, 4), see `places.Place`. No two rows may name the same rows of the state.
      state: out in float32 and statistics, of as many rows as are to be kept apart; where lse is -inf, out is not read.
    """
    return Results(*_run(part, _with_schedule(forward_pass), q, k, v, places, *state, places=3))


def _schedule(spec: AttentionSpec) -> KvSchedule:
    found = defaults.default_parts(spec, device.current())
    assert found is not None, "asked for what `why_not` has refused"
    return found


def _whole(spec: AttentionSpec) -> AttentionSpec:
    return dataclasses.replace(spec, mask=masks.Full(), partial=True)


def sums(whole: AttentionSpec, stats: Array, dstats: Array) -> Sums:
    """What a backward begins with, of all queries: their statistics, and sums of 0.

    Args:
      whole: the problem of all queries of the device.
      stats, dstats: as the backward of a partial spec takes them (`autodiff.without_out`).
    """
    return Sums(*_run(_whole(whole), lambda spec, _: first_pass(spec, _schedule(spec)), stats, dstats))


def backward(part: AttentionSpec, operands: tuple[Any, ...], places: Array, given: Sums) -> tuple[Array, Array, Sums]:
    """dk and dv of a part, float32 in its shape, and the sums with its dq added.

    Args:
      part, places: see `forward`; the state is that of the queries, and its column is not read.
      operands: whole q, k, v and dout.
    """
    dk, dv, dq = _run(part, lambda spec, shapes: backward_pass(spec, _schedule(spec), shapes), *operands,
                      given.statistics, places, given.dq, places=5)
    return dk, dv, given._replace(dq=dq)


def dq(whole: AttentionSpec, given: Sums) -> Array:
    """The gradient of all queries, in the spec's dtype, after the last part."""
    rounded = dataclasses.replace(_whole(whole), partial=False)
    found, = _run(rounded, lambda spec, _: last_pass(spec, _schedule(spec)), given.dq)
    return found
