"""The public functions against `jax.nn` and plain formulas: arguments, layouts, edges, what may and may not leak."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, normal

from pallas_flash import Causal, Dense, SegmentIds, Window, dot_product_attention, explain, flash_attention

pytestmark = pytest.mark.usefixtures("small_tiles", "full_precision")

B, L, H, K, D, DV = 2, 15, 4, 2, 4, 3
Q, KEY, V = normal(0, B, L, H, D), normal(1, B, L, K, D), normal(2, B, L, K, DV)
DOUT, DLSE = normal(3, B, L, H, DV), normal(4, B, H, L)
IMPLEMENTATIONS = ["xla", "reference"]


def gradients(call, *arrays, cotangents=(DOUT, DLSE)):
    """(out, lse) of a call, and the gradients of a random function of both."""
    results, vjp = jax.vjp(call, *map(jnp.asarray, arrays))
    return results, vjp(tuple(map(jnp.asarray, cotangents)))


def attention(*arrays, **keywords):
    """flash_attention of q, k, v and, if it is given, bias; with lse."""
    q, k, v, bias = arrays if len(arrays) == 4 else (*arrays, None)
    return flash_attention(q, k, v, bias=bias, return_lse=True, **keywords)


# jax.nn.dot_product_attention -----------------------------------------------------------------------------------------

DENSE = np.random.default_rng(5).random((B, H, L, L)) < 0.5
DENSE[..., 0] = True  # every query attends to something
LENGTHS = np.array([9, 12], np.int32)
SAME = {
    "plain": {},
    "bias": dict(bias=normal(6, B, H, L, L)),
    "bias of rows and columns": dict(bias=normal(6, L, L)),
    "bias of keys": dict(bias=normal(6, B, 1, 1, L)),
    "mask": dict(mask=DENSE),
    "mask of heads": dict(mask=DENSE[0]),
    "mask of rows and columns": dict(mask=DENSE[0, 0]),
    "mask of keys": dict(mask=DENSE[:, :1, :1]),
    "mask of 1 axis": dict(mask=DENSE[0, 0, 0]),
    "causal": dict(is_causal=True),
    "key lengths": dict(key_value_seq_lengths=LENGTHS),
    "lengths": dict(query_seq_lengths=LENGTHS, key_value_seq_lengths=LENGTHS[::-1]),
    "window": dict(local_window_size=3),
    "window of two sides": dict(local_window_size=(2, 1)),
    "causal window": dict(local_window_size=(4, 2), is_causal=True),
    "scale": dict(scale=0.3),
    "scale 0": dict(scale=0.0),
    "everything": dict(bias=normal(6, B, 1, L, L), mask=DENSE, is_causal=True, query_seq_lengths=LENGTHS,
                       key_value_seq_lengths=LENGTHS, local_window_size=(11, 0), scale=-0.5),
}


def standard_promotion():
    """jax.nn mixes dtypes."""
    return jax.numpy_dtype_promotion("standard")


def real_queries(keywords):
    """(batch, q_len): which queries attend to something."""
    return np.arange(L) < np.reshape(keywords.get("query_seq_lengths", [L] * B), (B, 1))


@pytest.mark.parametrize("keywords", SAME.values(), ids=SAME)
def test_same_as_jax_nn(keywords):
    v = normal(2, B, L, K, D)  # jax.nn needs d_v == d
    call = lambda function, **options: jax.jit(
        lambda *qkv: function(*qkv, return_residual=True, **keywords, **options))(Q, KEY, v)
    found, wanted = call(dot_product_attention, implementation="reference"), call(jax.nn.dot_product_attention)
    assert_agree(*(jax.tree.map(lambda x: x[real_queries(keywords)], results) for results in (found, wanted)))


def test_same_signature_as_jax_nn():
    """Names, order, kinds and defaults; ours come after."""
    ours, theirs = (list(inspect.signature(f).parameters.values())
                    for f in (dot_product_attention, jax.nn.dot_product_attention))
    strip = lambda parameters: [(p.name, p.kind, p.default) for p in parameters]
    assert strip(ours)[:len(theirs)] == strip(theirs)
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in ours[len(theirs):])


def test_same_gradients_as_jax_nn():
    keywords, v = SAME["everything"], normal(2, B, L, K, D)
    dout = np.where(real_queries(keywords)[..., None, None], normal(3, B, L, H, D), 0)

    def call(function, implementation):
        run = lambda q, k, v, bias: function(q, k, v, **{**keywords, "bias": bias}, implementation=implementation)
        return jax.jit(lambda *x: jax.vjp(run, *x)[1](dout))(Q, KEY, v, keywords["bias"])
    wanted = call(jax.nn.dot_product_attention, None)
    for implementation in IMPLEMENTATIONS:
        assert_agree(call(dot_product_attention, implementation), wanted)


@pytest.mark.parametrize("keywords", [dict(is_causal=True, bias=normal(6, H, L, L)), dict(mask=DENSE[0])])
def test_same_as_jax_nn_without_a_batch(keywords):
    call = lambda function, **options: jax.jit(
        lambda *qkv: function(*qkv, return_residual=True, **keywords, **options))(Q[0], KEY[0], normal(2, L, K, D))
    found, wanted = call(dot_product_attention, implementation="reference"), call(jax.nn.dot_product_attention)
    assert_agree(found, wanted)


@pytest.mark.parametrize("heads", [1, 4])
def test_same_as_jax_nn_in_bfloat16(heads):
    q, k, v = (normal(i, B, L, n, D, dtype=jnp.bfloat16) for i, n in enumerate((4, heads, heads)))
    found, lse = dot_product_attention(q, k, v, is_causal=True, return_residual=True, implementation="reference")
    with standard_promotion():
        wanted, lse_there = jax.jit(
            lambda *qkv: jax.nn.dot_product_attention(*qkv, is_causal=True, return_residual=True))(q, k, v)
    assert_agree((found, lse.astype(jnp.bfloat16)), (wanted, lse_there))


def test_more_than_jax_nn():
    """softcap, dropout and segment_ids are those of flash_attention."""
    ids = np.sort(np.random.default_rng(7).integers(0, 3, (B, L)))
    more = dict(softcap=2.0, dropout_rate=0.5, dropout_rng=jax.random.key(0), segment_ids=ids,
                implementation="reference")
    found = dot_product_attention(Q, KEY, V, is_causal=True, **more)
    assert_agree(found, flash_attention(Q, KEY, V, mask=Causal(), **more))


def test_difference_queries_that_attend_to_nothing():
    """0 here, the mean of value there."""
    v = normal(2, B, L, K, D)
    found, lse = dot_product_attention(Q, KEY, v, mask=np.zeros((1, 1, L, L), bool), return_residual=True,
                                       implementation="reference")
    assert not found.any() and (lse == -np.inf).all()
    there = jax.nn.dot_product_attention(Q, KEY, v, mask=np.zeros((1, 1, L, L), bool))
    assert_agree(there, jnp.asarray(np.repeat(np.broadcast_to(v.mean(1, keepdims=True), v.shape), H // K, axis=2)))


def test_difference_nan_in_padding():
    v = normal(2, B, L, K, D)
    v[:, 9:] = np.nan
    call = dict(key_value_seq_lengths=np.array([9, 9], np.int32))
    assert np.isfinite(dot_product_attention(Q, KEY, v, **call, implementation="reference")).all()
    assert np.isnan(jax.nn.dot_product_attention(Q, KEY, v, **call)).all()


def test_difference_lse_has_a_gradient_and_is_float32():
    q, k, v = (normal(i, B, L, K, D, dtype=jnp.bfloat16) for i in range(3))
    ours = lambda q: dot_product_attention(q, k, v, return_residual=True, implementation="reference")[1]
    there = lambda q: jax.nn.dot_product_attention(q, k, v, return_residual=True)[1]
    has_gradient = lambda lse: jax.jit(jax.grad(lambda q: lse(q).sum()))(q).any()
    with standard_promotion():
        assert (jax.eval_shape(ours, q).dtype, jax.eval_shape(there, q).dtype) == (jnp.float32, jnp.bfloat16)
        assert has_gradient(ours) and not has_gradient(there)


def test_difference_names_of_implementations():
    with pytest.raises(ValueError, match=r"one of .*'xla'.*, got implementation='cudnn'. Pass None"):
        dot_product_attention(Q, KEY, V, implementation="cudnn")


# Layouts and kinds of arrays ------------------------------------------------------------------------------------------

def heads_first(x):
    return x.swapaxes(1, 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layouts(implementation):
    rows = dict(mask=Causal(), implementation=implementation)
    (out, lse), grads = gradients(lambda *qkv: attention(*qkv, **rows), Q, KEY, V)
    found = gradients(lambda *qkv: attention(*qkv, layout="BHLD", **rows), *map(heads_first, (Q, KEY, V)),
                      cotangents=(heads_first(DOUT), DLSE))
    assert_agree(found, ((heads_first(out), lse), tuple(map(heads_first, grads))))


@pytest.mark.parametrize("layout", ["BLHD", "BHLD"])
def test_without_a_batch(layout):
    ids = np.sort(np.random.default_rng(7).integers(0, 3, L))
    order = (0, 1, 2) if layout == "BLHD" else (1, 0, 2)
    q, k, v = (x[0].transpose(order) for x in (Q, KEY, V))
    rules = dict(kv_lengths=12, layout=layout, implementation="reference", return_lse=True)
    mask = Causal() & Dense(DENSE[:1])
    found = flash_attention(q, k, v, segment_ids=ids, bias=normal(6, H, L, L), mask=mask, **rules)
    with_batch = flash_attention(q[None], k[None], v[None], segment_ids=ids[None], bias=normal(6, 1, H, L, L),
                                 mask=mask, **rules)
    assert_agree(found, jax.tree.map(lambda x: x[0], with_batch))


def test_numpy_and_jax_arrays_are_the_same():
    rules = dict(mask=Causal(np.array([1, 0])), bias=normal(6, L, L), segment_ids=np.zeros((B, L), np.int8),
                 kv_lengths=[9, 12], implementation="reference")
    found = flash_attention(Q, KEY, V, **rules)
    assert isinstance(found, jax.Array)
    in_jax = jax.tree.map(jnp.asarray, rules | dict(kv_lengths=np.array([9, 12]), implementation=None))
    assert_agree(flash_attention(*map(jnp.asarray, (Q, KEY, V)), **in_jax | dict(implementation="reference")), found)


@pytest.mark.parametrize("wide", [False, True])
def test_integers_of_every_width(wide):
    """Regression: mask arrays that were not int32 failed, and JAX's own integers are int64 in 64-bit mode."""
    ids, lengths = np.sort(np.random.default_rng(7).integers(0, 3, (B, L))), np.array([9, 12])
    call = jax.jit(lambda ids, lengths: flash_attention(Q, KEY, V, mask=Causal(lengths), segment_ids=ids,
                                                        kv_lengths=lengths, implementation="reference"))
    with jax.enable_x64(wide):
        wanted = call(ids.astype(np.int32), lengths.astype(np.int32))
        for dtype in ("int8", "uint32", "int64"):
            assert_agree(call(ids.astype(dtype), lengths.astype(dtype)), wanted)


