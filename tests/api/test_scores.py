"""Score functions: values and gradients against the scores written out, and what they must not reach."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_flash as pf
from pallas_flash import ALiBi, Causal, RelativeBias, Score, UnsupportedError, Window, autodiff, device, explain, masks

pytestmark = pytest.mark.usefixtures("small_tiles", "full_precision")

B, T, S, H, K, D = 2, 13, 15, 4, 2, 8
Q, KEY, V = normal(0, B, T, H, D), normal(1, B, S, K, D), normal(2, B, S, K, D)
DOUT, DLSE = normal(4, B, T, H, D), normal(5, B, H, T)
SLOPES, TABLE, CURVES = abs(normal(6, H)), normal(7, H, 7), normal(8, H, S)
LAST = Causal(offset=S - T)
EMPTY_ROWS = Causal(offset=-4)


@dataclasses.dataclass(frozen=True)
class Curved(Score):
    """Not monotone in the score, and NaN with all its derivatives at keys after the query."""

    curves: Any
    groups: Any
    bend: float = 0.5

    def __call__(self, score, batch, head, q_pos, kv_pos):
        before = jnp.sqrt((q_pos + S - T - kv_pos).astype(score.dtype) + 1e-3)
        amount = self.curves[head, kv_pos] * before * (1 + self.groups[batch]).astype(score.dtype)
        return score + self.bend * amount * jnp.sin(score)


def curved(curves=CURVES):
    return Curved(curves, np.array([0, 2], np.int32))


def program(call, differentiated=4):
    """A program of arrays that gives (out, lse) and the gradients of the first arrays."""
    def run(*arrays):
        results, vjp = jax.vjp(lambda *given: call(*given, *arrays[differentiated:]), *arrays[:differentiated])
        return results, vjp((jnp.asarray(DOUT, results[0].dtype), jnp.asarray(DLSE, results[1].dtype)))
    return jax.jit(run)


def everything(call, *arrays):
    return program(call)(*arrays)


def attention(q, k, v, array, make, **options):
    return pf.flash_attention(q, k, v, score=make(array), return_lse=True, **options)


def plain(q, k, v, array, change, mask=LAST, scale=D ** -0.5):
    """The scores written out: change(scores, array, q_pos, kv_pos), all of them at once."""
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    at = np.arange(q.shape[1], dtype=np.int32)[:, None], np.arange(k.shape[1], dtype=np.int32)[None, :]
    keep = masks.over_batch(mask.canonical(), lambda part: part.keep(*at))
    s = jnp.where(keep, change(jnp.einsum("bqhd,bshd->bhqs", q, k) * scale, array, *at), -jnp.inf)
    some = keep.any(axis=-1, keepdims=True)
    p = jnp.where(some, jax.nn.softmax(jnp.where(some, s, 0.0)), 0.0)
    lse = jnp.where(some[..., 0], jax.nn.logsumexp(jnp.where(some, s, 0.0), axis=-1), -jnp.inf)
    return jnp.einsum("bhqs,bshd->bqhd", p, v), jnp.broadcast_to(lse, (B, H, T))


def by_alibi(s, slopes, q_pos, kv_pos):
    return s - slopes[None, :, None, None] * abs(q_pos + S - T - kv_pos)[None, None].astype(s.dtype)


def by_table(s, table, q_pos, kv_pos):
    return s + table[:, np.clip(kv_pos - q_pos - (S - T) + 3, 0, 6)][None]


def by_curves(s, curves, q_pos, kv_pos):
    before = jnp.sqrt(np.maximum(q_pos + S - T - kv_pos, 0) + 1e-3).astype(s.dtype)[None, None]
    amount = curves[None, :, None, :] * before * jnp.array([1, 3], s.dtype)[:, None, None, None]
    return s + 0.5 * amount * jnp.sin(s)


CASES = {
    "alibi, an offset as an array, empty rows": (
        SLOPES, lambda x: ALiBi(x, offset=np.full(B, S - T)), by_alibi, EMPTY_ROWS),
    "table": (TABLE, functools.partial(RelativeBias, offset=S - T), by_table, Window(left=9, right=5)),
    "a function of one's own": (CURVES, curved, by_curves, LAST),
}


@pytest.mark.parametrize(("array", "make", "change", "mask"), CASES.values(), ids=CASES)
def test_scores_written_out(array, make, change, mask, x64):
    """Every gradient, that of the function's array too, to nearly all digits of float64."""
    arrays = [np.asarray(x, np.float64) for x in (Q, KEY, V, array)]
    found = everything(functools.partial(attention, make=make, mask=mask), *arrays)
    wanted = everything(functools.partial(plain, change=change, mask=mask), *arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), found, wanted)


