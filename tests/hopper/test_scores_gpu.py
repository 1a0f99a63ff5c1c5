"""Score functions in the Hopper kernels on a GPU: out, lse and all gradients against the reference in float32, with NaN
and infinities in keys that masks and functions hide.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_flash as pf
from hopper.test_scores import Everything, normal
from pallas_flash import ALiBi, Causal, Full, InBounds, RelativeBias, SegmentIds, Window, scores
from pallas_flash.testing import conformance, problems

pytestmark = pytest.mark.gpu

BATCH, Q_LEN, KV_LEN, HEADS = 2, 400, 333, 4
DIMS = (64, 128, 256)
IDS = np.repeat(np.arange(9, dtype=np.int32), 50)


def capped(score, batch, head, q_pos, kv_pos):
    return 5 * jnp.tanh(score / 5) + 0.3 * score


def steep(score, batch, head, q_pos, kv_pos):
    """With derivatives far beyond 1, and negative ones."""
    return jnp.where((q_pos + kv_pos) % 3 == 0, -4 * score, jnp.sin(3 * score) + 0.1 * score**3)


def everything():
    return Everything(normal(HEADS, 21), np.arange(BATCH * Q_LEN, dtype=np.int32).reshape(BATCH, Q_LEN) // 7,
                      np.arange(HEADS) % 2 == 0, np.array(2, np.int32))


CASES = {
    "alibi": (ALiBi(pf.alibi_slopes(HEADS)), dict(mask=Causal())),
    "alibi-offsets": (ALiBi(pf.alibi_slopes(HEADS), offset=np.array([-67, 3], np.int32)),
                      dict(mask=InBounds(kv_len=np.array([200, 333])))),
    "alibi-documents": (ALiBi(pf.alibi_slopes(HEADS)), dict(mask=SegmentIds(IDS[:Q_LEN], IDS[:KV_LEN]))),
    "alibi-softcap": (ALiBi(pf.alibi_slopes(HEADS)), dict(mask=Causal(), softcap=2.0)),
    "alibi-dropout": (ALiBi(pf.alibi_slopes(HEADS)), dict(mask=Full(), dropout_rate=0.2)),
    "table": (RelativeBias(normal(HEADS, 81)), dict(mask=Window(150, 60))),
    "table-float16": (RelativeBias(normal(HEADS, 81)), dict(mask=Full(), dtype="float16")),
    "capped": (capped, dict(mask=Causal())),
    "capped-deterministic": (capped, dict(mask=Causal(-70), deterministic=True)),
    "steep-float16": (steep, dict(mask=Full(), dtype="float16")),
    "everything": (everything(), dict(mask=Causal(5))),
    "everything-deterministic": (everything(), dict(mask=Causal(5), deterministic=True)),
}


def arrays_of(d, dtype="bfloat16"):
    shapes = (Q_LEN, HEADS), (KV_LEN, 2), (KV_LEN, 2), (Q_LEN, HEADS)
    return [jnp.asarray(np.random.default_rng(i).standard_normal((BATCH, *shape, d)), dtype)
            for i, shape in enumerate(shapes)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def program(name, implementation, dtype, q, k, v, dout):
    """out, lse, and the gradients of q, k, v and the function's arrays."""
    function, options = CASES[name]
    function, options = scores.checked(function), {x: y for x, y in options.items() if x != "dtype"}
    if "dropout_rate" in options:
        options["dropout_rng"] = jnp.array([1, 2], jnp.uint32)

    def call(q, k, v, floats):
        return pf.flash_attention(q, k, v, score=function.filled(floats, scores.integers(function)), return_lse=True,
                                  implementation=implementation, **options)
    given = *(x.astype(dtype) for x in (q, k, v)), tuple(map(jnp.asarray, scores.floats(function)))
    (out, lse), pullback = jax.vjp(call, *given)
    return out, lse, *pullback((dout.astype(out.dtype), jnp.where(lse > -jnp.inf, jnp.cos(lse), 0)))


def agree(found, wanted, within=0.02):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        finite = np.isfinite(b)
        assert np.array_equal(finite, np.isfinite(a))
        assert np.abs(a[finite] - b[finite]).max() <= within * np.abs(b[finite]).max()


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("name", CASES)
def test_score_functions_agree_with_the_reference(name, d):
    assert_agrees_with_the_reference(name, d, "hopper")


def assert_agrees_with_the_reference(name, d, implementation):
    dtype = CASES[name][1].get("dtype", "bfloat16")
    arrays = arrays_of(d, dtype)
    with jax.default_matmul_precision("highest"):
        wanted = program(name, "reference", "float32", *arrays)
    agree(program(name, implementation, dtype, *arrays), wanted)


