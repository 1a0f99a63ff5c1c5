"""Scores from 1e2 to 1e9: what float32 cannot hold of them must not reach a weight.

lse is as large as the scores, float32 holds it in steps of 2^-23 of its size, and the backward makes weights of the
difference. With scores of 3e5 gradients were wrong by 6 %, with 3e7 by a factor of 18, and finite.
"""

import dataclasses
import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import Causal, Full, device, dispatch, flash_attention, softmax
from pallas_flash.spec import AttentionSpec
from pallas_flash.testing import conformance, inputs, problems, textbook

pytestmark = pytest.mark.optimised  # rounding and memory are the machine code's

SIZES = (1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9)


def able(q, v, mask, **numbers):
    spec = AttentionSpec.of(q, q, v, mask=mask, return_lse=True, **numbers)
    return [row.name for row in dispatch.IMPLEMENTATIONS if not row.why_not(spec, device.current())]


@functools.partial(jax.jit, static_argnames=("implementation", "mask", "scale", "softcap"))
def results(q, k, v, dout, **keywords):
    (out, lse), vjp = jax.vjp(lambda *x: flash_attention(*x, return_lse=True, **keywords), q, k, v)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *vjp((dout, jnp.zeros_like(lse)))), strict=True))


def up_or_down(seed):
    """A random sign for each of some scores."""
    return lambda s: np.random.default_rng(seed).choice([-1.0, 1.0], s.shape)


def against_the_largest(s):
    """1, and -1 for the largest score of each row: random signs leave ties as they are where they happen to agree."""
    return np.where(s == s.max(axis=-1, keepdims=True), -1.0, 1.0)


NUDGES = (up_or_down(0), up_or_down(1), against_the_largest)


def oracle(arrays, mask, scale, softcap=None, nudge=None, steps=1):
    """out, lse, dv and the magnitude of each key's dv in float64; `nudge`, one of NUDGES, says which way each score
    changes, by so many float32 steps of the sum that its products' magnitudes make.
    """
    q, k, v, dout = (np.asarray(x, np.float64).swapaxes(1, 2) for x in arrays)  # (batch, heads, length, dim)
    s = q @ k.swapaxes(2, 3) * scale
    s = s if softcap is None else softcap * np.tanh(s / softcap)
    s = np.where(mask.keep(np.arange(q.shape[2])[:, None], np.arange(k.shape[2])[None]), s, -np.inf)
    if nudge is not None:
        sums = abs(q) @ abs(k).swapaxes(2, 3) * abs(scale)
        s = s + steps * nudge(s) * np.spacing(sums.astype(np.float32)).astype(np.float64)
    m = s.max(axis=-1, keepdims=True)
    p = np.exp(s - m)
    total = p.sum(axis=-1, keepdims=True)
    p = p / total
    out, dv, magnitude = (x.swapaxes(1, 2) for x in (
        p @ v, p.swapaxes(2, 3) @ dout, ((p**2).swapaxes(2, 3) @ dout**2) ** 0.5))
    return dict(out=out, lse=(m + np.log(total))[..., 0], dv=dv), magnitude


def rows(x):
    """The norm of each row of (batch, length, heads, dim)."""
    return np.sqrt((np.asarray(x, np.float64) ** 2).sum(axis=-1))


def check(found, exact, nudged, magnitude, dtype):
    """Errors are at most twice those of one step of each score, and those of rounding weights and results; float32 may
    err by 2^-14, as exponentials of -80 do.
    """
    u, smallest = max(float(jnp.finfo(dtype).eps), 2.0**-14), float(jnp.finfo(dtype).smallest_normal)
    for name, size in (("out", rows(exact["out"])), ("dv", rows(magnitude) + rows(exact["dv"]))):
        error, *steps = (rows(np.asarray(x[name], np.float64) - exact[name]) for x in (found, *nudged))
        limit = 2 * np.max(steps, axis=0) + 2 * u * size + 100 * smallest
        worst = np.unravel_index(np.argmax(error / limit), error.shape)
        assert (error <= limit).all(), f"{name}: {error[worst]:.1e} of {limit[worst]:.1e} at {worst}"
    step = np.max([abs(x["lse"] - exact["lse"]) for x in nudged], axis=0)
    error = abs(np.asarray(found["lse"], np.float64) - exact["lse"])
    assert (error <= 2 * step + 1e-6 * abs(exact["lse"]) + 1e-5).all()
    for name in ("dq", "dk"):
        assert np.isfinite(np.asarray(found[name], np.float32)).all(), name


def case(dtype, dims, length, size, num_heads=2, seed=0):
    """q, k, v, dout whose largest scores are about `size` at a scale of 1 / sqrt(d)."""
    rng = np.random.default_rng(seed)
    normal = lambda d: rng.standard_normal((1, length, num_heads, d))
    spread = np.sqrt(size / 3)
    q, k = (np.clip(spread * normal(dims[0]), -6e4, 6e4) if dtype == "float16" else spread * normal(dims[0])
            for _ in range(2))
    return [jnp.asarray(x, dtype) for x in (q, k, normal(dims[1]), normal(dims[1]))]