# What must not leak --------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Poisonous(Score):
    """NaN, and so are its derivatives, at pairs that a causal mask with lengths hides."""

    weights: Any
    lengths: Any

    def __call__(self, score, batch, head, q_pos, kv_pos):
        inside = jnp.log((self.lengths[batch] - kv_pos).astype(score.dtype)) * jnp.log(
            (q_pos + 1 - kv_pos).astype(score.dtype) + 1e-3)
        return score * self.weights[head, 0] + self.weights[head, 1] * inside + 0 * jnp.sqrt(self.weights[batch, 2])


@functools.cache
def poisonous(implementation):
    """A program of (q, k, v, weights, lengths)."""
    return program(lambda q, k, v, weights, lengths: pf.flash_attention(
        q, k, v, score=Poisonous(weights, lengths), mask=Causal() & masks.InBounds(kv_len=lengths), return_lse=True,
        implementation=implementation), differentiated=4)


def test_derivatives_of_hidden_pairs_reach_nothing():
    """An entry of the batch without keys, a padded end, keys after the query: all of them NaN; and NaN in padding."""
    lengths, weights = np.array([0, 11], np.int32), abs(normal(10, H, 3))
    clean = poisonous("reference")(Q, KEY, V, weights, lengths)
    weights[0, 2] = -1  # read by the first entry of the batch alone
    q, key, v = Q.copy(), KEY.copy(), V.copy()
    q[0], key[0], v[0], key[1, 11:], v[1, 11:] = np.nan, np.nan, np.nan, np.nan, np.nan
    for implementation in ("xla", "reference"):
        assert_agree(poisonous(implementation)(q, key, v, weights, lengths), clean)


def test_no_pair_at_all_attends():
    """A function that is NaN everywhere, behind a mask that hides all."""
    for implementation in ("xla", "reference"):
        (out, _), grads = poisonous(implementation)(Q, KEY, V, -np.ones((H, 3), np.float32), np.zeros(B, np.int32))
        assert not np.any(out) and not any(np.any(x) for x in grads)


@dataclasses.dataclass(frozen=True)
class Logarithm(Score):
    """-inf, with infinite derivatives, at some pairs of some heads; all pairs of the query 3."""

    weights: Any

    def __call__(self, score, batch, head, q_pos, kv_pos):
        return score + self.weights[head] * jnp.log(
            jnp.where(q_pos == 3, 0, (q_pos - kv_pos) % 3).astype(score.dtype) * self.weights[head])


def test_minus_infinity_hides_a_pair():
    weights = abs(normal(11, H)) + 0.5
    at = np.arange(T)[:, None], np.arange(S)[None, :]
    hidden = masks.Dense(((at[0] - at[1]) % 3 != 0) & (at[0] != 3))
    found = program(functools.partial(attention, make=Logarithm))
    wanted = everything(functools.partial(attention, make=Logarithm, implementation="reference", mask=hidden),
                        Q, KEY, V, weights)
    assert_agree(found(Q, KEY, V, weights), wanted)
    poisoned = V.copy()
    poisoned[:, 4] = np.inf  # reaches the queries that attend to it alone
    (out, _), _ = found(Q, KEY, poisoned, weights)
    assert np.array_equal(np.isfinite(out).all((0, 2, 3)), ~np.asarray(hidden.attend)[:, 4])


