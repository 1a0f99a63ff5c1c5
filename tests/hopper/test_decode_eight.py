"""The Hopper kernel of decoding against a cache in eight bits: in Pallas' interpreter on small shapes, and on a GPU.

The oracle is that of test_decode.py, of the numbers that are stored times their scales.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sanitizer
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # where the interpreter says whether it saw a race

from pallas_flash import Causal, PrefixLM, Window, cache, device, quantised
from pallas_flash.kernels.hopper import defaults, launches, rules
from pallas_flash.kernels.hopper.decode import eight_bits
from pallas_flash.kernels.mosaic import lanes
from pallas_flash.kernels.mosaic.interpret import interpreted
from tests.hopper.test_decode import (
    Case,
    assert_right,
    call_of,
    exact,
    in_layout,
    normal,
    rows,
    shapes,
    sinks_of,
    stored,
)

F8 = quantised.DTYPE


def in_eight_bits(case: Case, of_sequences: bool):
    """Query, the cache, and the keys and values that it holds in float64; NaN past lengths, as in `stored`."""
    q, *keys = rows(case)
    scales = [np.abs(normal(seed, case.batch if of_sequences else 1, case.heads[1])) / 50 + np.float32(0.01)
              for seed in (21, 22)]
    eight = [np.asarray(quantised.quantise(x.astype(np.float32), scale[:, None, :, None])).astype(np.float32)
             for x, scale in zip(keys, scales, strict=True)]
    held = stored(case, *eight)
    held = cache.Cache(held.key.astype(F8), held.value.astype(F8), case.lengths, held.page_table, case.layout, *scales)
    return q, held, [x.astype(np.float64) * scale[:, None, :, None] for x, scale in zip(eight, scales, strict=True)]


INTERPRETED = {
    "a head over several blocks": Case((0, 130, 77), 1, (6, 2), d=(64, 32), capacity=140, layout="BHLD",
                                       dtype="float16", softcap=5.0, sinks=True,
                                       schedule=dict(num_blocks=4, num_stages=2, workers=1)),
    "pages, a window, one block": Case((144, 16), 1, (2, 1), (96, 64), 144, 48, rule=Causal() & Window(left=40),
                                       scale=-0.2, schedule=dict(num_blocks=1, num_stages=1, workers=1)),
    "two workers a block": Case((0, 130, 77), 1, d=(64, 32), capacity=144, page=16,
                                schedule=dict(num_blocks=4, num_stages=2, workers=2)),
    "queries in shared memory": Case((40, 70), 1, d=(256, 128), capacity=80, schedule=dict(
        num_blocks=2, num_stages=1, workers=1, q_registers=False)),
    "four bands": Case((0, 130, 77), 1, (8, 2), d=(64, 32), capacity=144, sinks=True,
                       schedule=dict(num_blocks=4, num_stages=2, workers=2, bands=4)),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("name", INTERPRETED)
def test_the_kernel_agrees_with_the_oracle(name, monkeypatch):
    monkeypatch.setattr(lanes, "LANES", 2)
    case = INTERPRETED[name]
    q, held, keys = in_eight_bits(case, of_sequences=not case.page)
    call = call_of(case, q, held)
    spec, operands = call.spec, call.operands()
    schedule = dataclasses.replace(defaults.default_forward(spec, device.H100), **case.schedule)
    assert rules.reasons_against(spec, schedule, device.H100.smem_bytes) == []
    sinks = sinks_of(case)
    scales = [x[:, np.arange(spec.q_heads) // spec.group, None, None] if x.shape[1] > 1 else x[..., None, None]
              for x in operands.cache_scales]
    arrays = (*operands[:3], *jax.tree.leaves(operands.mask), None if sinks is None else sinks[None, :, None, None],
              *scales, operands.page_table)
    one_block = schedule.num_blocks == 1
    with interpreted(detect_races=one_block):
        out, stats = jax.jit(launches.forward(spec, schedule))(*(x for x in arrays if x is not None))
        assert_right(case, out, stats[:, :, 0], exact(case, q, *keys))
    assert not (one_block and gpu_callbacks.get_races().races_found)


def test_queries_of_any_size_are_numbers_of_float16():
    """Rows of 2^-80 to 2^120, of zeros, and with what is not finite; columns fall to 2^-40 of the first."""
    rows_, columns = 2.0 ** np.linspace(-80, 120, 64), 2.0 ** -np.linspace(0, 40, 64)
    q = np.array(np.outer(rows_, columns) * (1 + np.abs(normal(3, 64, 64))), jnp.bfloat16)
    q[5], q[6, 3], q[7, 3] = 0, np.nan, np.inf
    found, unit = jax.jit(eight_bits.narrowed)(q)
    assert found.dtype == jnp.float16
    back, q = np.asarray(found, np.float64) * np.asarray(unit, np.float64)[:, None], q.astype(np.float64)
    assert np.isnan(back[6, 3]) and np.isposinf(back[7, 3]) and not back[5].any()
    finite = np.isfinite(q).all(1)
    q, back = q[finite], back[finite]
    largest = q.max(1, keepdims=True)
    assert (np.abs(back - q) <= largest * 2.0**-39).all()
    assert (back == q)[q >= largest * 2.0**-31].all()


# -- who gets it -------------------------------------------------------------------------------------------------------

def of_eight_bits(scales=((1, 2), (1, 2)), **options):
    """`shapes`, the cache in eight bits."""
    q, held = shapes(**options)
    key = jax.ShapeDtypeStruct(held.key.shape, F8)
    return q, dataclasses.replace(held, key=key, value=key, **{
        name: jax.ShapeDtypeStruct(shape, "float32")
        for name, shape in zip(("key_scale", "value_scale"), scales, strict=True)})


def test_it_is_taken_by_name_until_it_was_measured():
    q, held = of_eight_bits()
    text = cache.explain(q, held, device=device.H200)
    assert "implementation='xla'" in text
    assert 'a cache in eight bits has not been measured on a GPU yet (name implementation="hopper" to try it)' in text
    text = cache.explain(q, held, device=device.H200, implementation="hopper")
    assert re.search(r"forward: attention_decode, DecodeSchedule\(.*workers=2", text), text


@pytest.mark.parametrize(("options", "keywords", "reason"), [
    (dict(d=48), {}, "multiples of 32 against a cache in eight bits, d=48"),
    (dict(scales=((9, 2), (1, 1)), pages=(9, 16)), {}, "scales of each head alone with pages"),
    (dict(q_len=2), {}, "takes one query of each head and no bias against a cache in eight bits yet, q_len=2"),
    (dict(), dict(bias=np.zeros((1, 1, 1, 256), "float32")), "takes one query of each head and no bias"),
    (dict(), dict(mask=PrefixLM(3)), None),
])
def test_what_it_does_not_take_has_a_reason(options, keywords, reason):
    q, held = of_eight_bits(**options)
    text = cache.explain(q, held, device=device.H200, implementation="hopper", **keywords)
    assert text.startswith("UnsupportedError") == (reason is not None)
    assert reason is None or re.search(reason, text), text


@pytest.mark.parametrize(("d", "d_v"), [*itertools.product(range(32, 257, 32), repeat=2)])
def test_what_it_takes_has_a_schedule(d, d_v):
    """Of wide values tiles had 32 keys, which are no whole number of conversions of 96 or 224 columns: none was legal.
    """
    q, held = of_eight_bits(d=d)
    held = dataclasses.replace(held, value=jax.ShapeDtypeStruct((*held.value.shape[:3], d_v), F8))
    spec = cache._Call.of(q, held, Causal(), None, {}).spec
    schedule = defaults.default_forward(spec, device.H200)
    assert rules.reasons_against(spec, schedule, device.H200.smem_bytes) == []
    assert schedule.block_kv == (32 if d_v == 256 and d % 64 == 0 else 64)


@pytest.mark.parametrize(("pages", "scales"), [
    (None, ((1, 2), (1, 1))), (None, ((2, 2), (2, 1))), ((9, 16), ((1, 2), (1, 1)))])
def test_it_is_mapped(pages, scales):
    """One launch for all elements, which have scales of their own."""
    q, held = of_eight_bits(scales, pages=pages)
    mapped = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), (q, held))
    with device.assume(device.H200):
        attend = functools.partial(cache.attend, implementation="hopper")
        program = str(jax.make_jaxpr(jax.vmap(attend))(*mapped))
    assert program.count("pallas_flash_kernel") == 1
    assert "f32[6,8,1,1]" in program or scales[0][0] == 1


# -- on a GPU ----------------------------------------------------------------------------------------------------------

ON_GPU = {
    "bfloat16": Case((1, 700, 2048, 130), heads=(8, 2), capacity=2048, layout="BHLD"),
    "float16, pages, sinks": Case((1500, 0, 64, 900), heads=(8, 2), d=(64, 64), capacity=1536, page=16, dtype="float16",
                                  sinks=True),
    "bands": Case((1, 700, 2048, 130), heads=(8, 2), capacity=2048, sinks=True, schedule=dict(bands=4, num_stages=4)),
    "three workers": Case((1, 700, 2048, 130), heads=(8, 2), d=(64, 64), capacity=2048, schedule=dict(
        workers=3, bands=4, query_slots=2, combines_late=True)),
    "wide heads, a window": Case((900, 1024), heads=(16, 1), d=(256, 256), capacity=1024, softcap=9.0,
                                 rule=Causal() & Window(left=500)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu(name):
    """And 100 repetitions are equal to the bit."""
    assert_right_on_a_gpu(ON_GPU[name], 100)


def assert_right_on_a_gpu(case: Case, repetitions: int) -> None:
    q, held, keys = in_eight_bits(case, of_sequences=not case.page)
    attend = jax.jit(functools.partial(cache.attend, sinks=sinks_of(case), return_lse=True, implementation="hopper",
                                       **case.options))
    default = defaults.default_forward(call_of(case, q, held).spec, device.current())
    jax.clear_caches()
    with defaults.assume(dataclasses.replace(default, **case.schedule)):
        found = attend(in_layout(case, q), held)
        for _ in range(repetitions):
            jax.tree.map(np.testing.assert_array_equal, attend(in_layout(case, q), held), found)
    jax.clear_caches()
    assert_right(case, *found, exact(case, q, *keys))


SANITIZED = """
from tests.hopper import test_decode_eight as t
t.assert_right_on_a_gpu(t.Case((300, 0, 77), capacity=320, page=32, d=(128, 64)), 0)
"""


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer.check(tool, SANITIZED, "attention_decode")
