"""Caches in eight bits: what is stored, attention to it within the error budget of the float64 formulas, and how far
that is from attention to what was appended.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, assert_within, normal
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from api.test_cache import (
    CASES,
    DIM,
    HEADS,
    KV_HEADS,
    LENGTHS,
    TABLE,
    Case,
    K,
    Q,
    V,
    budget_of,
    heads_first,
    kept,
    rows,
    stored,
)
from pallas_flash import Causal, cache, device, quantised
from pallas_flash.kernels.xla import schedule

pytestmark = pytest.mark.usefixtures("small_tiles", "full_precision")

F8 = jnp.float8_e4m3fn
OF_HEADS = np.array([[0.25, 0.03]], np.float32)


# What is stored -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.037, 300.0])
def test_the_error_of_a_number(scale):
    """The bound of `quantised`, at numbers of all sizes, between two that are stored among them; no larger bound holds
    at some of these."""
    numbers = np.arange(256, dtype=np.uint8).view(F8).astype(np.float32)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    between = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, between, np.linspace(-448, 448, 9999)]).astype(np.float32) * np.float32(scale)
    found = np.asarray(quantised.quantise(x, jnp.float32(scale)))
    assert found.dtype == F8
    error = abs(found.astype(np.float64) * np.float32(scale) - x)
    bound = np.maximum(abs(x.astype(np.float64)) / 16, scale / 1024)
    assert (error <= bound * (1 + 1e-6)).all() and (error / np.maximum(bound, 1e-30)).max() > 0.9
    np.testing.assert_array_equal(error[:len(numbers)] < 1e-6 * bound[:len(numbers)] + 1e-30, True)


def test_what_is_too_large_is_the_largest_and_nan_stays():
    found = quantised.quantise(jnp.array([900.0, -np.inf, np.inf, np.nan, 449.0], jnp.float32), jnp.float32(2))
    np.testing.assert_array_equal(np.asarray(found).astype(np.float32), [448, -448, 448, np.nan, 224])


EMPTY = {
    "contiguous": functools.partial(cache.empty, 2, 40, KV_HEADS, DIM, dtype=F8),
    "pages": functools.partial(cache.empty_paged, TABLE, (8, 16), KV_HEADS, DIM, dtype=F8),
}
SCALES = {
    "a head": (np.array([0.02, 0.5], np.float32), 0.01),
    "a page": tuple(np.linspace(*ends, 8, dtype=np.float32)[:, None] for ends in ((0.01, 0.3), (0.2, 0.02))),
    "a page and a head": tuple(np.abs(normal(i, 8, KV_HEADS)) / 50 + np.float32(0.005) for i in (7, 8)),
}


@pytest.mark.parametrize("layout", ["BLHD", "BHLD"])
@pytest.mark.parametrize(("name", "scales"), [("contiguous", "a head"), *(("pages", scales) for scales in SCALES)])
def test_appending_divides_by_the_scale_of_the_place(name, scales, layout):
    """In a prompt, which crosses pages, single tokens and a chunk; under jit, of arguments of any dtype."""
    cached = EMPTY[name](layout=layout, key_scale=SCALES[scales][0], value_scale=SCALES[scales][1])
    append = jax.jit(cache.append)
    for lo, hi in ((0, 19), (19, 20), (20, 24)):
        cached = append(cached, *(jnp.asarray(heads_first(x[:, lo:hi], layout)) for x in (K, V)))
    np.testing.assert_array_equal(cached.lengths, [24, 24])
    for x, held, scale in ((K, cached.key, cached.key_scale), (V, cached.value, cached.value_scale)):
        assert held.dtype == F8
        held, scale = heads_first(np.asarray(held), layout), np.broadcast_to(scale, (len(held), KV_HEADS))
        if name == "pages":
            scale, held = (np.asarray(y)[TABLE] for y in (scale, held))
            scale, held = np.repeat(scale, 16, axis=1), held.reshape(2, 48, KV_HEADS, DIM)
        else:
            scale = scale[:, None]
        wanted = np.clip(x[:, :24] / scale[:, :24, :, None], -448, 448).astype(F8)
        np.testing.assert_array_equal(held[:, :24].view(np.uint8), wanted.view(np.uint8))
        assert not held[:, 24:].view(np.uint8).any()


@pytest.mark.parametrize("name", EMPTY)
def test_one_new_key_of_one_sequence(name):
    """Which is written another way; where there is no room, nowhere."""
    one = EMPTY[name](key_scale=0.25, value_scale=0.5)
    own = dict(page_table=one.page_table[:1]) if one.pages else dict(key=one.key[:1], value=one.value[:1])
    for length in (17, one.capacity):
        given = dataclasses.replace(one, lengths=jnp.array([length]), **own)
        found = jax.jit(cache.append)(given, K[:1, :1], V[:1, :1])
        held = np.asarray(found.key).astype(np.float32)
        if length == 17:
            at = held[TABLE[0, 1], 1] if one.pages else held[0, 17]
            np.testing.assert_array_equal(at, np.asarray(quantised.quantise(K[0, 0], np.float32(0.25)), np.float32))
            held[TABLE[0, 1] if one.pages else 0, 1 if one.pages else 17] = 0
        assert not held.any()


# Attention ------------------------------------------------------------------------------------------------------------


def in_eight_bits(case: Case, scales: str):
    """Query, the cache, the keys and values that were appended, and those that it holds, by position, in float64. NaN
    lies past lengths and in pages of nobody. Scales are powers of two where 16 bits hold the exact numbers then.
    """
    q, k, v = rows(case)
    count = case.capacity // 16
    number = 5 * count + 3 if case.pages else 5
    table = np.random.default_rng(0).permutation(number)[:5 * count].reshape(5, -1)  # as `stored`
    table[4, 0] = table[3, 0]
    given, eight, exact = [], [], []
    for x, seed in ((k, 11), (v, 12)):
        drawn = np.abs(normal(seed, number, KV_HEADS)) / 50 + np.float32(0.012)
        scale = {"a head": drawn[:1], "a page": drawn[:, :1], "a page and a head": drawn}[scales]
        scale = np.exp2(np.round(np.log2(scale))) if x.dtype.itemsize == 2 else scale
        every = np.broadcast_to(scale, (number, KV_HEADS))
        every = np.repeat(every[table], 16, 1) if case.pages else np.repeat(every[:, None], case.capacity, 1)
        given.append(scale)
        eight.append(np.clip(x.astype(np.float32) / every[..., None], -448, 448).astype(F8).astype(np.float32))
        exact.append(eight[-1].astype(np.float64) * every[..., None])
    held = stored(case, *eight)
    return q, cache.Cache(held.key.astype(F8), held.value.astype(F8), LENGTHS, held.page_table, case.layout,
                          *given), (k, v), exact, given


ATTENDED = [("chunk", "a head", "xla"), ("chunk", "a page", "reference"), ("prefix", "a page and a head", "xla"),
            ("window and bias in pages", "a page", "xla"), ("one query in pages", "a page and a head", "xla"),
            ("all keys", "a page and a head", "xla"), ("a class of a user", "a head", "xla"),
            ("a class of a user", "a page and a head", "reference")]


@pytest.mark.parametrize(("name", "scales", "implementation"), ATTENDED)
def test_within_the_budget_of_the_formulas(name, scales, implementation, x64, monkeypatch):
    """Of the numbers that are stored, times their scales; `a page` of contiguous keys is a sequence."""
    case = CASES[name]
    monkeypatch.setattr(schedule, "TARGET_BLOCK", case.tile)
    q, held, _, exact, _ = in_eight_bits(case, scales)
    bias = None if case.bias is None else normal(3, *case.bias).astype(case.dtype)
    attend = jax.jit(lambda q, held, bias: cache.attend(
        q, held, mask=case.rule if case.mask is None else case.mask, bias=bias, return_lse=True,
        implementation=implementation, **case.options))
    out, lse = attend(heads_first(q, case.layout), held, bias)
    assert out.dtype == q.dtype
    k, v = (x.astype(case.dtype) for x in exact)
    if q.dtype.itemsize == 2:
        assert (k == exact[0]).all() and (v == exact[1]).all(), "else the budget is that of other numbers"
    assert_within(budget_of(case, q, k, v, bias), dict(out=out, lse=lse))


@pytest.mark.parametrize("scales", ["a head", "a page"])
def test_how_far_it_is_from_what_was_appended(scales, x64):
    """The bound that docs/semantics.md states: d(lse) <= e, d(out) <= (exp(2 e) - 1) sum p |v| + exp(2 e) sum p dv,
    where e is the largest of scale sum |q| dk over a row's keys, dk and dv the errors of a number.
    """
    case = dataclasses.replace(CASES["chunk"], dtype="float64", pages=scales == "a page", capacity=48)
    q, held, (k, v), _, given = in_eight_bits(case, scales)
    out, lse = cache.attend(q, held, return_lse=True)
    keep = kept(Causal(), LENGTHS, case.q_len, case.capacity)[:, None]
    assert all(abs(x).max() < 448 * scale.min() for x, scale in zip((k, v), given, strict=True)), "none is too large"
    least = [scale.max() / 1024 for scale in given]
    dk, dv = (np.maximum(abs(x) / 16, s) for x, s in zip((k, v), least, strict=True))
    k, v, dk, dv = (np.repeat(x, HEADS // KV_HEADS, 2) for x in (k, v, dk, dv))
    s, ds = (np.einsum("bqhd,bshd->bhqs", a, b) * DIM**-0.5 for a, b in ((q, k), (abs(q), dk)))
    some = keep.any(-1) & np.ones((5, HEADS, 1), bool)
    s, e = np.where(keep, s, -np.inf), np.where(keep, ds, 0).max(-1)
    wanted_lse = np.where(some, np.log(np.where(some, np.exp(s).sum(-1), 1)), -np.inf)
    p = np.where(keep, np.exp(s - np.where(some, wanted_lse, 0)[..., None]), 0)
    wanted, size, error = (np.einsum("bhqs,bshd->bqhd", p, x) for x in (v, abs(v), dv))
    e_out = e.swapaxes(1, 2)[..., None]
    share = abs(out - wanted) / np.maximum(np.expm1(2 * e_out) * size + np.exp(2 * e_out) * error, 1e-300)
    assert share.max() <= 1 and (abs(lse - wanted_lse)[some] <= e[some]).all()
    typical = np.linalg.norm(out - wanted) / np.linalg.norm(wanted)
    assert 0.01 < typical < 0.05, typical


def test_gradients_are_those_of_the_numbers_that_are_stored(x64):
    """Of the query, the bias and sinks; none of the cache."""
    case = dataclasses.replace(CASES["a class of a user"], dtype="float64", rule=Causal())
    q, held, _, exact, _ = in_eight_bits(case, "a page and a head")
    wide = stored(case, *exact)
    q, sinks = heads_first(q, case.layout), np.ones(HEADS)
    bias = normal(3, 1, HEADS, 1, case.capacity, dtype=np.float64)

    def total(q, bias, sinks, held):
        return (cache.attend(q, held, bias=bias, sinks=sinks)**3).sum()
    found, wanted = (jax.jit(jax.grad(total, (0, 1, 2)))(q, bias, sinks, x) for x in (held, wide))
    assert_agree(found, wanted)
    none = jax.grad(total, 3, allow_int=True)(q, bias, sinks, held)
    assert not any(np.asarray(x).astype(np.float32).any() for x in (none.key, none.value, none.key_scale))
    one = cache.empty(2, 16, KV_HEADS, DIM, dtype=F8, key_scale=1.0, value_scale=1.0)
    appended = jax.grad(lambda k: cache.attend(jnp.asarray(Q[:, :1]), cache.append(one, k, k)).sum())(K[:, :1])
    assert not appended.any()


# Transforms, errors ---------------------------------------------------------------------------------------------------


def test_a_loop_under_jit_and_vmap():
    """Appends and attends in `scan`, the cache carried, of two batches at a time; as step by step."""
    empty = cache.empty(1, 16, KV_HEADS, DIM, dtype=F8, key_scale=OF_HEADS, value_scale=0.01)

    def generate(q, k, v):
        def step(held, qkv):
            held = cache.append(held, *qkv[1:])
            return held, cache.attend(qkv[0], held)
        return jax.lax.scan(step, empty, tuple(x[:, None, None] for x in (q, k, v)))
    q, k, v = (jnp.asarray(x[:, :9]) for x in (Q, K, V))
    held, outs = jax.jit(jax.vmap(generate))(q, k, v)
    for i in range(2):
        one = empty
        for j in range(9):
            one = cache.append(one, k[i, j][None, None], v[i, j][None, None])
            assert_agree(outs[i, j], cache.attend(q[i, j][None, None], one))
        np.testing.assert_array_equal(np.asarray(held.key[i]).view(np.uint8), np.asarray(one.key).view(np.uint8))


@pytest.mark.virtual
def test_over_devices():
    """Of batch and heads, scales with their heads."""
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("batch", "heads"))
    held = cache.empty(2, 40, KV_HEADS, DIM, dtype=F8, key_scale=OF_HEADS, value_scale=OF_HEADS)
    held = cache.append(held, K[:, :20], V[:, :20])
    wanted = cache.attend(Q[:, 19:20], held)
    place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
    over = dataclasses.replace(
        held, key=place(held.key, "batch", None, "heads"), value=place(held.value, "batch", None, "heads"),
        lengths=place(held.lengths, "batch"), key_scale=place(held.key_scale, None, "heads"),
        value_scale=place(held.value_scale, None, "heads"))
    found = jax.jit(cache.attend)(place(Q[:, 19:20], "batch", None, "heads"), over)
    assert_agree(found, wanted)


def test_a_scale_may_be_a_whole_number():
    whole, same = (cache.empty(2, 40, KV_HEADS, DIM, dtype=F8, key_scale=one, value_scale=one) for one in (2, 2.0))
    np.testing.assert_array_equal(whole.key_scale, same.key_scale)


def test_what_does_not_fit_is_an_error():
    key = jnp.zeros((2, 40, KV_HEADS, DIM), F8)
    make = lambda **scales: cache.Cache(key, key, [0, 0], **scales)
    with pytest.raises(ValueError, match="key_scale goes with key and value of float8_e4m3fn"):
        make()
    with pytest.raises(ValueError, match="value_scale goes with"):
        make(key_scale=1.0)
    with pytest.raises(ValueError, match="key_scale goes with"):
        cache.empty(2, 40, KV_HEADS, DIM, key_scale=1.0, value_scale=1.0)
    with pytest.raises(ValueError, match=r"key_scale must be float32 of shape \(2, 2\)"):
        make(key_scale=np.ones((3, 1), np.float32), value_scale=1.0)
    with pytest.raises(ValueError, match="value_scale must be positive and finite"):
        make(key_scale=1.0, value_scale=[0.0, 1.0])
    with pytest.raises(ValueError, match="must have one of the dtypes"):
        cache.append(make(key_scale=1.0, value_scale=1.0), key[:, :1], key[:, :1])


def test_explain_says_it(monkeypatch):
    held = cache.empty(2, 40, KV_HEADS, 64, dtype=F8, key_scale=1.0, value_scale=1.0)
    query = jax.ShapeDtypeStruct((2, 1, HEADS, 64), jnp.bfloat16)
    hopper = device.Device("gpu", "NVIDIA H200", (9, 0), 132, 232_448)
    text = cache.explain(query, jax.eval_shape(lambda: held), device=hopper)
    assert "implementation='xla'" in text and "a cache in eight bits has not been measured" in text
    assert "cache=float8_e4m3fn" in text