@pytest.mark.parametrize("d", DIMS)
def test_keys_that_a_function_hides_reach_nothing(d):
    """The mask keeps their tiles whole. Every query's sums with them are made again, a key at a time."""
    q, k, v, dout = arrays_of(d)
    clean = program("everything", "hopper", "bfloat16", q, k, v, dout)
    for value in (np.nan, np.inf):
        bad = [x.at[:, 5::11].set(value) for x in (k, v)]
        found = program("everything", "hopper", "bfloat16", q, *bad, dout)
        agree(found, clean)
        for gradient in found[3:5]:  # dk, dv
            assert not np.asarray(gradient, np.float32)[:, 5::11].any()


@pytest.mark.parametrize("d", DIMS)
def test_a_bad_key_reaches_the_queries_that_see_it_alone(d):
    """Rows before it are added up again, with weights that are not rounded to bfloat16: so their out, and through
    delta their dq, differ from a clean run's by roundings and both keep the budget.
    """
    check_a_bad_key(d, "hopper")


def check_a_bad_key(d, implementation, bad=77):
    problem = problems.Problem("a bad key", "see above", q_heads=HEADS, q_len=Q_LEN, kv_len=KV_LEN, d=d, d_v=d,
                               mask=Causal(), score=ALiBi(pf.alibi_slopes(HEADS)))
    before = dataclasses.replace(problem, q_len=bad, kv_len=bad)  # what the rows before it see
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    q, k, v = (x[:, :bad] for x in (operands.q, operands.k, operands.v))
    budget = conformance.budget(before, "bfloat16", operands._replace(q=q, k=k, v=v), (dout[:, :bad], dlse[..., :bad]))
    spoiled = operands.v.copy()
    spoiled[:, bad] = np.nan
    run = conformance.compiled(problem, implementation)
    for values in (operands.v, spoiled):
        found = run(operands._replace(v=values), (dout, dlse))
        if values is spoiled:
            assert all(np.isnan(np.asarray(x[:, bad:], np.float32)).all() for x in (found.out, found.dq))
        rows = dict(out=found.out[:, :bad], lse=found.lse[..., :bad], dq=found.dq[:, :bad])
        used = budget.used(budget.oracle._replace(**rows))
        assert max(used.values()) <= 1, used


def test_deterministic_gradients_repeat():
    arrays = arrays_of(128)
    first, second = (program("capped-deterministic", "hopper", "bfloat16", *arrays) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("lowest", [float(np.finfo(np.float32).min), -1e30, -1e9])
def test_keys_hidden_by_a_large_number_weigh_alike(lowest):
    """A row that sees no other key is their mean, and its gradients are finite."""
    q, k, v, dout = arrays_of(128)
    hides = lambda score, batch, head, q_pos, kv_pos: jnp.where(kv_pos < 70, lowest, score)

    def call(q, k, v):
        return pf.flash_attention(q, k, v, score=hides, mask=Causal(), implementation="hopper")
    out, pullback = jax.vjp(jax.jit(call), q, k, v)
    values = np.repeat(np.asarray(v, np.float32), 2, axis=2)
    np.testing.assert_allclose(np.asarray(out, np.float32)[:, 69], values[:, :70].mean(axis=1), atol=0.02)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (out, *pullback(dout)))


def test_packed_sequences_count_from_their_own_first_token():
    starts = np.array([0, 130, 130, 400], np.int32)
    q, k, v = (jnp.asarray(normal(400, heads, 128), "bfloat16") for heads in (4, 2, 2))

    def call(implementation, *qkv):
        return pf.flash_attention(*qkv, cu_seqlens_q=starts, cu_seqlens_kv=starts, mask=Causal(),
                                  score=ALiBi(pf.alibi_slopes(HEADS)), implementation=implementation)
    with jax.default_matmul_precision("highest"):
        wanted = call("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    agree(call("hopper", q, k, v), wanted)


def test_vmap_over_functions():
    q, k, v, _ = arrays_of(64)
    slopes = normal(3, HEADS)
    call = lambda q, slopes: pf.flash_attention(q, k, v, score=ALiBi(slopes), mask=Causal(), implementation="hopper")
    stacked = jnp.stack([q, 2 * q, -q])
    found = jax.vmap(call)(stacked, slopes)
    agree(found, jnp.stack([call(*x) for x in zip(stacked, slopes)]))