def check_all(dtype, dims, length, mask, sizes=SIZES, only=None, **numbers):
    scale, softcap = numbers.get("scale", 1 / np.sqrt(dims[0])), numbers.get("softcap")
    for size in sizes:
        arrays = case(dtype, dims, length, size, num_heads=1 if only else 2)
        exact, magnitude = oracle(arrays, mask, scale, softcap)
        # Tensor cores add up the products of a score with fewer bits, cuBLAS those of float32 in another order.
        steps = 8 if only or (dtype == "float32" and jax.default_backend() == "gpu") else 1
        nudged = [oracle(arrays, mask, scale, softcap, nudge, steps)[0] for nudge in NUDGES]
        for name in [only] if only else able(arrays[0], arrays[2], mask, scale=scale, softcap=softcap):
            found = results(*arrays, implementation=name, mask=mask, scale=scale, softcap=softcap)
            assert jnp.asarray(found["out"]).dtype == dtype
            check(found, exact, nudged, magnitude, dtype)


def exact_results(problem, operands, cotangents, nudge=None, steps=1):
    """Results and magnitudes in float64; the scores change as those of `oracle`, by a bias."""
    spec = problem.spec("float64")
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (operands.q, operands.k, operands.v, *cotangents))
    bias = np.zeros((1, 1, 1, 1)) if operands.bias is None else np.asarray(operands.bias, np.float64)
    if nudge is not None:
        wide_q, wide_k = (x if problem.layout == "BHLD" else x.swapaxes(1, 2) for x in (q, k))
        wide_k = np.repeat(wide_k, spec.group, axis=1).swapaxes(2, 3)
        s = np.where(inputs.attends(spec, operands), wide_q @ wide_k * spec.scale + bias, -np.inf)
        sums = abs(wide_q) @ abs(wide_k) * abs(spec.scale) + abs(bias)
        bias = bias + steps * nudge(s) * np.spacing(sums.astype(np.float32))
    spec = dataclasses.replace(spec, bias=jax.ShapeDtypeStruct(bias.shape, bias.dtype))
    return textbook.attention(spec, operands._replace(q=q, k=k, v=v, bias=bias), dout, dlse)


@pytest.mark.parametrize(("problem", "dtype"), [
    pytest.param(problem, dtype, id=f"{problem}-{dtype}") for problem in problems.LARGE_SCORES
    for dtype in problem.dtypes])
def test_catalogue(problem, dtype):
    """Every implementation, with grouped heads, either layout, a bias, and a cotangent of lse."""
    operands, cotangents = conformance.random_case(problem, dtype)
    with jax.enable_x64(True):
        exact, magnitude = exact_results(problem, operands, cotangents)
        steps = 8 if jax.default_backend() == "gpu" else 1  # tensor cores add up the products with fewer bits
        nudged = [exact_results(problem, operands, cotangents, nudge, steps)[0]._asdict() for nudge in NUDGES]
    for name in [row.name for row in dispatch.IMPLEMENTATIONS if conformance.supports(problem, dtype, row.name)]:
        found = conformance.compiled(problem, name)(operands, cotangents)
        check(found._asdict(), exact._asdict(), nudged, magnitude.dv, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mask", [Causal(), Full()], ids=str)
def test_weights_do_not_lose_what_lse_rounds(dtype, mask):
    check_all(dtype, (64, 64), 200, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("length", "mask"), [
    (128, Full()), (256, Full()), (400, Causal()), (1500, Causal()), (1400, Full())], ids=str)
@pytest.mark.parametrize(("name", "dims"), [
    *(("hopper", dims) for dims in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))),
    *(("ampere", dims) for dims in ((64, 64), (128, 128), (192, 128)))], ids=str)
def test_every_kernel(name, dims, length, mask, dtype):
    """Those of one and of two tiles of keys (whose loop of one step is no loop), of short rows, and of long ones, which
    do not look at each maximum; scores of which float16's weights would overflow by the rounding of a maximum, and
    bfloat16's.
    """
    check_all(dtype, dims, length, mask, sizes=(1e3, 1e5, 1e7, 1e10), only=name)


@pytest.mark.parametrize("scale", [-0.2, 2.0])
def test_a_scale_of_either_sign(scale):
    check_all("bfloat16", (64, 64), 130, Causal(), sizes=(1e3, 1e6), scale=scale)


@pytest.mark.parametrize("softcap", [50.0, 1e3, 1e6, 1e30])
def test_large_soft_caps(softcap):
    """1 - 2 / (e^2x + 1) has an absolute error of 6e-8, and that was multiplied by the cap."""
    sizes = (1.0, 30.0) if softcap < 1e6 else (1.0, 30.0, 1e3, 1e6)
    check_all("bfloat16", (64, 64), 130, Causal(), sizes=sizes, softcap=softcap)


