"""The kernel of decoding with mma.sync: in Pallas' interpreter on small shapes, and on a GPU, with the cases and the
oracle of the Hopper kernel's tests (`tests.hopper.test_decode`): float64, and NaN in all else that the cache holds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sanitizer
from jax import lax

from pallas_flash import Causal, Full, Window, autodiff, cache, device
from pallas_flash.filled import Filled
from pallas_flash.kernels.ampere import defaults, launches, memory, rules, support
from pallas_flash.kernels.ampere.schedule import DecodeSchedule, ForwardSchedule
from pallas_flash.kernels.mosaic import cache_rules, lanes
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.mask_fields import ArrayField
from pallas_flash.spec import AttentionSpec, Operands, Results
from tests.hopper import test_decode, test_decode_lost
from tests.hopper.test_decode import Case, assert_right, call_of, exact, in_layout, rows, shapes, sinks_of, stored

GPUS = [device.A100, device.L4, device.H200, device.B200, device.RTX_5090]
REPETITIONS = 300


def as_scheduled(case: Case, gpu: device.Device = device.A100) -> tuple[AttentionSpec, DecodeSchedule]:
    """The case's spec, and the default schedule of a GPU as the case changes it."""
    q, k, v = rows(case)
    spec = call_of(case, q, stored(case, k, v)).spec
    return spec, dataclasses.replace(defaults.default_forward(spec, gpu), **case.schedule)


# -- in the interpreter ------------------------------------------------------------------------------------------------

INTERPRETED = {
    "a head over several blocks": Case((0, 130, 77), 3, d=(64, 40), capacity=140, layout="BHLD", dtype="float16",
                                       softcap=5.0, bad=(0,), schedule=dict(num_blocks=4)),
    "pages and a window": Case((144, 16), 2, (2, 1), (72, 64), 144, 48, rule=Causal() & Window(left=40), scale=-0.2,
                               mask=Causal() & Window(left=np.array([40, 40])), bad=(0, 40, 41),
                               schedule=dict(num_blocks=1, bands=1, block_kv=32, num_stages=3)),
    "many sequences": Case((3, 0, 32, 9, 1), heads=(1, 1), d=(16, 8), capacity=32, schedule=dict(num_blocks=2)),
    # Outputs were 0 and lse -inf in the Hopper kernel: the rounding of m_i unit was larger than any exponent that has
    # a weight.
    "huge scores": Case((17, 48), 2, (2, 1), (16, 16), 48, scale=-1e25,
                        schedule=dict(num_blocks=2, block_kv=16, bands=1)),
    "64 queries": Case((90, 31), 16, (4, 1), (32, 64), 96, schedule=dict(num_blocks=3)),
    "sinks": Case((0, 130, 77), 3, d=(64, 40), capacity=140, layout="BHLD", dtype="float16", softcap=5.0, sinks=True,
                  schedule=dict(num_blocks=4, block_kv=128)),
    "a bias of each head, sinks, pages": Case((90, 144, 0), 2, (4, 2), (16, 16), 144, 16, scale=-0.2, bias=(3, 4),
                                              bias_dtype="bfloat16", sinks=True, bad=(3, 40, 41, 42, 43),
                                              schedule=dict(num_blocks=3, bands=2)),
    "a bias of all heads": Case((77, 20), heads=(6, 2), d=(64, 64), capacity=77, layout="BHLD", bias=(2, 1),
                                softcap=9.0, bad=tuple(range(9)), schedule=dict(num_blocks=1, num_stages=2)),
    "a bias of finfo.min": Case((70, 33), 2, (4, 1), (16, 16), 70, bias=(1, 4), least=float(np.finfo("float32").min),
                                schedule=dict(num_blocks=2)),
    "wide heads": Case((60,), d=(256, 136), capacity=64, page=16, layout="BHLD", rule=Full(),
                       schedule=dict(num_blocks=2, block_kv=32, bands=2, q_registers=False)),
}


