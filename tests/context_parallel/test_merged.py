"""A ring whose kernels merge, over virtual devices: the plan and the places, with plain JAX in place of the kernels
(tests/hopper/test_merging.py runs those)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_flash as pf
from bench import ring_step, timing
from pallas_flash import device, softmax
from pallas_flash.context_parallel import merged_ring, unrolled
from pallas_flash.context_parallel.attention import Arrays, Options, shards_of
from pallas_flash.kernels.hopper import merging, support
from pallas_flash.kernels.xla import backward as xla_backward
from pallas_flash.kernels.xla import forward as xla_forward
from pallas_flash.spec import Operands
from pallas_flash.testing import conformance

LENGTH = 256  # positions of a device: two chunks of a tile
NAMES = ("out", "lse", "dq", "dk", "dv")


def rows(x, entry, first, length, axis=1):
    """Some rows of one batch entry, (1, ...)."""
    return jax.lax.dynamic_slice_in_dim(x[entry][None], first, length, axis)


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A pass of a part, in plain JAX, as a function of the same arrays."""

    part: object
    result_types: tuple

    def one(self, q, k, v):
        """A batch entry of the part."""
        spec = dataclasses.replace(self.part, batch=1)
        return spec, Operands(q, k, v, None, (), spec.mask, (), None, None, None)


class Forward(StandIn):
    def __call__(self, q, k, v, places, out, stats):
        for entry, at_q, at_k, at in places:
            spec, operands = self.one(*(rows(x, entry, first, length) for x, first, length in (
                (q, at_q, self.part.q_len), (k, at_k, self.part.kv_len), (v, at_k, self.part.kv_len))))
            found = xla_forward.forward(spec, operands)
            before = rows(stats, entry, at, spec.q_len, 2 + 1)
            merged, old, new = softmax.merge(before, found.stats, softmax.unit(spec.scale, spec.softcap))
            over_dims = lambda share: share.swapaxes(1, 2)[..., None]
            own = jnp.where(over_dims(before[:, :, 0]) == -jnp.inf, 0.0, rows(out, entry, at, spec.q_len))
            sums = own * over_dims(old) + found.out * over_dims(new)
            out = jax.lax.dynamic_update_slice(out, sums, (entry, at, 0, 0))
            stats = jax.lax.dynamic_update_slice(stats, merged, (entry, 0, 0, at))
        return out, stats


class FirstPart(Forward):
    """Rows that it does not write may hold anything."""

    def __call__(self, q, k, v, places, stats):
        return super().__call__(q, k, v, places, jnp.full(self.result_types[0].shape, jnp.nan), stats)


class Backward(StandIn):
    """`statistics` are those of the forward and their cotangents, and `sums` dq."""

    def __call__(self, q, k, v, dout, statistics, places, sums):
        found = []
        for entry, at_q, at_k, _ in places:
            spec, operands = self.one(*(rows(x, entry, first, length) for x, first, length in (
                (q, at_q, self.part.q_len), (k, at_k, self.part.kv_len), (v, at_k, self.part.kv_len))))
            stats, dstats = jnp.split(rows(statistics, entry, at_q, spec.q_len, 3), 2, axis=2)
            dq, dk, dv, *_ = xla_backward.backward(spec, operands, None, stats, rows(dout, entry, at_q, spec.q_len),
                                                   dstats)
            sums = jax.lax.dynamic_update_slice(sums, rows(sums, entry, at_q, spec.q_len) + dq, (entry, at_q, 0, 0))
            found.append((dk, dv))
        return *(jnp.concatenate(x) for x in zip(*found)), sums


class First(StandIn):
    def __call__(self, stats, dstats):
        return jnp.concatenate([stats, dstats], axis=2), jnp.zeros(self.result_types[1].shape, jnp.float32)


class Last(StandIn):
    def __call__(self, sums):
        return (sums.astype(self.part.dtype),)