def test_queries_and_keys_that_are_constants_of_a_program():
    """XLA multiplied some of them while it compiled the forward, summed up another way: dv was off by 5 %."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(3e3 * rng.standard_normal((2, length, 1, 64)), "float32") for length in (300, 1100))
    v = jnp.asarray(rng.standard_normal((2, 1100, 1, 64)), "float32")
    dv = jax.jit(jax.grad(lambda v: flash_attention(q, k, v, implementation="xla").sum()))(v)
    np.testing.assert_allclose(np.asarray(dv, np.float64).sum(axis=1), 300, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("q_row", "k_row"), [
    ([3e4] * 16, [3e4] * 16), ([6e4, -6e4] + [0] * 14, [6e4, 6e4] + [0] * 14), ([2.0] * 16, [-3e4] * 16)],
    ids=["large", "cancelling", "negative"])
def test_ties_share_their_weight(dtype, q_row, k_row):
    """Every product and sum is exact, so all keys weigh the same: the gradient of a sum over 128 queries is 1. Sums
    that began at -lse lost it beside products of 4e9 that cancel: the gradient was 128.
    """
    q, k = (jnp.broadcast_to(jnp.asarray(row, dtype), (1, 128, 1, 16)) for row in (q_row, k_row))
    v = jnp.asarray(np.random.default_rng(0).standard_normal((1, 128, 1, 16)), dtype)
    for name in able(q, v, Full()):
        dv = jax.grad(lambda v, name=name: flash_attention(q, k, v, implementation=name).astype("float32").sum())(v)
        np.testing.assert_allclose(np.asarray(dv, np.float32), 1, rtol=max(2 * float(jnp.finfo(dtype).eps), 2e-5))


@pytest.mark.parametrize("score", [1.5e3, 1.5e5, 1.5e8, -1.5e8])
def test_one_key_has_a_weight_of_one(score):
    one = jnp.ones((1, 1, 1, 1))
    for name in able(one, one, Full()):
        dv = jax.grad(lambda v, name=name: flash_attention(
            one * score, one, v, scale=1.0, implementation=name).sum())(one)
        assert dv == 1, name


def test_a_bias_below_the_anchor():
    """fp32: dv lost up to 6e-5 where the row's largest bias lies below 1e3, where the anchor starts."""
    q, k, v, dout = (x[:, :40] for x in case("float32", (16, 16), 40, 3.0))
    bias = jnp.asarray(np.random.default_rng(0).uniform(900, 990, (1, 2, 40, 40)), "float32")

    def dv(name, **options):
        with jax.enable_x64(bool(options)):
            wide = [jnp.asarray(np.asarray(x), **options) for x in (q, k, v, dout, bias)]
            attend = lambda v: flash_attention(wide[0], wide[1], v, bias=wide[4], implementation=name)
            return np.asarray(jax.vjp(attend, wide[2])[1](wide[3])[0])
    exact = dv("reference", dtype="float64")
    for name in ("xla", "reference"):  # a step of float32 at 990 is 6e-5, and each score is rounded once
        assert np.linalg.norm(dv(name) - exact) <= 4e-5 * np.linalg.norm(exact), name


def test_probabilities_are_at_most_one():
    """Scores that are not what they were in the forward must not make an exponential overflow."""
    p = softmax.probabilities(jnp.asarray([[300.0, 0.0, -jnp.inf]]), 1.0, jnp.zeros(1), jnp.zeros(1))
    np.testing.assert_array_equal(p, [[1, 1, 0]])


@pytest.mark.parametrize("dtype, bits", [(np.float32, 34), (np.float64, 70)])
@pytest.mark.parametrize("unit", [1.0, 0.125, 96**-0.5, 0.3, 50.0, 7e-5, 1e-30])
def test_the_rest_of_a_lone_lse_makes_it_exact(unit, dtype, bits):
    """The reference point alone is 2^-22 off, and a row of lse 1e4 with it by 2e-3."""
    rng = np.random.default_rng(0)
    lse = (rng.choice([-1, 1], 300) * 10 ** rng.uniform(-3, 6, 300)).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        kept, rest = jax.jit(softmax.from_lse, static_argnums=1)(lse, unit)
        point = softmax.reference_point(jnp.asarray(lse), unit)
        assert (kept == lse).all() and kept.dtype == rest.dtype == dtype
    exactly = functools.partial(map, lambda x: fractions.Fraction(float(x)))
    for x, start, left in zip(*map(exactly, (lse, np.asarray(point), np.asarray(rest))), strict=True):
        assert abs((start + left) * fractions.Fraction(unit) - x) <= abs(x) * fractions.Fraction(2) ** -bits


def test_the_rest_of_a_row_that_attends_to_nothing_is_zero():
    lse, rest = softmax.from_lse(jnp.asarray([-jnp.inf, 0.0]), 0.3)
    assert lse.tolist() == [-jnp.inf, 0.0] and rest.tolist() == [0.0, 0.0]