@pytest.mark.interpreted
@pytest.mark.parametrize("name", INTERPRETED)
def test_the_kernel_agrees_with_the_oracle(name, monkeypatch):
    monkeypatch.setattr(lanes, "LANES", 2)  # of a warp that looks at 32 sequences at a time
    case = INTERPRETED[name]
    q, k, v = rows(case)
    call = call_of(case, q, stored(case, k, v))
    operands, (spec, schedule) = call.operands(), as_scheduled(case)
    assert support.why_not(spec, device.A100) == rules.reasons_against(spec, schedule, device.A100.smem_bytes) == []
    sinks = sinks_of(case)
    sinks = None if sinks is None else sinks[None, :, None, None]
    arrays = *operands[:3], *jax.tree.leaves(operands.mask), operands.bias, sinks, operands.page_table
    with interpreted():
        out, stats = jax.jit(launches.forward(spec, schedule))(*(x for x in arrays if x is not None))
        assert_right(case, out, stats[:, :, 0], exact(case, q, k, v))


@pytest.mark.interpreted
def test_sequences_that_have_lost_keys_are_nan():
    """Found in the kernel, by the blocks that share a head: no other kernel runs."""
    case = test_decode_lost.LOSING
    q, given, _, wanted = test_decode_lost.losing(case)
    call = call_of(case, q, given)
    schedule = dataclasses.replace(defaults.default_forward(call.spec, device.A100), num_blocks=7, block_kv=16, bands=1)
    operands = call.operands()
    with interpreted():
        out, stats = jax.jit(launches.forward(call.spec, schedule))(
            *operands[:3], *jax.tree.leaves(operands.mask), operands.page_table)
    assert_right(case, out, stats[:, :, 0], wanted)


# -- who gets it, and how ----------------------------------------------------------------------------------------------

def test_gpus_that_have_these_kernels_alone_run_it():
    q, cached = shapes(pages=(9, 16))
    text = cache.explain(q, cached, device=device.A100)
    assert "implementation='ampere'" in text
    assert "forward: attention_decode, DecodeSchedule(bands=4, block_kv=64" in text
    assert "backward: that of 'xla', Schedule(" in text
    sinks = jax.ShapeDtypeStruct((8,), "float32")
    text = cache.explain(q, cached, sinks=sinks, device=device.A100)
    assert text.endswith("sinks: in the kernel")


@pytest.mark.parametrize(("options", "keywords", "reason"), [
    (dict(dtype="float32"), {}, "needs bfloat16 or float16"),
    (dict(d=20), {}, "multiples of 8 (16 bytes, the unit of copies) against a cache, which is not copied in each step"),
    (dict(), dict(mask=Causal() & Window(left=np.full((2, 8), 3))), "a number for each sequence against a cache only"),
    (dict(q_len=2), dict(bias=np.zeros((1, 1, 2, 256), "float32")), "takes a bias of each key against a cache only"),
])
def test_what_it_does_not_take_has_a_reason(options, keywords, reason):
    """The same as of the Hopper kernel, which asks the same rules."""
    q, cached = shapes(**options)
    for gpu, name in ((device.A100, "ampere"), (device.H200, "hopper")):
        text = cache.explain(q, cached, device=gpu, implementation=name, **keywords)
        assert text.startswith("UnsupportedError") and reason in text, text