def test_64_bit_mode_blockwise(x64):
    """Regression: the loops' int64 indices met int32 positions."""
    ids = jnp.sort(jax.random.randint(jax.random.key(0), (B, L), 0, 3))
    rules = dict(mask=Causal(jnp.array([0, 2])), segment_ids=ids, kv_lengths=jnp.array([9, 12]))
    found, wanted = (gradients(functools.partial(attention, implementation=implementation, **rules), Q, KEY, V)
                     for implementation in IMPLEMENTATIONS)
    assert_agree(found, wanted)


# Edges ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("empty", ["batch", "q_len", "kv_len", "q_heads", "heads", "d_v"])
def test_axes_of_length_0(empty, implementation):
    """Empty or zero results, and zero gradients; lse is -inf without keys."""
    size = lambda *names, full: 0 if empty in names else full
    b, heads, kv_heads = size("batch", full=B), size("q_heads", "heads", full=H), size("heads", full=K)
    q_len, kv_len, d_v = size("q_len", full=L), size("kv_len", full=L), size("d_v", full=DV)
    (out, lse), grads = gradients(
        lambda *arrays: attention(*arrays, mask=Causal(), implementation=implementation),
        normal(0, b, q_len, heads, D), normal(1, b, kv_len, kv_heads, D), normal(2, b, kv_len, kv_heads, d_v),
        normal(5, b, heads, q_len, kv_len), cotangents=(normal(3, b, q_len, heads, d_v), normal(4, b, heads, q_len)))
    assert out.shape == (b, q_len, heads, d_v) and lse.shape == (b, heads, q_len)
    assert not out.any()
    if empty == "d_v":  # lse is as ever, and so are its gradients
        assert np.isfinite(lse).all() and all(np.isfinite(x).all() for x in grads)
    else:
        assert (lse == -np.inf).all() and not any(x.any() for x in grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_head_dimension_0_gives_the_mean(implementation):
    """All scores are 0: row q is the mean of the first q + 1 values."""
    (out, _), (dq, dk, dv) = gradients(
        lambda *qkv: attention(*qkv, mask=Causal(), implementation=implementation),
        normal(0, B, L, H, 0), normal(1, B, L, K, 0), V, cotangents=(DOUT, np.zeros_like(DLSE)))
    counts = np.arange(1, L + 1, dtype=np.float32).reshape(1, L, 1, 1)
    mean = np.cumsum(V, axis=1) / counts
    assert_agree(out, jnp.asarray(np.repeat(mean, H // K, axis=2)))
    per_value = np.cumsum((DOUT / counts)[:, ::-1], axis=1)[:, ::-1].reshape(B, L, K, H // K, DV).sum(3)
    assert_agree(dv, jnp.asarray(per_value))
    assert dq.shape == (B, L, H, 0) and dk.shape == (B, L, K, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_attends(implementation):
    call = lambda *qkv: attention(*qkv, mask=Window(100, -90), implementation=implementation)
    (out, lse), grads = gradients(call, Q, KEY, V, cotangents=(np.full_like(DOUT, np.nan), np.full_like(DLSE, np.nan)))
    assert not out.any() and (lse == -np.inf).all() and not any(x.any() for x in grads)


def naive(q, k, v):
    """Causal attention in float64, written out."""
    q, k, v = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v))
    s = np.einsum("bhqd,bhsd->bhqs", q, np.repeat(k, H // K, 1)) / np.sqrt(q.shape[-1])
    p = np.exp(s - s.max(-1, keepdims=True)) * np.tri(s.shape[-2], s.shape[-1])
    out = (p / p.sum(-1, keepdims=True)) @ np.repeat(v, H // K, 1)
    lse = np.log(p.sum(-1)) + s.max(-1)
    return jnp.asarray(out.swapaxes(1, 2), jnp.float32), jnp.asarray(lse, jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_out_and_lse(implementation):
    found = attention(Q, KEY, V, mask=Causal(), implementation=implementation)
    assert_agree(found, naive(Q, KEY, V))
    alone = flash_attention(Q, KEY, V, mask=Causal(), implementation=implementation)
    assert_agree(alone, found[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_of_lse_is_the_weights(implementation):
    """d(sum of lse) / d(bias) is P, summed over what shares the bias; v has no part in it."""
    bias = normal(6, 1, 1, L, L)
    _, (_, _, dv, dbias) = gradients(lambda *x: attention(*x, mask=Causal(), implementation=implementation),
                                     Q, KEY, V, bias, cotangents=(np.zeros_like(DOUT), np.ones_like(DLSE)))
    s = np.einsum("bqhd,bshd->bhqs", Q, np.repeat(KEY, H // K, 2)) / np.sqrt(np.float32(D)) + bias
    p = np.where(np.tri(L), np.exp(s), 0)
    assert_agree(dbias, jnp.asarray((p / p.sum(-1, keepdims=True)).sum((0, 1), keepdims=True)))
    assert not dv.any()


def test_deterministic_gradients_are_the_same_bits():
    for a, b in zip(*(jax.tree.leaves(windowed(Q, KEY, V)) for _ in range(2))):
        assert np.array_equal(a, b)


def test_one_query_with_a_negative_lse():
    """Decoding: one query at the end. (cudnn-frontend #1072: all dk and dv were NaN.)"""
    def call(implementation):
        return gradients(functools.partial(attention, mask=Causal(L - 1), implementation=implementation),
                         np.full_like(Q[:, :1], -400), abs(KEY), V, cotangents=(DOUT[:, :1], DLSE[..., :1]))
    found = call("xla")
    assert (found[0][1] < -100).all()
    assert_agree(found, call("reference"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_more_heads_than_a_grid_has_blocks(implementation):
    """More than 65535 batch x heads (pytorch #142228)."""
    q = normal(0, 70_000, 1, 1, 1)
    assert_agree(flash_attention(q, q, q, implementation=implementation), jnp.asarray(q))


# Large and infinite numbers -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_beyond_any_exponential(implementation):
    """Scores of +-1e6: each row is its best value, and no gradient is NaN."""
    (out, lse), grads = gradients(functools.partial(attention, mask=Causal(), implementation=implementation),
                                  Q * np.float32(1e6), KEY, V)
    s = np.einsum("bqhd,bshd->bhqs", Q, np.repeat(KEY, H // K, 2)) * np.float32(1e6 / np.sqrt(D))
    s = np.where(np.tri(L), s, -np.inf).astype(np.float32)
    best = np.repeat(V, H // K, 2).swapaxes(1, 2)[np.arange(B)[:, None, None], np.arange(H)[:, None], s.argmax(-1)]
    assert_agree((out, lse), (jnp.asarray(best.swapaxes(1, 2)), jnp.asarray(s.max(-1))))
    assert all(np.isfinite(x).all() for x in grads)


def test_scores_beyond_the_range_of_the_input_type():
    """Scores of +-2e5 overflow float16, not float32."""
    q, k, v = (x.astype(np.float16) for x in (Q * 256, KEY * 256, V))
    found = attention(q, k, v, mask=Causal())
    assert_agree(found, attention(q, k, v, mask=Causal(), implementation="reference"))
    assert np.abs(found[1]).max() > 1e5


def with_bias(bias):
    """What the two implementations make of a bias (q_len, kv_len) and a causal mask."""
    return [gradients(functools.partial(attention, mask=Causal(), implementation=implementation), Q, KEY, V,
                      np.broadcast_to(bias, (1, 1, L, L)).astype(np.float32)) for implementation in IMPLEMENTATIONS]


SMALLEST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize("value", [-np.inf, SMALLEST, -1e9])
def test_rows_of_one_bias(value):
    """Rows of -inf attend to nothing; rows of any number, however small, attend to all keys alike."""
    found, wanted = with_bias(np.where(np.arange(L)[:, None] < 6, value, 0))
    assert_agree(found, wanted)
    (out, lse), (dq, _, _, dbias) = found
    if value == -np.inf:
        assert not out[:, :6].any() and (lse[..., :6] == -np.inf).all()
        assert not dq[:, :6].any() and not dbias[..., :6, :].any()
    elif value == SMALLEST:
        mean = np.cumsum(V, axis=1)[:, :6] / np.arange(1, 7, dtype=np.float32).reshape(1, 6, 1, 1)
        assert_agree(out[:, :6], jnp.asarray(np.repeat(mean, H // K, 2)))


@pytest.mark.parametrize("value", [-np.inf, SMALLEST, -1e9])
def test_right_padding_by_bias(value):
    assert_agree(*with_bias(np.where(np.arange(L) < 9, 0, value)))


def test_left_padding_of_the_smallest_number():
    assert_agree(*with_bias(np.where(np.arange(L) < 6, SMALLEST, 0)))


# What must not leak, and what must ------------------------------------------------------------------------------------

ROW = 8
SEEN_BY = range(ROW, ROW + 3)  # the rows of Window(2, 0) that attend to key ROW
NEAR = range(ROW - 2, ROW + 3)  # the keys that those rows attend to


def changed(a, b, axis):
    """The positions along an axis where two arrays differ; NaN equals nothing."""
    return set(np.argwhere(np.asarray(a) != np.asarray(b))[:, axis].tolist())


def windowed(*arrays):
    """Results of a window of three keys."""
    return gradients(functools.partial(attention, mask=Window(2, 0), deterministic=True), *arrays)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_what_one_bad_number_reaches(name, value):
    """Rows that do not attend to the key keep every bit, in tiles where others do, and so do their gradients."""
    clean = windowed(Q, KEY, V)
    arrays = dict(query=Q.copy(), key=KEY.copy(), value=V.copy())
    arrays[name][0, ROW, 0, 1] = value
    (out, lse), (dq, dk, dv) = windowed(*arrays.values())
    rows, keys = ({ROW}, set(range(ROW - 2, ROW + 1))) if name == "query" else (set(SEEN_BY), set(NEAR))
    assert changed(out, clean[0][0], 1) == rows and changed(dq, clean[1][0], 1) <= rows
    assert changed(lse, clean[0][1], 2) == (set() if name == "value" else rows)
    assert changed(dk, clean[1][1], 1) <= keys
    assert changed(dv, clean[1][2], 1) <= (set() if name == "value" else keys)
    for found, before in zip((out, dq, dk, dv), (clean[0][0], *clean[1])):  # nor in the other sequence
        assert np.array_equal(found[1], before[1])
    if name == "value":  # its own column only, and infinity stays itself
        wanted = clean[0][0].at[0, ROW:ROW + 3, :H // K, 1].set(value)
        assert np.array_equal(out, wanted, equal_nan=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_padding_may_hold_anything(value):
    """Queries, keys, values, cotangents and bias beyond the lengths; keys of other segments."""
    lengths = np.array([9, 12])
    rules = dict(kv_lengths=lengths, q_lengths=lengths, mask=Causal())
    padding = np.arange(L) >= lengths[:, None]
    poison = lambda x, where: np.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), np.float32(value), x)
    bias = normal(6, B, H, L, L)
    poisoned = np.where((padding[:, None, :, None] | padding[:, None, None, :]), np.float32(value), bias)
    call = lambda arrays, cotangents: gradients(lambda *x: attention(*x, **rules), *arrays, cotangents=cotangents)
    clean = call((Q, KEY, V, bias), (DOUT, DLSE))
    found = call((*(poison(x, padding) for x in (Q, KEY, V)), poisoned),
                 (poison(DOUT, padding), np.where(padding[:, None], np.float32(value), DLSE)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(clean)):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_in_the_bias_of_a_pair_that_attends(implementation):
    """Regression: it masked the pair instead."""
    bias = np.zeros((1, 1, L, L), np.float32)
    bias[0, 0, 8, 3] = bias[0, 0, 3, 8] = np.nan  # the second is above the diagonal
    out, lse = attention(Q, KEY, V, bias, mask=Causal(), implementation=implementation)
    assert set(np.argwhere(np.isnan(out))[:, 1].tolist()) == set(np.argwhere(np.isnan(lse))[:, 2].tolist()) == {8}


# explain --------------------------------------------------------------------------------------------------------------

def test_explain_takes_shapes_of_everything():
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    text = explain(shape(2, 64, 8, 128), shape(2, 96, 2, 128), shape(2, 96, 2, 64),
                   mask=Causal(32) & Dense(shape(64, 96, dtype=bool)), bias=shape(64, 96),
                   segment_ids=(shape(2, 64, dtype=jnp.int32), shape(2, 96, dtype=jnp.int32)),
                   kv_lengths=shape(2, dtype=jnp.int32), softcap=30.0, dropout_rate=0.1, deterministic=True)
    assert text.splitlines()[0] == (
        "AttentionSpec(BLHD bfloat16, batch=2, heads=8:2, len=64x96, d=128, d_v=64, "
        "mask=Causal(offset=32) & Dense(attend=bool[1x1x64x96]) & InBounds(kv_len=int32[2x1]) & "
        "SegmentIds(q_ids=int32[2x1x64], kv_ids=int32[2x1x96]), bias=1x1x64x96, softcap=30, dropout_rate=0.1, "
        "deterministic)")
    assert "implementation=" in text.splitlines()[1] and "not 'reference'" in text


def test_explain_and_call_agree():
    assert "implementation='xla'" in explain(Q, KEY, V, mask=SegmentIds(np.zeros((B, L), int), np.zeros((B, L), int)),
                                             implementation="xla")


def test_lengths_and_segments_as_numbers_and_lists():
    """Regression: kv_lengths=3 was taken, segment_ids=[[0] * 8] refused."""
    call = functools.partial(flash_attention, Q, KEY, V)
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (B, L)))
    assert_agree(call(kv_lengths=3), call(kv_lengths=np.array([3, 3])))
    lengths = dict(kv_lengths=[3, 9], q_lengths=(4, 5))
    assert_agree(call(**lengths), call(**{name: np.array(x) for name, x in lengths.items()}))
    assert_agree(call(segment_ids=ids.tolist()), call(segment_ids=ids))
    assert_agree(call(segment_ids=(ids.tolist(), [[0] * L])), call(segment_ids=(ids, np.zeros((1, L), int))))


def test_negative_lengths_count_as_0_where_they_are_not_known():
    lengths = jnp.array([-4, 9], jnp.int32)
    wanted = flash_attention(Q, KEY, V, kv_lengths=[0, 9], q_lengths=[0, 9])
    for name in IMPLEMENTATIONS:
        call = lambda x, name=name: flash_attention(Q, KEY, V, kv_lengths=x, q_lengths=x, implementation=name)
        assert_agree(jax.jit(call)(lengths), wanted)
        assert_agree(call(lengths), wanted)
