"""More queries against a cache than a kernel of decoding takes: the ordinary kernels run them, under the same mask.

What surrounds these kernels runs on a CPU with the reference in their place; they themselves in Pallas' interpreter, on
a small shape, and on a GPU. The oracle is that of test_decode: whatever a cache holds beside its keys is NaN.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hopper.stand_in import standing_in
from pallas_flash import Causal, Full, Mask, PrefixLM, UnsupportedError, Window, cache, device, paging
from pallas_flash.filled import Filled, by_number
from pallas_flash.kernels.ampere import calls as ampere_calls
from pallas_flash.kernels.ampere import rules as ampere_rules
from pallas_flash.kernels.ampere import schedule as ampere_schedule
from pallas_flash.kernels.hopper import calls, rules
from pallas_flash.kernels.hopper.schedule import Float32Schedule, ForwardSchedule
from pallas_flash.kernels.mosaic import prefill
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.launches import launches
from pallas_flash.spec import Results
from tests.hopper.test_decode import (
    LENGTHS,
    Case,
    Chunks,
    assert_right,
    bias_of,
    call_of,
    exact,
    in_layout,
    rows,
    shapes,
    sinks_of,
    stored,
)
from tests.hopper.test_decode_lost import LOSING, losing


@dataclasses.dataclass(frozen=True)
class Moving(Mask):
    """A class of a user that may be moved."""

    size: int
    offset: object = 0

    def keep(self, q_pos, kv_pos):
        return (q_pos + self.offset) // self.size == kv_pos // self.size

    def moved(self, q_lo, kv_lo):
        assert isinstance(kv_lo, int) and kv_lo == 0
        return dataclasses.replace(self, offset=self.offset + q_lo)


# The mask -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule", [Full(), Causal(), Causal() & Window(left=3), Window(2, 2), PrefixLM(4), Moving(3)],
                         ids=str)
def test_the_mask_by_number_keeps_the_same_pairs(rule):
    """Of queries from the first key on."""
    for length in (-2**31, 0, 3, 9, 17):
        mask = Filled(rule, np.int32(length), 6)
        q_pos, kv_pos = np.arange(6)[:, None], np.arange(17)[None]
        with np.errstate(over="ignore"):
            wanted = mask.keep(q_pos, kv_pos)
        found, from_first = by_number(mask, 17).keep(q_pos, kv_pos), max(6 - max(length, 0), 0)
        np.testing.assert_array_equal(np.broadcast_to(found, (6, 17))[from_first:], wanted[from_first:])
        assert not wanted[:from_first].any()


# Numbers, with the reference in the place of the kernels --------------------------------------------------------------

@pytest.fixture
def stand_in(monkeypatch):
    with standing_in(monkeypatch):
        yield


SOME = (0, 5, 40, 17)  # sequences with fewer keys than queries
SMALL = functools.partial(Case, SOME, 17, d=(16, 24), capacity=40, dtype="float16")
CASES = {
    "causal": SMALL(heads=(4, 1), softcap=3.0),
    "heads-first-window": SMALL(heads=(8, 2), layout="BHLD", rule=Causal() & Window(left=6), scale=-0.3),
    "a-window-of-arrays": SMALL(heads=(4, 1), rule=Causal() & Window(left=4),
                                mask=Causal() & Window(left=np.full(4, 4))),
    "all-keys": SMALL(heads=(4, 1), rule=Full()), "both-sides": SMALL(heads=(4, 1), rule=Window(3, 2), layout="BHLD"),
    "prefix": SMALL(heads=(4, 1), rule=PrefixLM(9), sinks=True),
    "a-bias-and-sinks": SMALL(heads=(8, 2), bias=(4, 8), sinks=True), "bias-of-the-least-number": SMALL(
        heads=(4, 1), bias=(4, 4), least=float(np.finfo("float32").min), rule=Full()),
    "few-of-many-heads": dataclasses.replace(SMALL(heads=(65, 1)), q_len=1),
    "pages": dataclasses.replace(SMALL(heads=(4, 1), page=16), capacity=48),
    "pages-heads-first-sinks": dataclasses.replace(SMALL(heads=(8, 2), page=16, layout="BHLD", sinks=True),
                                                   capacity=48),
    "padded": dataclasses.replace(SMALL(heads=(4, 1), layout="BHLD", rule=Full()), d=(20, 9)),
}


def attending(case, implementation, **keywords):
    """A function of queries and a cache to out and lse."""
    bias, sinks = (None if x is None else jnp.asarray(x) for x in (bias_of(case), sinks_of(case)))
    return functools.partial(cache.attend, return_lse=True, implementation=implementation, bias=bias, sinks=sinks,
                             **case.options, **keywords)


@pytest.mark.parametrize("name", CASES)
def test_what_surrounds_the_kernels(name, stand_in):
    case = CASES[name]
    q, k, v = rows(case)
    query, cached = in_layout(case, q), stored(case, k, v)
    spec = call_of(case, q, cached).spec
    assert prefill.is_needed(spec)
    found = jax.jit(attending(case, "hopper"))(query, cached)
    assert_right(case, *found, exact(case, q, k, v))


@pytest.mark.parametrize("sinks", [False, True])
def test_sequences_that_have_lost_keys_are_nan(sinks, stand_in):
    """And have gradients of 0; those of the others are those of `reference`."""
    case = dataclasses.replace(LOSING, q_len=34, sinks=sinks)
    q, given, is_lost, wanted = losing(case)
    assert_right(case, *jax.jit(attending(case, "hopper"))(q, given), wanted)

    def gradients(implementation):
        def loss(q, key, given, sinks):
            own = {} if sinks is None else dict(sinks=sinks)
            out, lse = cache.attend(q, dataclasses.replace(given, key=key), mask=case.rule, return_lse=True,
                                    implementation=implementation, **own)
            return jnp.nansum(out.astype("float32") ** 2) + jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0).sum()
        values = None if sinks_of(case) is None else jnp.asarray(sinks_of(case))
        found = jax.jit(jax.grad(loss, (0, 1, *(() if values is None else (3,)))))(
            jnp.asarray(q), given.key, given, values)
        return found

    found = gradients("hopper")
    assert not np.asarray(found[0], np.float32)[is_lost].any() and np.asarray(found[0], np.float32)[-1].any()
    assert_agree(found, gradients("xla"))


@pytest.mark.parametrize("name", ["a-bias-and-sinks", "all-keys"])
def test_gradients_are_those_of_xla(name, stand_in):
    """From the statistics of the ordinary forward; queries before the first key have none."""
    case = CASES[name]
    q, k, v = rows(case)
    query, cached = jnp.asarray(in_layout(case, q)), stored(case, k, v)
    bias = None if bias_of(case) is None else jnp.asarray(bias_of(case))

    def gradients(implementation):
        def loss(query, key, value, bias):
            out, lse = cache.attend(query, cache.Cache(key, value, cached.lengths, None, case.layout), bias=bias,
                                    mask=case.rule, return_lse=True, implementation=implementation)
            return (out.astype("float32") ** 2).sum() + jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0).sum()
        which = (0, 1, 2) if bias is None else (0, 1, 2, 3)
        return jax.jit(jax.grad(loss, which))(query, cached.key, cached.value, bias)

    found = gradients("hopper")
    assert_agree(found, gradients("xla"))
    assert all(np.asarray(x).any() for x in found) and not np.asarray(found[0])[1, :12].any()


@pytest.mark.parametrize("name", ["heads-first-window", "pages", "prefix"])
def test_under_vmap(name, stand_in):
    case = CASES[name]
    q, k, v = rows(case)
    caches = [stored(case, *x) for x in ((k, v), (v[..., :16], np.repeat(k, 2, axis=-1)[..., :24]))]
    stacked, queries = jax.tree.map(lambda *x: jnp.stack(x), *caches), np.stack([in_layout(case, q)] * 2)
    found, wanted = (jax.jit(jax.vmap(attending(case, name)))(queries, stacked) for name in ("hopper", "xla"))
    assert_agree(found, wanted)


@pytest.mark.virtual
@pytest.mark.parametrize("page", [0, 16])
def test_split_over_devices(page, stand_in):
    """Batch and heads; only pages, of which every device takes all, are exchanged."""
    case = Case((0, 20, 32, 5), 33, (4, 2), (16, 16), 32, page)
    q, k, v = rows(case)
    cached = stored(case, k, v)
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    place = P(None if page else "batch", None, "heads")
    places = jax.tree.unflatten(jax.tree.structure(cached), [place, place, P("batch"), *[P("batch")] * bool(page)])
    there = jax.tree.map(lambda x, place: jax.device_put(x, NamedSharding(mesh, place)), (q, cached),
                         (P("batch", None, "heads"), places))
    program = jax.jit(attending(case, "hopper")).lower(*there).compile()
    text = program.as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    assert_right(case, *map(np.asarray, program(*there)), exact(case, q, k, v))


def test_pages_are_copied_as_their_table_shows_them(stand_in):
    table = jnp.array([[2, 0], [-1, 7]])
    pages = normal(0, 3, 16, 2, 4)
    found = paging.contiguous(jnp.asarray(pages), table, 1)
    np.testing.assert_array_equal(found, np.concatenate([pages[[2, 0]], pages[[0, 2]]]).reshape(2, 32, 2, 4))
    heads_first = paging.contiguous(jnp.asarray(pages.swapaxes(1, 2)), table, 2)
    np.testing.assert_array_equal(heads_first, found.swapaxes(1, 2))


# The kernels ----------------------------------------------------------------------------------------------------------

INTERPRETED = {
    "causal": Case((0, 30, 77), 40, (2, 1), (16, 16), 80, bad=(0, 3)),
    "all-keys-fp16": Case((77, 9), 33, (2, 1), (16, 16), 80, 16, "BHLD", "float16", Full()),
    "float32": Case((0, 30, 77), 40, (2, 1), (64, 64), 80, dtype="float32"),
}


@pytest.mark.interpreted
@pytest.mark.parametrize(("package", "name"), [
    (package, name) for package in ("hopper", "ampere") for name in INTERPRETED
    if (package, name) != ("ampere", "float32")])
def test_the_kernels_agree_with_the_oracle(name, package, monkeypatch):
    """With NaN past each length, in queries that see nothing, and, but for all keys, in what some queries see."""
    case = INTERPRETED[name]
    q, k, v = rows(case)
    for i, length in enumerate(case.lengths):
        q[i, :max(case.q_len - length, 0)] = np.nan
    call = call_of(case, q, stored(case, k, v))
    module = dict(hopper=calls, ampere=ampere_calls)[package]
    schedule = dict(
        hopper=Float32Schedule(warpgroups=1, num_blocks=2) if case.dtype == "float32" else
        ForwardSchedule(block_kv=32, warpgroups=1, num_blocks=2),
        ampere=ampere_schedule.ForwardSchedule(block_kv=32))[package]

    def run(spec, operands, keys):
        of_package = dict(hopper=rules, ampere=ampere_rules)[package]
        assert not keys and of_package.reasons_against(spec, schedule, 100_000) == []
        with interpreted():
            return Results(*module._forward(spec, schedule)(*operands[:3], *jax.tree.leaves(operands.mask)))

    monkeypatch.setattr(module, "_run_forward", run)
    out, stats = module.forward(call.spec, jax.tree.map(jnp.asarray, call.operands()))
    assert_right(case, out, stats[:, :, 0], exact(case, np.nan_to_num(q), k, v))


# Who runs it ----------------------------------------------------------------------------------------------------------

ON = [(device.H100, "hopper"), (device.A100, "ampere")]
INSTEAD = ("runs the ordinary forward, mask=Causal(offset=int32[2x1]) & InBounds(kv_len=int32[2x1]): "
           "{} queries share a key head, more than the 64 rows of the kernel against a cache")


@pytest.mark.parametrize(("where", "name"), ON, ids=str)
def test_an_automatic_choice_takes_it(where, name):
    q, cached = shapes(q_len=17)
    text = cache.explain(q, cached, device=where)
    assert f"implementation={name!r}" in text and INSTEAD.format(68) in text
    assert "forward: attention_forward, ForwardSchedule(" in text and "backward: that of 'xla', Schedule(" in text
    assert "copies" not in text
    text = cache.explain(q, cached, device=where, sinks=jax.ShapeDtypeStruct((8,), "float32"),
                         bias=jax.ShapeDtypeStruct((2, 8, 17, 256), "float32"))
    assert f"implementation={name!r}" in text and text.endswith("sinks: one more pass over out, in plain JAX")
    q, cached = shapes(q_len=64, d=60, layout="BHLD")
    text = cache.explain(q, cached, device=where)
    written = 2 * (64 * 8 * (64 + 60) + 256 * 2 * (64 + 64)) * 2
    assert f"implementation={name!r}" in text and INSTEAD.format(256) in text
    assert f"    copies: q, k, v filled with zeros to d=64, d_v=64, out cut back: {written:,} bytes written" in text


@pytest.mark.parametrize(("where", "name"), ON, ids=str)
@pytest.mark.parametrize(("options", "keywords", "reason"), [
    (dict(q_len=9, q_heads=16), {}, "attention of fewer than 16 queries of each head against a cache, where more than "
     "64 share a key head (9 of each of 8 heads), has not"),
    (dict(q_len=17, pages=(32, 16)), {}, "attention to keys that are copied out of pages has not"),
])
def test_what_is_not_measured_is_left_to_xla(where, name, options, keywords, reason):
    q, cached = shapes(**options)
    text = cache.explain(q, cached, device=where, **keywords)
    assert "implementation='xla'" in text and f"not {name!r}: {reason}" in text
    text = cache.explain(q, cached, device=where, implementation=name, **keywords)
    assert f"implementation={name!r}" in text and "runs the ordinary forward" in text
    assert cached.pages is None or f"    copies: k, v copied from their pages: {2 * 256 * 2 * 128 * 2:,} bytes" in text


def test_float32_is_taken_by_name_on_hopper_only():
    q, cached = shapes(q_len=17, dtype="float32")
    text = cache.explain(q, cached, device=device.H100, implementation="hopper")
    assert "attention_forward_float32, Float32Schedule(" in text and INSTEAD.format(68) in text
    assert "implementation='xla'" in cache.explain(q, cached, device=device.H100)
    text = cache.explain(q, cached, device=device.A100, implementation="ampere")
    assert text.startswith("UnsupportedError") and "needs bfloat16 or float16" in text


@pytest.mark.parametrize(("where", "name"), ON, ids=str)
@pytest.mark.parametrize(("options", "keywords", "reason"), [
    (dict(d=520), {}, "needs head dimensions from 1 to"),
    (dict(pages=(31, 16)), {}, "out of pages only where the copy is no larger than all pages: 2 sequences of 256 "
     "positions, pages=31x16"),
    ({}, dict(mask=Chunks(3)), "under masks that define moved(q_lo, kv_lo) only, there are 68, mask=Filled(Chunks("),
])
def test_what_it_does_not_take_has_a_reason(where, name, options, keywords, reason):
    q, cached = shapes(q_len=17, **options)
    text = cache.explain(q, cached, device=where, implementation=name, **keywords)
    assert text.startswith("UnsupportedError") and reason in text, text


def test_a_class_of_a_user_is_read_pair_by_pair():
    q, cached = shapes(q_len=17)
    text = cache.explain(q, cached, device=device.H200, mask=Moving(3))
    assert "implementation='xla'" in text
    assert "not 'hopper': a mask class of your own with or beside arrays has not been measured" in text
    assert "implementation='hopper'" in cache.explain(q, cached, device=device.H200, mask=Moving(3),
                                                      implementation="hopper")


def test_a_batch_without_a_number_is_refused():
    batch, = jax.export.symbolic_shape("b")
    text = cache.explain(*shapes(batch=batch, q_len=17), device=device.H200, implementation="hopper")
    assert text.startswith("UnsupportedError") and "needs a batch size that is a number, batch is b" in text


def test_it_is_no_list_of_launches():
    q, cached = shapes(q_len=17)
    spec = cache._Call.of(q, cached, Causal(), None, dict(scale=None, softcap=None, return_lse=False)).spec
    for where, name in ON:
        with pytest.raises(UnsupportedError, match=f"'{name}' runs another problem, .* 68 queries share a key head"):
            launches(spec, where)


def test_it_is_lowered_as_one_kernel():
    """For a GPU, with the cache as it lies in memory: nothing of its size is made."""
    q, cached = shapes(q_len=40, capacity=512)
    with device.assume(device.H200):
        text = jax.jit(cache.attend).trace(q, cached).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1
    made = [line for line in text.splitlines() if "512x2x64xbf16>" in line.rpartition("->")[2] and " = " in line]
    assert not made, made


# -- on a GPU ----------------------------------------------------------------------------------------------------------

LONG = functools.partial(Case, LENGTHS, 200, capacity=3000)
ON_A_GPU = {
    "d64": LONG(d=(64, 64), bad=(1, 250)), "d128-window-heads-first": LONG(
        layout="BHLD", rule=Causal() & Window(left=300), sinks=True),
    "d256-fp16": LONG(d=(256, 256), dtype="float16", heads=(2, 1)), "d192-v128": LONG(d=(192, 128), heads=(2, 1)),
    "prefix-softcap": LONG(rule=PrefixLM(1000), softcap=3.0), "all-keys-d96": LONG(rule=Full(), d=(96, 96)),
    "bias-sinks-d64": LONG(bias=(6, 4), sinks=True, d=(64, 64), bad=(1, 2)),
    "a-window-of-arrays": LONG(rule=Causal() & Window(left=300), mask=Causal() & Window(left=np.full(6, 300))),
    "padded": LONG(d=(60, 90)), "few-queries": dataclasses.replace(LONG(heads=(32, 1)), q_len=3),
    "pages-of-16": dataclasses.replace(LONG(page=16), capacity=3072),
    "pages-heads-first-d64": dataclasses.replace(LONG(page=64, layout="BHLD", d=(64, 64)), capacity=3072),
}


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("implementation", ["hopper", "ampere"])
@pytest.mark.parametrize("name", ON_A_GPU)
def test_right_on_a_gpu(name, implementation):
    case = ON_A_GPU[name]
    q, k, v = rows(case)
    query, cached = in_layout(case, q), stored(case, k, v)
    assert prefill.is_needed(call_of(case, q, cached).spec)
    assert_right(case, *jax.jit(attending(case, implementation))(query, cached), exact(case, q, k, v))


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("implementation", ["hopper", "ampere"])
def test_lost_keys_on_a_gpu(implementation):
    """Found by no kernel, but in a pass over out."""
    case = dataclasses.replace(LOSING, q_len=34)
    q, given, _, wanted = losing(case)
    assert_right(case, *jax.jit(attending(case, implementation))(q, given), wanted)


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_a_prompt_and_steps_equal_the_whole_on_a_gpu():
    """A prompt by the ordinary kernel, steps by the one against a cache, in one program; and gradients."""
    k, v = (jnp.asarray(normal(seed, 2, 90, 2, 64), "bfloat16") for seed in (1, 2))
    q = jnp.asarray(normal(0, 2, 90, 4, 64), "bfloat16")

    def steps(q, k, v, implementation):
        at, outs = cache.empty(2, 96, 2, 64), []
        for lo, hi in ((0, 80), (80, 81), (81, 90)):
            at = cache.append(at, k[:, lo:hi], v[:, lo:hi])
            outs.append(cache.attend(q[:, lo:hi], at, implementation=implementation))
        return jnp.concatenate(outs, axis=1).astype("float32")

    everything = lambda name: jax.jit(jax.value_and_grad(lambda *x: (steps(*x, name) ** 2).sum(), (0, 1, 2)))(q, k, v)
    assert_agree(everything("hopper"), everything("xla"))