def spec_of(dims, count, bias=False):
    """`count` queries of each of two key heads, against a cache of 4,096 positions."""
    q_len = 1 if count <= 16 else count // 4
    shape = lambda length, heads, d: jax.ShapeDtypeStruct((2, length, heads, d), "bfloat16")
    spec = AttentionSpec.of(shape(q_len, 2 * count // q_len, dims[0]), *(shape(4096, 2, d) for d in dims))
    spec = spec.masked(Filled(Causal(), jax.ShapeDtypeStruct((2,), "int32"), q_len).canonical(), None)
    return dataclasses.replace(spec, bias=ArrayField((2, spec.q_heads, 1, 4096), np.dtype("float32"))) if bias else spec


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (128, 128), (192, 128), (256, 256), (128, 256), (256, 64)], ids=str)
def test_defaults_are_legal_everywhere(gpu, dims):
    """Two blocks share an SM where tiles of 64 keys fit in it four times; all of a small tile's warps have keys."""
    for count in (1, 16, 20, 32, 36, 64):
        for bias in (False, True):
            spec = spec_of(dims, count, bias)
            schedule = defaults.default_forward(spec, gpu)
            assert support.why_not(spec, gpu) == rules.reasons_against(spec, schedule, gpu.smem_bytes) == []
            assert schedule.bands * cache_rules.rows(spec) <= 64 and schedule.num_blocks % gpu.num_sms == 0
            blocks = schedule.num_blocks // gpu.num_sms
            assert blocks * (memory.smem_bytes(spec, schedule) + 1152) <= gpu.smem_bytes + 1024
            if count <= 16 and max(dims) <= 128:
                assert schedule.bands == 4 and (blocks == 2 or (dims[0] == 128 and gpu.smem_bytes < 102_400))


@pytest.mark.parametrize(("schedule", "reason"), [
    (dict(bands=3), "s.bands=3 must be 1, 2 or 4"), (dict(bands=4), "s.bands=4 of 20 queries must be at most 64 rows"),
    (dict(bands=2, block_kv=48), "s.block_kv=48 must be 16, 32, 48 or 64 keys for each of s.bands=2"),
    (dict(num_stages=1), "s.num_stages=1 must be at least 2"), (dict(num_stages=9), "needs 606208 bytes of shared"),
    (dict(bands=1, parts_at_once=0), "s.parts_at_once=0 must be positive"),
    (dict(bands=1, q_registers=True), "scores, weights, queries and accumulator need 240 registers a thread of 255"),
])
def test_reasons_against_a_schedule(schedule, reason):
    spec = spec_of((256, 256), 20)
    given = dataclasses.replace(DecodeSchedule(bands=2, q_registers=False), **schedule)
    assert any(text.startswith(reason) for text in rules.reasons_against(spec, given, 166_912))
    assert rules.reasons_against(spec, ForwardSchedule(), 166_912)[0].endswith("is not for keys in a cache")


def test_its_gradients_are_those_of_xla():
    q, cached = shapes(pages=(9, 16))
    spec = AttentionSpec.of(q, *(jax.ShapeDtypeStruct((2, 256, 2, 64), "bfloat16"),) * 2).paged(cached.pages)
    mask = Filled(Causal(), cached.lengths, 1).canonical()
    spec = spec.masked(mask, None)
    operands = Operands(q, cached.key, cached.value, None, (), mask, (), None, None, cached.page_table)
    results = Results(q, jax.ShapeDtypeStruct(spec.stats_shape, jnp.float32))
    programs = [str(jax.make_jaxpr(functools.partial(autodiff.backward, spec, name))(operands, results, results))
                for name in ("ampere", "xla")]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("name", ["scan", "pages-vmapped"])
def test_under_transformations(name):
    """Traced and lowered for an A100: the kernel is there once, with the batch of all elements."""
    q, cached = shapes(pages=(9, 32) if "pages" in name else None)
    stack = lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    decoding = lambda q, cached: cache.attend(q, cached, return_lse=True, implementation="ampere")
    if name == "scan":
        function = lambda q, cached: lax.scan(lambda x, _: (decoding(x, cached)[0], None), q, None, length=3)
    else:
        function, q, cached = jax.vmap(decoding), stack(q), jax.tree.map(stack, cached)
    with device.assume(device.A100):
        text = jax.jit(function).trace(q, cached).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    assert f"tensor<{'2x256' if name == 'scan' else '27x32'}x2x64xbf16>" in text


# -- on a GPU ----------------------------------------------------------------------------------------------------------