@pytest.fixture
def standing_in(monkeypatch):
    """Hopper's kernels merge, on a CPU that is taken for an H200."""
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    types = dict(
        forward_pass=lambda part, _, shapes: Forward(part, tuple(map(float32, shapes[-2:]))),
        first_part_pass=lambda part, _, shapes: FirstPart(part, tuple(map(float32, (
            (shapes[0][0], shapes[-1][3], shapes[0][2], part.d_v), shapes[-1])))),
        backward_pass=lambda part, _, shapes: Backward(
            part, (*(float32((part.batch, part.kv_len, part.kv_heads, d)) for d in (part.d, part.d_v)),
                   float32(shapes[-1]))),
        first_pass=lambda whole, _: First(whole, (float32((whole.batch, whole.q_heads, 4, whole.q_len)),
                                                  float32((whole.batch, whole.q_len, whole.q_heads, whole.d)))),
        last_pass=lambda whole, _: Last(whole, (jax.ShapeDtypeStruct(
            (whole.batch, whole.q_len, whole.q_heads, whole.d), whole.dtype),)))
    for name, build in types.items():
        monkeypatch.setattr(merging, name, functools.cache(build))
    with device.assume(device.H200):
        yield
    jax.clear_caches()  # programs do not know what has stood in


def arrays(n, batch=2, heads=2, d=128):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, n * LENGTH, h, d), np.float32), jnp.bfloat16)
            for h in (heads, 1, 1, heads)]


def with_gradients(attend, q, k, v, dout):
    (out, lse), vjp = jax.vjp(attend, q, k, v)
    return out, lse, *vjp((dout, jnp.ones_like(lse)))


def on_many(n, **options):
    """out, lse and gradients on n devices, in the order of the sequence: put into it by NumPy, because the gathers that
    `reorder` would be, one program after another, sometimes wait for each other until XLA ends the process.
    """
    mesh = jax.make_mesh((n,), ("sequence",), devices=jax.devices()[:n], axis_types=(AxisType.Auto,))
    attend = functools.partial(pf.context_parallel_attention, axis_name="sequence", strategy="ring", return_lse=True,
                               mesh=mesh, spec=P(None, "sequence"), **options)
    balance = options.get("load_balance", "zigzag")
    order = functools.partial(pf.reorder, n=n, load_balance=balance)
    run = jax.jit(functools.partial(with_gradients, attend), compiler_options=conformance._fast_to_compile())
    found = jax.device_get(run(*map(order, arrays(n))))
    return [order(x, axis=2 if name == "lse" else 1, inverse=True) for name, x in zip(NAMES, found, strict=True)]


CASES = {"causal": dict(n=4, mask=pf.Causal()), "full": dict(n=2, mask=pf.Full(), softcap=5.0),
         "full-in-one-chunk": dict(n=2, mask=pf.Full(), load_balance=None),
         "in-rounds-of-a-loop": dict(n=5, mask=pf.Causal(), longest=0)}