def test_not_finite_where_a_pair_attends_reaches_its_row_alone():
    spoilt = lambda score, batch, head, q_pos, kv_pos: jnp.where((q_pos == 5) & (kv_pos == 2) & (head == 1), jnp.nan,
                                                                 score)
    (out, lse), grads = everything(lambda q, k, v: pf.flash_attention(
        q, k, v, score=spoilt, mask=Causal(), return_lse=True), Q, KEY, V)
    row = (np.arange(T)[:, None] == 5) & (np.arange(H) == 1)
    assert np.array_equal(np.isnan(out).any((0, 3)), row) and np.array_equal(np.isnan(lse).any(0).T, row)
    assert np.array_equal(np.isnan(grads[0]).any((0, 3)), row)
    keys = (np.arange(S)[:, None] <= 5) & (np.arange(K) == 0)
    assert all(np.array_equal(np.isnan(x).any((0, 3)), keys) for x in grads[1:])


@dataclasses.dataclass(frozen=True)
class Low(Score):
    low: Any

    def __call__(self, score, batch, head, q_pos, kv_pos):
        return jnp.where(q_pos < 4, self.low, score)


@pytest.mark.parametrize("low", [np.finfo(np.float32).min, -1e9, -1.2345678e30])
def test_a_row_of_the_smallest_scores_is_the_mean(low):
    """Regression: lse holds no logarithm of the number of keys beside such a score, and gradients were n times too
    large."""
    call = lambda q, k, v: pf.flash_attention(q, k, v, score=Low(np.array(low, np.float32)))
    out, vjp = jax.vjp(call, Q, KEY, V)
    dv = vjp(jnp.where((np.arange(T) < 4)[:, None, None], DOUT, 0))[2]
    grouped = DOUT[:, :4].reshape(B, 4, K, H // K, D).sum((1, 3)) / S
    assert_agree(np.asarray(out[:, :4]), np.broadcast_to(np.repeat(V.mean(1), H // K, 1)[:, None], (B, 4, H, D)))
    assert_agree(np.asarray(dv), np.broadcast_to(grouped[:, None], V.shape))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_row_of_the_smallest_scores_and_biases_is_the_mean(implementation):
    """Regression: where the function hides the one key whose bias is not finfo.min, gradients were n times too large
    in xla; where both are finfo.min, in xla, too, and the reference gave 0."""
    least, first = jnp.finfo("float32").min, np.where(np.arange(T) < 4, 0, 1)[:, None]  # key 0 of queries from 4 on
    function = lambda score, batch, head, q_pos, kv_pos: jnp.where(
        q_pos < 4, least, jnp.where(kv_pos == 0, -jnp.inf, score))
    bias = np.where(first & (np.arange(S) == 0), 0, least).astype(np.float32)
    call = lambda q, k, v: pf.flash_attention(q, k, v, score=function, bias=bias, implementation=implementation)
    out, vjp = jax.vjp(call, Q, KEY, V)
    weights = np.where(np.arange(S) >= first, 1 / (S - first), 0).astype(np.float32)
    by_heads = lambda x: x.reshape(B, T, K, H // K, D)
    assert_agree(by_heads(np.asarray(out)), np.broadcast_to(
        np.einsum("ts,bskd->btkd", weights, V)[:, :, :, None], (B, T, K, H // K, D)))
    assert_agree(np.asarray(vjp(jnp.asarray(DOUT))[2]), np.einsum("ts,btkgd->bskd", weights, by_heads(DOUT)))


# Transforms, shards, packed sequences ---------------------------------------------------------------------------------

def test_packed_sequences_count_from_their_own_first_token():
    """As one call for each sequence, with keys that differ in number, aligned at their ends; an empty one between."""
    q_starts, kv_starts = [0, 5, 5, 12], [0, 4, 6, 15]
    packed = lambda q, k, v, x: pf.flash_attention(
        q[0], k[0], v[0], score=RelativeBias(x), mask=Causal(), cu_seqlens_q=q_starts, cu_seqlens_kv=kv_starts,
        alignment="last")[None]

    def each(q, k, v, x):
        found = []
        for i in range(3):
            (a, b), (c, d) = q_starts[i:i + 2], kv_starts[i:i + 2]
            score = RelativeBias(x, offset=(d - c) - (b - a)) if b > a else None
            found.append(pf.flash_attention(q[:1, a:b], k[:1, c:d], v[:1, c:d], score=score, implementation="reference",
                                            mask=Causal(offset=(d - c) - (b - a))))
        return jnp.concatenate([*found, jnp.zeros((1, T - 12, H, D), q.dtype)], axis=1)
    one, other = (jax.jit(lambda *a, call=call: (call(*a), jax.vjp(call, *a)[1](DOUT[:1])))(
        Q[:1], KEY[:1], V[:1], TABLE) for call in (packed, each))
    assert_agree(one, other)


def test_packed_sequences_of_equal_boundaries_keep_the_table():
    tokens = KEY[0]
    q, starts = normal(12, S, H, D), jnp.array([0, 4, 15], "int32")
    found = pf.flash_attention(q, tokens, V[0], score=RelativeBias(TABLE), cu_seqlens_q=starts)
    wanted = pf.flash_attention(q, tokens, V[0], score=RelativeBias(TABLE), mask=masks.SegmentIds(
        *[np.repeat([0, 1], [4, 11])] * 2))
    assert_agree(found, wanted)


def test_vmap_grad_and_remat():
    tables, policy = normal(13, B, H, 7), jax.checkpoint_policies.save_only_these_names(*pf.RESIDUAL_NAMES)

    def gradients(implementation):
        def loss(q, table):
            return pf.flash_attention(q, KEY[0], V[0], score=RelativeBias(table), mask=Causal(),
                                      implementation=implementation).sum()
        return jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1))
    by_reference = jax.jit(gradients("reference"))
    wanted = [by_reference(Q[i], tables[i]) for i in range(B)]
    assert_agree(jax.jit(jax.vmap(gradients("xla")))(Q, tables), jax.tree.map(lambda *xs: jnp.stack(xs), *wanted))


def test_second_derivatives_are_those_of_the_reference():
    call = lambda curves, implementation: pf.flash_attention(
        Q[:1, :3], KEY[:1, :4], V[:1, :4], score=Curved(curves, np.zeros(1, np.int32)), mask=Causal(offset=1),
        implementation=implementation).sum()
    twice = jax.jvp(jax.grad(functools.partial(call, implementation="reference")), (CURVES,), (CURVES,))[1]
    assert np.isfinite(twice).all() and np.any(twice)
    with pytest.raises(UnsupportedError, match="derivatives of a derivative"):
        jax.grad(lambda x: jax.grad(functools.partial(call, implementation="xla"))(x).sum())(CURVES)
    with pytest.raises(UnsupportedError, match="forward-mode"):
        jax.jvp(functools.partial(call, implementation="xla"), (CURVES,), (CURVES,))


def test_gradients_of_half_precision_arrays_are_summed_in_float32():
    """4,096 pairs add to the gradient, more than a sum in bfloat16 could count."""
    dtype = "bfloat16"
    shape = (1, 64, 1, 8)
    q, k, v = np.zeros(shape, dtype), np.zeros(shape, dtype), np.zeros(shape, dtype)
    call = lambda x: pf.flash_attention(q, k, v, score=ALiBi(x), return_lse=True)[1].sum()
    slopes = jnp.zeros(1, dtype)
    gradient = jax.grad(call)(slopes)
    distances = abs(np.subtract.outer(np.arange(64), np.arange(64))).mean(1).sum()
    assert gradient.dtype == dtype
    np.testing.assert_allclose(float(gradient[0]), -distances, rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.virtual
@pytest.mark.parametrize("kind", [AxisType.Explicit, "shard_map"])
def test_sharded_batch_and_heads(kind):
    """Under jit heads are those of the whole arrays; under shard_map the table is that of the shard's heads."""
    types = (AxisType.Auto if kind == "shard_map" else kind,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=types)
    by, of_heads = P("data", None, "model", None), P("model")
    call = lambda q, k, v, x, implementation="xla": pf.flash_attention(
        q, k, v, score=RelativeBias(x), mask=LAST, implementation=implementation)
    arrays, places = (Q, KEY, V, TABLE), (by, by, by, of_heads)
    wanted = jax.jit(lambda *a: jax.vjp(functools.partial(call, implementation="reference"), *a)[1](DOUT))(*arrays)
    if kind == "shard_map":
        call = jax.shard_map(call, mesh=mesh, in_specs=places, out_specs=by)
    placed = [jax.device_put(x, NamedSharding(mesh, place)) for x, place in zip((*arrays, DOUT), (*places, by))]
    found = jax.jit(lambda dout, *a: jax.vjp(call, *a)[1](dout))(placed[-1], *placed[:-1])
    assert_agree(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, wanted))


def test_memory_is_linear():
    """Of 64 times the tile, forward and backward: no array of q_len * kv_len, nor of heads * q_len * kv_len."""
    from pallas_flash.kernels.xla import schedule

    length = 64 * schedule.TARGET_BLOCK
    x = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
    loss = lambda q, t: pf.flash_attention(q, q, q, score=RelativeBias(t), mask=Causal(), implementation="xla").sum()
    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, jax.ShapeDtypeStruct((1, 2 * length - 1), jnp.float32))
    assert max(sizes(traced.jaxpr)) <= 64 * length


def sizes(jaxpr):
    """Of all arrays of a program, its loops included."""
    for equation in jaxpr.eqns:
        yield from (math.prod(x.aval.shape) for x in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from sizes(getattr(inner, "jaxpr", inner))


# Identity, and what is refused ----------------------------------------------------------------------------------------

def test_equal_functions_share_a_program():
    capped = lambda score, *place: 2 * jnp.tanh(score)
    autodiff.forward.clear_cache()
    for i in range(2):
        for score in (capped, curved(CURVES + i)):
            pf.flash_attention(Q, KEY, V, score=score)
    assert autodiff.forward._cache_size() == 2
    assert pf.AttentionSpec.of(Q, KEY, V, score=curved()) == pf.AttentionSpec.of(Q, KEY, V, score=curved(2 * CURVES))
    assert pf.AttentionSpec.of(Q, KEY, V, score=curved()) != pf.AttentionSpec.of(
        Q, KEY, V, score=dataclasses.replace(curved(), bend=1.0))


def test_a_number_that_a_function_closes_over_may_change():
    """The same function object with another number must not run the program of the old one."""
    factor = 1.0
    score = lambda score, *place: factor * score
    first, same = (pf.AttentionSpec.of(Q, KEY, V, score=score) for _ in range(2))
    factor = 0.0
    assert first == same != pf.AttentionSpec.of(Q, KEY, V, score=score)


@dataclasses.dataclass(frozen=True)
class Squared(ALiBi):
    def __call__(self, score, batch, head, q_pos, kv_pos):
        return super().__call__(score, batch, head, q_pos, kv_pos) ** 2


def test_another_function_is_not_what_its_base_class_is():
    """Regression: positions of packed sequences would not have been told to it."""
    assert ALiBi.is_relative and ALiBi.is_additive and not Squared.is_relative and not Squared.is_additive


@dataclasses.dataclass(frozen=True)
class SquaredTable(RelativeBias):
    def __call__(self, score, batch, head, q_pos, kv_pos):
        return super().__call__(score, batch, head, q_pos, kv_pos) ** 2


def test_another_function_is_not_read_as_its_base_class_is():
    """Regression: xla computed the function of the base class, whose columns it lays out by distance."""
    found, wanted = (pf.flash_attention(Q, KEY, V, score=SquaredTable(TABLE), implementation=name)
                     for name in ("xla", "reference"))
    assert_agree(found, wanted)


@dataclasses.dataclass
class Thawed(Score):
    def __call__(self, score, batch, head, q_pos, kv_pos):
        return score


@dataclasses.dataclass(frozen=True)
class Hidden(Score):
    slope: float = dataclasses.field(default=1.0, compare=False)

    def __call__(self, score, batch, head, q_pos, kv_pos):
        return score * self.slope


@dataclasses.dataclass(frozen=True)
class Listed(Score):
    numbers: Any

    def __call__(self, score, batch, head, q_pos, kv_pos):
        return score


GLOBAL = np.arange(H, dtype=np.float32)


def reads_a_global(score, batch, head, q_pos, kv_pos):
    return score + GLOBAL[head]


def closes_over(x):
    return lambda score, batch, head, q_pos, kv_pos: score + x[head]


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


REFUSED = {
    "an array": (lambda: TABLE, "score must be a function .* Add an array to the scores as `bias`"),
    "a name": (lambda: "alibi", "score must be a function .* got type.score.=str"),
    "a closure over an array": (
        lambda: closes_over(jnp.asarray(SLOPES)), "must not hold arrays.* which reads `x`.* as a field"),
    "a global array": (lambda: reads_a_global, "must not hold arrays.* which reads `GLOBAL`"),
    "a bound array": (lambda: functools.partial(lambda x, score, *place: score + x[0], SLOPES), "must not hold arrays"),
    "a class that is not frozen": (Thawed, "must be a frozen dataclass, got score=Thawed"),
    "a field that is not compared": (Hidden, "all fields of a class of score functions must take part in comparison"),
    "a field that is a list": (lambda: Listed([1, 2]), "Listed.numbers must be an array, or be hashable"),
    "slopes of other heads": (lambda: ALiBi(SLOPES[:3]), "ALiBi.slopes must be of the 4 heads of query, got one of 3"),
    "offsets of another batch": (lambda: ALiBi(SLOPES, offset=np.arange(1)), "must be of the 2 batch .* one of 1"),
    "a column between two": (lambda: RelativeBias(TABLE, zero=1.5), "must be a Python integer or None, got zero=1.5"),
    "a table of other heads": (lambda: RelativeBias(TABLE[:2]), "RelativeBias.table must be of the 4 heads"),
    "slopes of integers": (lambda: ALiBi(np.arange(4)), r"floating-point array \(q_heads,\), got int64"),
    "an offset of floats": (lambda: ALiBi(SLOPES, offset=1.5), "ALiBi.offset must be an integer"),
    "an even table": (lambda: RelativeBias(TABLE[:, :4]), "must have an odd number of distances, or `zero` be given"),
    "two results": (lambda: lambda score, *place: jnp.stack([score, score]),
                    r"one floating-point number .* shape=\(2,\)"),
    "no float": (lambda: lambda score, *place: score > 0, "one floating-point number for a pair, got dtype=bool"),
    "nothing": (lambda: lambda score, *place: None, "one floating-point number for a pair, got None. Return the score"),
    "too few parameters": (lambda: lambda score, batch: score,
                           r"must take \(score, batch, head, q_pos, kv_pos\), got <lambda>\(score, batch\)\. Give it"),
    "an if": (lambda: lambda score, batch, head, q_pos, kv_pos: score if q_pos > kv_pos else -score,
              "must work on traced scalars, got error=TracerBoolConversionError"),
    "a table that is float64": (lambda: RelativeBias(TABLE.astype(np.float64)),
                                "can be float64 only in JAX's 64-bit mode"),
}


@pytest.mark.parametrize(("score", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(score, message):
    with pytest.raises(ValueError, match=message):
        explain(Q, KEY, V, score=score())


@dataclasses.dataclass(frozen=True)
class Shadowing(pf.Score):
    GLOBAL: jax.Array

    def __call__(self, score, batch, head, q_pos, kv_pos):
        return score + self.GLOBAL[head]


def test_a_field_is_no_global_of_its_name():
    """A script whose class had a field called like an array of the script was told that it reads that array."""
    assert "Shadowing" in explain(Q, KEY, V, score=Shadowing(SLOPES))


def test_arrays_of_a_program_are_refused_in_functions():
    for transform in (jax.jit, jax.grad):
        with pytest.raises(ValueError, match="must not hold arrays"):
            transform(lambda x: pf.flash_attention(Q, KEY, V, score=closes_over(x)).sum())(jnp.asarray(SLOPES))


def test_shapes_are_enough_to_explain():
    x, kv = shape(B, T, H, D, dtype="bfloat16"), shape(B, S, K, D, dtype="bfloat16")
    text = explain(x, kv, kv, score=ALiBi(shape(H)), device=device.H200)
    assert "score=ALiBi(slopes=float32[4])" in text and "not 'hopper'" not in text
    with pytest.raises(UnsupportedError, match="takes a bias or a score function"), device.assume(device.H200):
        pf.flash_attention(x, x, x, score=ALiBi(shape(H)), bias=shape(1, 1, 1, T), implementation="hopper")
    with pytest.raises(ValueError, match="must hold values to compute with"):
        pf.flash_attention(Q, KEY, V, score=ALiBi(shape(H)))
    with pytest.raises(TypeError, match=r"context_parallel_attention\(\) has no argument `score`.* can be a bias"):
        pf.context_parallel_attention(Q, Q, Q, axis_name="x", score=ALiBi(SLOPES))
    with pytest.raises(TypeError, match=r"Pass score=ALiBi\(slopes\)"):
        pf.flash_attention(Q, KEY, V, alibi_slopes=SLOPES)


# What is given --------------------------------------------------------------------------------------------------------

def test_slopes_of_the_paper():
    np.testing.assert_allclose(pf.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(pf.alibi_slopes(12)[8:], 2.0 ** np.array([-0.5, -1.5, -2.5, -3.5]), rtol=1e-6)
    with pytest.raises(ValueError, match="heads must be an integer of at least 1"):
        pf.alibi_slopes(0)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_of_t5(bidirectional):
    """Compared with `T5Attention._relative_position_bucket` of transformers 5.24, whose import takes too long here."""
    def bucket(distance):
        count = 16 if bidirectional else 32
        far = abs(distance) if bidirectional else max(-distance, 0)
        log = math.log(max(far, 1) / (count // 2), 128 / (count // 2))
        found = far if far < count // 2 else min(count // 2 + int(log * (count // 2) + 1e-6), count - 1)
        return found + 16 * (bidirectional and distance > 0)
    weights = normal(14, 32, H)
    found = RelativeBias.t5(weights, bidirectional=bidirectional).table
    np.testing.assert_array_equal(found.T, weights[[bucket(distance) for distance in range(-128, 129)]])
    assert bucket(-300) == bucket(-128) and bucket(300) == bucket(128)


@pytest.mark.parametrize(("columns", "zero", "offset", "lengths"), [
    (5, None, 0, (3, 4)), (41, None, 2, (3, 4)), (1, 0, 0, (1, 1)), (4, 9, 0, (5, 2)), (4, -3, 1, (2, 6)),
    (6, 0, -9, (4, 4)),
])
def test_one_column_a_distance_is_the_same_table(columns, zero, offset, lengths):
    table = RelativeBias(jnp.asarray(normal(15, H, columns)), zero=zero, offset=offset)
    from pallas_flash import scores

    pairs = scores.tile(1, H, *(jnp.arange(n, dtype=jnp.int32) for n in lengths))
    zeros = jnp.zeros((1, H, *lengths))
    np.testing.assert_array_equal(table.expanded(*lengths).on_tile(zeros, pairs), table.on_tile(zeros, pairs))


def test_inputs_that_nothing_reads_change_nothing():
    """A table whose far columns no pair reads may hold anything there."""
    mask, table = Window(left=1, right=1), TABLE.copy()
    table[:, :1], table[:, 6:] = np.nan, np.inf
    run = program(functools.partial(attention, make=RelativeBias, mask=mask))
    clean, spoilt = (run(Q, KEY, V, x) for x in (TABLE, table))
    jax.tree.map(np.testing.assert_array_equal, clean, spoilt)