NAMES = ["d8", "d64", "d96", "d128", "d256", "d192-v128", "d40-v136", "heads-first", "fp16-d64-v96-heads-first",
         "64-rows", "64-rows-d256", "63-rows-heads-first", "mqa", "window-of-arrays", "softcap", "huge-scores",
         "a-class-of-a-user", "bad-values", "bad-values-in-pages", "one-query-bad-values", "pages-of-16",
         "pages-heads-first-d256", "many-sequences", "one-long-sequence", "one-short-sequence", "one-tile",
         "sinks-d256-pages-heads-first", "bias-heads-odd-capacity", "bias-bf16-sinks-pages", "bias-d256",
         "bias-of-the-least-number"]
"""Of the Hopper kernel's cases."""


@pytest.fixture
def named(monkeypatch):
    """What `tests.hopper` calls is `ampere`."""
    monkeypatch.setattr(test_decode, "ours", ours)
    monkeypatch.setattr(test_decode_lost, "ours", ours)


def ours(case: Case):
    """A jitted function of queries and a cache to out and lse."""
    bias, sinks = (None if x is None else jnp.asarray(x) for x in (test_decode.bias_of(case), sinks_of(case)))
    return jax.jit(functools.partial(cache.attend, return_lse=True, implementation="ampere", bias=bias, sinks=sinks,
                                     **case.options))


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", NAMES)
def test_right_on_a_gpu(name):
    case = test_decode.ON_A_GPU[name]
    q, k, v = rows(case)
    found = ours(case)(in_layout(case, q), stored(case, k, v))
    assert_right(case, *found, exact(case, q, k, v))


def assert_right_as_scheduled(case: Case) -> None:
    q, k, v = rows(case)
    jax.clear_caches()
    with defaults.assume(as_scheduled(case, device.current())[1]):
        found = ours(case)(in_layout(case, q), stored(case, k, v))
    jax.clear_caches()
    assert_right(case, *map(np.asarray, found), exact(case, q, k, v))


SCHEDULES = {
    "64-rows": [dict(num_blocks=1), dict(num_blocks=3, num_stages=4), dict(block_kv=16, parts_at_once=1)],
    "pages-of-16": [dict(bands=1, block_kv=32), dict(bands=2, num_blocks=1000), dict(block_kv=128, num_stages=2),
                    dict(q_registers=False, num_blocks=7)],
    "pages-heads-first-d256": [dict(bands=2, block_kv=32, num_stages=2)]}


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("name", "schedule"), [(name, x) for name, every in SCHEDULES.items() for x in every], ids=str)
def test_every_schedule_is_right_on_a_gpu(name, schedule):
    """Also those of GPUs with less shared memory."""
    assert_right_as_scheduled(dataclasses.replace(test_decode.ON_A_GPU[name], schedule=schedule))


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["64-rows", "pages-of-16", "many-sequences"])
def test_repeated_runs_are_equal_bit_by_bit(name, named, monkeypatch):
    monkeypatch.setattr(test_decode, "REPETITIONS", REPETITIONS)
    test_decode.test_repeated_runs_are_equal_bit_by_bit(name)


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_sequences_that_have_lost_keys_are_nan_on_a_gpu():
    case = test_decode_lost.LOSING
    q, given, _, wanted = test_decode_lost.losing(case)
    assert_right(case, *ours(case)(q, given), wanted)


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_a_decoding_loop_is_right_on_a_gpu():
    test_decode.assert_a_loop_is_right("ampere")


SANITIZED = """
from tests.ampere import test_decode
test_decode.assert_right_as_scheduled(test_decode.{case})
"""


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
@pytest.mark.parametrize("case", [
    "Case((300, 0, 77), 2, capacity=320, page=32, bias=(3, 4), sinks=True, bad=(1, 2))",
    "Case((300, 5), 3, d=(256, 72), capacity=301, layout='BHLD')"])
def test_compute_sanitizer_finds_nothing(tool, case):
    sanitizer.check(tool, SANITIZED.format(case=case), "attention_decode")