@pytest.mark.virtual
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merging_kernels_give_what_xla_merges(case, standing_in, monkeypatch):
    case, calls = dict(case), []
    monkeypatch.setattr(unrolled, "LONGEST", case.pop("longest", unrolled.LONGEST))
    used = merged_ring.MergedPasses.forward
    monkeypatch.setattr(merged_ring.MergedPasses, "forward", lambda *given: calls.append(0) or used(*given))
    found = on_many(**case)
    assert calls, "the kernels did not merge"
    expected = on_many(**case, implementation="xla")
    for name, a, b in zip(NAMES, found, expected, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        one_rounding = 2**-7 if name != "lse" else 1e-5
        np.testing.assert_allclose(a, b, rtol=one_rounding, atol=1e-3 * np.abs(b).max(), err_msg=name)


def shards(n=4, length=LENGTH, d=128, dtype="bfloat16", **options):
    q, k = (jax.ShapeDtypeStruct((1, length, heads, d), dtype) for heads in (2, 1))
    given = dict(load_balance="zigzag", dropout_rate=0.0, deterministic=False, implementation=None) | options
    mask = given.pop("mask", pf.Causal())
    found = Options("sequence", "ring", given["load_balance"], None, None, given["dropout_rate"],
                    given["deterministic"], given["implementation"], device.H200, return_lse=False)
    return shards_of(found, Arrays(q, k, k, None, mask, None, None, None, None), mask, n)


IDS = np.zeros((1, 1, LENGTH), np.int32)


@pytest.mark.parametrize(("options", "reasons"), [
    (dict(), (None, None)), (dict(mask=pf.Full()), (None, None)),
    (dict(length=2 * LENGTH + 32), ("multiples of",) * 2), (dict(load_balance=None), ("some devices lack pairs",) * 2),
    (dict(mask=pf.Window(left=100, right=0)), ("some devices lack pairs",) * 2),
    (dict(mask=pf.Causal() & pf.SegmentIds(IDS, IDS)), ("the mask has arrays",) * 2),
    (dict(mask=pf.Causal() & pf.InBounds(4 * LENGTH, np.array([[300]]))), ("the mask has arrays",) * 2),
    (dict(dropout_rate=0.1, implementation="hopper"), ("dropout",) * 2),
    (dict(deterministic=True), (None, "bit by bit")),
    (dict(implementation="xla"), ("implementation='xla' does not merge",) * 2),
    (dict(dtype="float32"), ("does not merge",) * 2), (dict(d=256), (None, "one fused kernel"))])
def test_what_is_not_merged_in_kernels_has_a_reason(options, reasons, standing_in):
    for reason, found in zip(reasons, merged_ring.why_not(shards(**options)), strict=True):
        assert (not found) if reason is None else any(reason in text for text in found)


def test_xla_merges_where_kernels_are_told_not_to(monkeypatch):
    with device.assume(device.H200):
        assert merged_ring.why_not(shards()) == ([], [])
        monkeypatch.setattr(support, "KERNELS_MERGE", False)
        assert all("KERNELS_MERGE is off" in reasons[0] for reasons in merged_ring.why_not(shards()))


@pytest.mark.optimised  # bits are compared
@pytest.mark.virtual
def test_elements_of_vmap_are_one_call(standing_in):
    """Results and gradients of each element, of axes in front and in the middle; keys may be shared. No loop."""
    n = 2
    mesh = jax.make_mesh((n,), ("sequence",), devices=jax.devices()[:n], axis_types=(AxisType.Auto,))
    attend = functools.partial(pf.context_parallel_attention, axis_name="sequence", strategy="ring", mask=pf.Causal(),
                               return_lse=True)

    def alone(q, k, v, dout):
        (out, lse), vjp = jax.vjp(attend, q, k, v)
        return out, lse, *vjp((dout, jnp.ones_like(lse)))

    def on_mesh(function, q_spec, lse_spec, k_spec):
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(q_spec, k_spec, k_spec, q_spec),
                                     out_specs=(q_spec, lse_spec, q_spec, q_spec, q_spec)),
                       compiler_options=conformance._fast_to_compile())
    q, k, v, dout = arrays(n, batch=2)
    row, rows_of_lse = P(None, "sequence"), P(None, None, "sequence")
    stacked = [jnp.stack([x, 2 * x[::-1]], axis=1) for x in (q, dout)]
    given = stacked[0], k, v, stacked[1]
    mapped = on_mesh(jax.vmap(alone, in_axes=(1, None, None, 1), out_axes=1), P(None, None, "sequence"),
                     P(None, None, None, "sequence"), row)
    found = mapped(*given)
    each = on_mesh(alone, row, rows_of_lse, row)
    expected = [jnp.stack(x, axis=1) for x in zip(each(q, k, v, dout), each(2 * q[::-1], k, v, 2 * dout[::-1]))]
    for name, a, b in zip(NAMES, found, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    programs = [str(function.trace(*x).jaxpr) for function, x in ((mapped, given), (each, (q, k, v, dout)))]
    assert not any("scan" in program for program in programs)
    kernels = [program.count("pallas_flash_kernel[") for program in programs]
    assert kernels[0] == kernels[1] == 2 * n + 2


def test_the_steps_of_a_merging_ring_are_timed(standing_in, monkeypatch):
    """And the kernel of a step alone, whose state is donated from launch to launch."""
    plain = timing.Call(lambda: jnp.ones(1), jax.block_until_ready)
    monkeypatch.setattr(ring_step, "BURST", 0.001)
    monkeypatch.setattr(ring_step, "_plain", lambda *_: {"forward": plain, "backward": plain})
    monkeypatch.setattr(ring_step, "_ways", lambda shards: ["kernels"])
    found = list(ring_step.measure(LENGTH, (2, 3), (2, 1), 128, rounds=2))
    assert [record["direction"] for record in found] == ["forward"] * 2 + ["backward"] * 2
    assert ["part_us" in record for record in found] == [True, True, False, False]
    assert all(record["difference"] == 0 for record in found)


def test_an_empty_axis_of_vmap_has_no_launch(standing_in):
    whole = shards().spec
    sums = jnp.zeros((0, 1, LENGTH, 2, 128), jnp.float32)
    assert jax.vmap(lambda x: merging.dq(whole, merging.Sums(None, x)))(sums).shape == sums.shape


def test_queries_that_two_pairs_of_a_call_share_have_two_pieces(standing_in):
    """Regression: blocks of one kernel would race."""
    pieces = merged_ring.Pieces.of(shards())
    assert pieces.number == 3
    np.testing.assert_array_equal(pieces.table, [[0, -1], [1, 2]])
