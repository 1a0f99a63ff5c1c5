"""pallas_flash.flax in the attention layers of nnx and linen, against the function those layers have by default."""

import contextlib
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import ALiBi, ContextParallel, flash_attention
from pallas_flash import flax as adapter
from pallas_flash.errors import UnsupportedError
from pallas_flash.flax import attention_fn, dot_product_attention
from pallas_flash.masks import Causal, Dense, InBounds, SegmentIds, Window, over_batch

flax = pytest.importorskip("flax")
linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

pytestmark = pytest.mark.usefixtures("full_precision")

HEADS, FEATURES, LENGTH = 4, 32, 24


class Nnx:
    """Self-attention layer of nnx, causal by the flag of the call, as a function of (params, x, mask)."""

    def __init__(self, flash=True, **options):
        self.flash = flash
        options = {"attention_fn": dot_product_attention, **options} if flash else options
        layer = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, keep_rngs=False, rngs=nnx.Rngs(0), **options)
        self.graph, self.params = nnx.split(layer)

    def __call__(self, params, x, mask=None, dropout_rng=None, deterministic=True, **options):
        rngs = None if dropout_rng is None else nnx.Rngs(dropout=dropout_rng)
        layer = nnx.merge(self.graph, params)
        return layer(x, mask=mask, is_causal=True, deterministic=deterministic, rngs=rngs, **options)

    def with_cache(self, params, x):
        """The outputs (batch, length, features) of feeding x one position at a time to a layer with a cache."""
        layer = nnx.merge(self.graph, params)
        layer.init_cache(x.shape, dtype=x.dtype)
        step = nnx.jit(lambda layer, x: layer(x, decode=True, is_causal=True))
        return jnp.concatenate([step(layer, x[:, i : i + 1]) for i in range(x.shape[1])], axis=1)


class Linen:
    """The same of linen: ours is causal by construction, the default function by its mask."""

    def __init__(self, flash=True, **options):
        self.flash = flash
        options = {"attention_fn": attention_fn(mask=Causal()), **options} if flash else options
        self.layer = linen.MultiHeadAttention(HEADS, **options)
        self.plain = self.layer.clone(attention_fn=linen.dot_product_attention)  # makes the same variables, faster
        self.params = self.plain.init(jax.random.key(0), jnp.zeros((LENGTH, FEATURES)), deterministic=True)

    def __call__(self, params, x, mask=None, dropout_rng=None, deterministic=True, **options):
        if not self.flash:
            mask = linen.combine_masks(mask, linen.make_causal_mask(x[..., 0]))
        return self.layer.apply(params, x, mask=mask, dropout_rng=dropout_rng, deterministic=deterministic, **options)

    def with_cache(self, params, x):
        layer, outs = self.layer.clone(decode=True), []
        step = jax.jit(functools.partial(layer.apply, mutable=["cache"]))
        cache = self.plain.clone(decode=True).init(jax.random.key(0), x)["cache"]
        for i in range(x.shape[1]):
            out, changed = step({**params, "cache": cache}, x[:, i : i + 1])
            cache = changed["cache"]
            outs.append(out)
        return jnp.concatenate(outs, axis=1)


both_modules = pytest.mark.parametrize("module", [Nnx, Linen])


def normal(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def padding_mask(batch):
    """(batch..., 1, LENGTH, LENGTH), in floats as Flax makes them: the last keys of each entry are padding."""
    lengths = LENGTH - 1 - np.arange(np.prod(batch, dtype=int)).reshape(batch)
    real = jnp.asarray(np.arange(LENGTH) < lengths[..., None], jnp.float32)
    return linen.make_attention_mask(jnp.ones_like(real), real)


def in_float64(function, *args):
    """The function's result with all inputs and arithmetic in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), args)))


def assert_no_worse(ours, default, exact):
    """Each leaf of ours is within twice (the default's own error + a rounding of the largest) of the exact one."""
    for got, baseline, want in zip(*map(jax.tree.leaves, (ours, default, exact)), strict=True):
        assert got.dtype == baseline.dtype and got.shape == want.shape
        error, allowed = (np.max(np.abs(np.asarray(x, np.float64) - want)) for x in (got, baseline))
        rounding = float(jnp.finfo(got.dtype).eps) * np.max(np.abs(want))
        assert error <= 2 * (allowed + rounding)


def value_and_gradients(layer, mask, wrap=lambda f: f):
    """A function (params, x) -> (out, gradients of both under a random cotangent), jitted."""

    @jax.jit
    def jitted(params, x):
        out, pullback = jax.vjp(wrap(lambda params, x: layer(params, x, mask=mask)), params, x)
        return out, pullback(normal(1, out.shape).astype(out.dtype))

    def run(params, x):
        # nnx's default calls jax.nn's function, which is not written for strict promotion.
        with contextlib.nullcontext() if layer.flash else jax.numpy_dtype_promotion("standard"):
            return jitted(params, x)

    return run


@functools.cache
def default_layer(module, padded):
    """What it is given, (params, x), and what it returns in float32 and in float64."""
    layer = module(flash=False)
    args = layer.params, normal(0, (2, LENGTH, FEATURES))
    run = value_and_gradients(layer, padding_mask((2,)) if padded else None)
    return args, run(*args), in_float64(run, *args)


@pytest.mark.optimised  # rounding is compared
@both_modules
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "remat"])
def test_layer_agrees_with_the_default_in_value_and_gradients(module, padded, wrap):
    args, default, exact = default_layer(module, padded)
    mask = padding_mask((2,)) if padded else None
    assert_no_worse(value_and_gradients(module(), mask, wrap)(*args), default, exact)


@both_modules
@pytest.mark.parametrize("batch", [(), (2, 3), (2, 0)])
def test_any_number_of_batch_dimensions(module, batch):
    layer, x, mask = module(), normal(0, (*batch, LENGTH, FEATURES)), padding_mask(batch)
    run, merge = jax.jit(layer), lambda array: array.reshape(-1, *array.shape[len(batch) :])
    np.testing.assert_array_equal(merge(run(layer.params, x, mask)), run(layer.params, merge(x), merge(mask)))


@pytest.mark.optimised  # rounding is compared
@pytest.mark.parametrize(
    "shape", [(1, 1, LENGTH), (HEADS, LENGTH, 1), (3, 1, 1, LENGTH), (2, 1, HEADS, 1, LENGTH), (2, 3, 1, 1, 1)]
)
def test_masks_and_biases_broadcast_as_in_flax(shape):
    q, k, v = (normal(i, (2, 3, LENGTH, HEADS, 8)) for i in range(3))
    bias, mask = normal(3, shape), normal(4, shape) > -1
    full_bias, full_mask = (np.broadcast_to(x, (2, 3, HEADS, LENGTH, LENGTH)) for x in (bias, mask))
    seen = np.moveaxis(full_mask.any(axis=-1), -1, -2)[..., None]  # a query that sees nothing: our 0, their mean

    def default(q, k, v, bias):
        return jnp.where(seen, linen.dot_product_attention(q, k, v, bias, full_mask, deterministic=True), 0)

    exact = in_float64(default, q, k, v, full_bias)
    assert_no_worse(dot_product_attention(q, k, v, bias, mask), default(q, k, v, full_bias), exact)


def test_a_query_that_may_attend_to_nothing_gives_zero():
    q, k, v = (normal(i, (1, LENGTH, HEADS, 8)) for i in range(3))
    out = dot_product_attention(q, k, v, mask=jnp.zeros((1, 1, LENGTH, LENGTH)))
    assert not np.any(out)


@pytest.mark.optimised  # rounding is compared
def test_grouped_query_attention_of_nnx():
    default = Nnx(flash=False, num_kv_heads=2)
    args = default.params, normal(0, (2, LENGTH, FEATURES))
    baseline = value_and_gradients(default, None)
    ours = value_and_gradients(Nnx(num_kv_heads=2), None)(*args)
    assert_no_worse(ours, baseline(*args), in_float64(baseline, *args))


@pytest.mark.optimised  # rounding is compared
@both_modules
def test_bfloat16_parameters_and_activations(module):
    options = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
    default = module(flash=False, **options)
    args = default.params, normal(0, (2, LENGTH, FEATURES), jnp.bfloat16)
    ours = value_and_gradients(module(**options), None)(*args)
    assert ours[0].dtype == jnp.bfloat16
    exact = in_float64(value_and_gradients(module(flash=False), None), *args)
    assert_no_worse(ours, value_and_gradients(default, None)(*args), exact)


def test_operands_are_promoted_as_flax_does():
    dtypes = jnp.float32, jnp.bfloat16, jnp.bfloat16
    q, k, v = (normal(i, (1, LENGTH, HEADS, 8), dtype) for i, dtype in enumerate(dtypes))
    with jax.numpy_dtype_promotion("standard"):
        assert dot_product_attention(q, k, v).dtype == jnp.float32
    out = dot_product_attention(q, k, v, dtype=jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, dot_product_attention(q.astype(jnp.bfloat16), k, v))


@both_modules
@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(left=3)], ids=["causal", "window"])
def test_decoding_with_a_cache_equals_the_whole_sequence_at_once(module, mask, full_precision):
    layer, x = module(attention_fn=attention_fn(mask=mask)), normal(0, (2, LENGTH, FEATURES))
    at_once = jax.jit(layer)(layer.params, x)
    np.testing.assert_allclose(layer.with_cache(layer.params, x), at_once, rtol=0, atol=1e-6)


@both_modules
def test_decoding_is_that_of_flax_itself(module, full_precision):
    """Step by step, without a rule at construction."""
    if module is Nnx and tuple(map(int, flax.__version__.split(".")[:3])) < (0, 12, 12):
        pytest.skip("a causal decode step of nnx attends to key 0 alone before Flax 0.12.12")
    x, found = normal(0, (2, LENGTH, FEATURES)), []
    for flash in (True, False):
        layer = module(flash=flash)
        with contextlib.nullcontext() if flash else jax.numpy_dtype_promotion("standard"):
            found.append(layer.with_cache(module().params, x))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-6)


def test_a_decode_step_reads_no_tile_past_the_filled_slots():
    """Nor one that a window hides; the slots are told by the mask alone."""
    slots = np.arange(64)[None, None, None, :] < np.array([5, 9])[:, None, None, None]
    for fixed, lo in ((None, 0), (Window(left=3), 1)):
        mask = adapter._join_masks(fixed, jnp.asarray(slots), False, (2,), (1, 64)).canonical()
        bounds = over_batch(mask, lambda part: part.kv_bounds(0, 1))
        assert (int(bounds.lo.min()), int(bounds.hi.max())) == (lo, 9)


def test_one_query_whose_position_is_unknown_is_refused():
    q, k = normal(0, (1, 1, HEADS, 8)), normal(1, (1, LENGTH, HEADS, 8))
    with pytest.raises(ValueError, match="mask of the filled slots"):
        attention_fn(mask=Causal())(q, k, k)


@pytest.mark.parametrize("fixed", [None, Window(left=3)], ids=["no mask", "window"])
@pytest.mark.parametrize("filled", [1, 7, LENGTH])
def test_the_causal_flag_of_a_decode_step_counts_from_the_last_filled_slot(fixed, filled):
    """Regression: one query was taken for the first position, so it saw key 0 alone. Flax from 0.12.12 on does not pass
    the flag in a decode step, releases before it and callers of their own do.
    """
    q, k, v = normal(0, (2, 1, HEADS, 8)), normal(1, (2, LENGTH, HEADS, 8)), normal(2, (2, LENGTH, HEADS, 8))
    slots = np.broadcast_to(np.arange(LENGTH) < filled, (2, 1, 1, LENGTH))
    function = dot_product_attention if fixed is None else attention_fn(mask=fixed)
    seen = slots & (np.arange(LENGTH) >= filled - 4) if fixed else slots
    wanted = dot_product_attention(q, k, v, mask=seen)
    lengths = InBounds(kv_len=filled), InBounds(kv_len=jnp.array([filled] * 2))
    for mask in (jnp.asarray(slots), jnp.asarray(slots, jnp.float32), *lengths):
        found = jax.jit(functools.partial(function, is_causal=True))(q, k, v, mask=mask)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


@both_modules
def test_decoding_where_each_step_passes_the_causal_flag(module, full_precision):
    """As Flax before 0.12.12 does in nnx."""
    flagged = lambda *args, **keywords: dot_product_attention(*args, **{**keywords, "is_causal": True})
    if module is Linen:  # linen passes what the signature names
        flagged = functools.wraps(dot_product_attention.__call__)(flagged)
    layer, x = module(attention_fn=flagged), normal(0, (2, LENGTH, FEATURES))
    at_once = jax.jit(layer)(layer.params, x)
    np.testing.assert_allclose(layer.with_cache(layer.params, x), at_once, rtol=0, atol=1e-6)


def test_the_causal_flag_of_one_query_without_a_mask_is_what_flax_makes_of_it():
    """There is nothing that tells another position: the query is the first."""
    q, k = normal(0, (1, 1, HEADS, 8)), normal(1, (1, LENGTH, HEADS, 8))
    np.testing.assert_allclose(dot_product_attention(q, k, k, is_causal=True), k[:, :1], rtol=1e-6)


# Masks as rules -------------------------------------------------------------------------------------------------------

IDS = np.sort(np.random.default_rng(0).integers(0, 3, (2, LENGTH)).astype(np.int32))
LENGTHS = np.array([LENGTH - 5, LENGTH], np.int32)
RULES = {
    "packed": (SegmentIds(IDS, IDS), IDS[:, None, :, None] == IDS[:, None, None, :]),
    "padded": (InBounds(kv_len=LENGTHS), np.arange(LENGTH) < LENGTHS[:, None, None, None]),
    "window": (Window(left=3), np.tri(LENGTH, k=3, dtype=bool).T[None, None]),
    "packed window": (SegmentIds(IDS, IDS) & Window(left=3),
                      (IDS[:, None, :, None] == IDS[:, None, None, :]) & np.tri(LENGTH, k=3, dtype=bool).T),
}


@both_modules
@pytest.mark.parametrize("name", RULES)
def test_a_layer_takes_a_rule_where_it_takes_an_array(module, name):
    """Regression: AttributeError, 'SegmentIds' object has no attribute 'astype'."""
    rule, dense = RULES[name]
    layer, x = module(), normal(0, (2, LENGTH, FEATURES))
    ours, wanted = (value_and_gradients(layer, mask)(layer.params, x) for mask in (rule, jnp.asarray(dense)))
    for a, b in zip(*map(jax.tree.leaves, (ours, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@both_modules
def test_a_rule_is_data_of_a_jitted_layer(module):
    layer, x = module(), normal(0, (2, LENGTH, FEATURES))
    rule, dense = RULES["packed"]
    found = jax.jit(layer)(layer.params, x, jax.tree.map(jnp.asarray, rule))
    np.testing.assert_allclose(found, layer(layer.params, x, jnp.asarray(dense)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 0)])
def test_arrays_of_a_rule_have_the_batch_axes_of_the_layer(batch):
    x = normal(0, (*batch, LENGTH, HEADS, 8))
    ids = np.sort(np.random.default_rng(0).integers(0, 3, (*batch, LENGTH)).astype(np.int32))
    lengths = np.arange(np.prod(batch, dtype=int), dtype=np.int32).reshape(batch) + 5
    shared = np.zeros(LENGTH, np.int32)
    rules = {"segments": SegmentIds(ids, ids), "lengths": InBounds(kv_len=lengths),
             "both": SegmentIds(ids, ids) & InBounds(kv_len=lengths), "one row for all": SegmentIds(shared, shared)}
    packed = ids[..., None, :, None] == ids[..., None, None, :]
    real = np.arange(LENGTH) < lengths[..., None, None, None]
    dense = {"segments": packed, "lengths": real, "both": packed & real,
             "one row for all": np.ones((LENGTH, LENGTH), bool)}
    for name, rule in rules.items():
        wanted = dot_product_attention(x, x, x, mask=jnp.asarray(dense[name]))
        np.testing.assert_allclose(dot_product_attention(x, x, x, mask=rule), wanted, rtol=0, atol=1e-6, err_msg=name)


def dropped_weights(rng, rate, batch=8):
    """The attention weights (batch, HEADS, LENGTH, LENGTH) after dropout where all were 1 / LENGTH."""
    q = jnp.zeros((batch, LENGTH, HEADS, 8))
    v = jnp.broadcast_to(jnp.eye(LENGTH).reshape(1, LENGTH, 1, LENGTH), (batch, LENGTH, HEADS, LENGTH))
    out = dot_product_attention(q, q, v, dropout_rate=rate, dropout_rng=rng, broadcast_dropout=False)
    return np.moveaxis(np.asarray(out), 2, 1)


def test_dropout_keeps_each_weight_with_the_asked_probability():
    rate = 0.25
    weights = dropped_weights(jax.random.key(0), rate)
    kept = weights > 0
    np.testing.assert_allclose(weights[kept], 1 / LENGTH / (1 - rate), rtol=1e-6)  # 1/4 is a multiple of 2^-16
    standard_error = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(np.mean(kept) - (1 - rate)) < 5 * standard_error
    patterns = kept.reshape(-1, LENGTH * LENGTH)
    assert len(np.unique(patterns, axis=0)) == len(patterns)  # no two of (batch, head) share one


@both_modules
def test_dropout_follows_the_rngs_and_the_deterministic_flag(module):
    layer = module(dropout_rate=0.5, broadcast_dropout=False)
    x, a, b = normal(0, (2, LENGTH, FEATURES)), jax.random.key(1), jax.random.key(2)
    train = jax.jit(functools.partial(layer, deterministic=False))
    np.testing.assert_array_equal(train(layer.params, x, dropout_rng=a), train(layer.params, x, dropout_rng=a))
    assert np.any(train(layer.params, x, dropout_rng=a) != train(layer.params, x, dropout_rng=b))
    off = jax.jit(layer)(layer.params, x, dropout_rng=a)
    np.testing.assert_array_equal(off, jax.jit(module())(layer.params, x))


@both_modules
def test_dropout_gradients_are_those_of_the_same_entries(module):
    layer = module(dropout_rate=0.5, broadcast_dropout=False)
    x, direction = normal(0, (1, LENGTH, FEATURES)), normal(1, (1, LENGTH, FEATURES))

    def loss(x):
        return jnp.sum(jnp.sin(layer(layer.params, x, dropout_rng=jax.random.key(1), deterministic=False)))

    step, loss_and_gradient = 1e-2, jax.jit(jax.value_and_grad(loss))
    (above, _), (below, _) = (loss_and_gradient(x + sign * step * direction) for sign in (1, -1))
    slope = jnp.sum(loss_and_gradient(x)[1] * direction)
    np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-2)


@both_modules
def test_shared_dropout_is_refused_only_where_it_would_act(module):
    layer, x = module(dropout_rate=0.5), normal(0, (1, LENGTH, FEATURES))  # broadcast_dropout=True is Flax's default
    with pytest.raises(UnsupportedError, match="broadcast_dropout=False"):
        layer(layer.params, x, dropout_rng=jax.random.key(0), deterministic=False)
    assert layer(layer.params, x, deterministic=True).shape == x.shape


def test_dropout_needs_a_key():
    q = normal(0, (1, LENGTH, HEADS, 8))
    with pytest.raises(ValueError, match="dropout_rng"):
        dot_product_attention(q, q, q, dropout_rate=0.5, broadcast_dropout=False)


@both_modules
def test_sown_weights_are_refused(module):
    layer = module()
    with pytest.raises(UnsupportedError, match="sow_weights=False"):
        layer(layer.params, normal(0, (1, LENGTH, FEATURES)), sow_weights=True)


def test_replaced_einsums_are_refused():
    einsum = lambda: jnp.einsum
    layer = Linen(flash=False, qk_attn_weights_einsum_cls=einsum, attn_weights_value_einsum_cls=einsum)
    ours = layer.layer.clone(attention_fn=dot_product_attention)
    with pytest.raises(UnsupportedError, match="qk_attn_weights_einsum_cls"):
        ours.apply(layer.params, normal(0, (1, LENGTH, FEATURES)))


def test_a_constructed_mask_with_arrays_is_refused():
    with pytest.raises(ValueError, match="holds arrays"):
        attention_fn(mask=Causal() & Dense(jnp.ones((LENGTH, LENGTH), bool)))


Q, KV = np.ones((2, 3, 5, 4, 8), "float32"), np.ones((2, 3, 6, 2, 8), "float32")
BAD = {
    "query must be an array, got type(query)=NoneType": lambda: dot_product_attention(None, KV, KV),
    "query must be (batch..., length, heads, dim), got query.shape=(4, 8)":
        lambda: dot_product_attention(Q[0, 0, 0], KV, KV),
    "query and key must have the same batch axes, got query.shape=(2, 3, 5, 4, 8), key.shape=(3, 2, 6, 2, 8)":
        lambda: dot_product_attention(Q, KV.reshape(3, 2, 6, 2, 8), KV.reshape(3, 2, 6, 2, 8)),
    "query and value must have the same batch axes": lambda: dot_product_attention(Q, KV, KV.reshape(6, 6, 2, 8)),
    "mask must be an array, got type(mask)=list": lambda: dot_product_attention(Q, KV, KV, mask=[[True]]),
    "bias must be an array, got type(bias)=list": lambda: dot_product_attention(Q, KV, KV, bias=[[0.0]]),
    "mask must broadcast to (batch..., heads, q_len, kv_len) with batch axes (2, 3), got mask.shape=(3, 2, 1, 5, 6)":
        lambda: dot_product_attention(Q, KV, KV, mask=np.ones((3, 2, 1, 5, 6), bool)),
    "bias must broadcast to (batch..., heads, q_len, kv_len) with batch axes (2, 3)":
        lambda: dot_product_attention(Q, KV, KV, bias=np.ones((2, 1, 1, 1, 5, 6), "float32")),
    "mask must be a pallas_flash Mask, got type(mask)=ndarray": lambda: attention_fn(mask=np.ones((5, 6), bool)),
    "implementation must be None, one of": lambda: attention_fn(implementation="cudnn"),
}


@pytest.mark.parametrize("message", BAD)
def test_what_a_function_does_not_take_is_said(message):
    """Regression: batch axes (3, 2) of keys were merged, and paired with others than those (2, 3) of queries."""
    with pytest.raises(ValueError) as caught:
        BAD[message]()
    assert message in str(caught.value)


def test_flags_are_flags():
    with pytest.raises(ValueError, match=r"^deterministic_backward must be True or False, got .*='no'"):
        attention_fn(deterministic_backward="no")
    q = normal(0, (1, LENGTH, HEADS, 8))
    for name in ("is_causal", "deterministic", "broadcast_dropout"):
        for value in ("no", "False", 1, None):
            with pytest.raises(ValueError, match=rf"^{name} must be True or False, got {name}={value!r}\. Pass"):
                dot_product_attention(q, q, q, **{name: value})
        assert dot_product_attention(q, q, q, **{name: np.bool_(False)}).shape == q.shape


@both_modules
def test_flags_of_layers_are_flags(module):
    """Regression: each counted as True. What Flax makes a bool of before it calls (`x and not decode`) is not seen."""
    layer, x = module(dropout_rate=0.5, broadcast_dropout=False), normal(0, (1, LENGTH, FEATURES))
    with pytest.raises(ValueError, match=r"^deterministic must be True or False, got deterministic='no'"):
        layer(layer.params, x, dropout_rng=jax.random.key(0), deterministic="no")
    layer = module(dropout_rate=0.5, broadcast_dropout="no")
    with pytest.raises(ValueError, match=r"^broadcast_dropout must be True or False, got broadcast_dropout='no'"):
        layer(layer.params, x, deterministic=True)


@pytest.mark.parametrize("rate", [np.ones(3), "0.5", None], ids=repr)
def test_a_dropout_rate_is_a_number(rate):
    """Regression: NumPy's "the truth value of an array is ambiguous"."""
    q = normal(0, (1, LENGTH, HEADS, 8))
    with pytest.raises(ValueError, match=r"^dropout_rate must be a Python number in \[0, 1\], got dropout_rate="):
        dot_product_attention(q, q, q, dropout_rate=rate)


def test_functions_of_equal_arguments_are_equal():
    assert attention_fn(mask=Causal(), softcap=30.0) == attention_fn(mask=Causal(), softcap=30.0) != attention_fn()
    assert hash(attention_fn(mask=Causal())) == hash(attention_fn(mask=Causal()))


def test_scale_and_softcap_given_at_construction():
    q, k, v = (normal(i, (1, LENGTH, HEADS, 8)) for i in range(3))
    scores = 2.0 * np.tanh(0.5 * np.einsum("bqhd,bkhd->bhqk", q, k) / 2.0)
    weights = np.exp(scores) / np.sum(np.exp(scores), axis=-1, keepdims=True)
    out = attention_fn(scale=0.5, softcap=2.0)(q, k, v)
    np.testing.assert_allclose(out, np.einsum("bhqk,bkhd->bqhd", weights, v), rtol=0, atol=1e-6)


def softmax_with_sinks(query, key, value, sinks, **_):
    """Causal attention with one more column of scores, as a layer calls it."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    scores = jnp.where(np.tri(LENGTH, dtype=bool)[None, None], scores, -jnp.inf)
    column = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:-1], 1))
    weights = jax.nn.softmax(jnp.concatenate([scores, column], axis=-1))[..., :-1]
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


SINKS = np.linspace(-2, 4, HEADS).astype(np.float32)


def nnx_with_sinks(function):
    """A layer whose attention function is a module that owns the sinks, as in pallas_flash.flax."""
    class WithSinks(nnx.Module):
        def __init__(self, sinks):
            self.sinks = nnx.Param(jnp.asarray(sinks))

        def __call__(self, query, key, value, **keywords):
            return function(query, key, value, sinks=self.sinks[...], **keywords)
    layer = Nnx(attention_fn=WithSinks(SINKS))
    return layer, layer.params, lambda grads: grads["attention_fn"]["sinks"][...]


def linen_with_sinks(function):
    """A layer made in a module that owns the sinks, likewise."""
    class Around(linen.Module):
        @linen.compact
        def __call__(self, x):
            sinks = self.param("sinks", lambda key: jnp.asarray(SINKS))
            attend = functools.partial(function, sinks=sinks)
            return linen.MultiHeadAttention(HEADS, attention_fn=attend)(x)
    module = Around()
    params = module.init(jax.random.key(0), jnp.zeros((2, LENGTH, FEATURES)))
    return lambda params, x, mask: module.apply(params, x), params, lambda grads: grads["params"]["sinks"]


@pytest.mark.parametrize("make", [nnx_with_sinks, linen_with_sinks])
def test_sinks_are_a_parameter_of_the_model(make):
    """Value and gradients are those of one more column; the sinks are among the parameters."""
    x = normal(0, (2, LENGTH, FEATURES))

    def results(function):
        layer, params, sinks_of = make(function)
        loss = lambda params, x: (layer(params, x, None) * normal(1, x.shape)).sum()
        value, (dparams, dx) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
        return value, dx, sinks_of(dparams), jax.tree.leaves(dparams)
    found = results(attention_fn(mask=Causal(), implementation="reference"))
    assert np.all(found[2] != 0)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found,
                 results(softmax_with_sinks))


def test_importing_needs_no_flax_and_calling_names_the_extra():
    script = """
import sys
import jax.numpy as jnp
import pallas_flash, pallas_flash.flax
assert "flax" not in sys.modules
sys.modules["flax"] = None
try:
    pallas_flash.flax.dot_product_attention(*[jnp.ones((1, 8, 1, 8))] * 3)
except ModuleNotFoundError as error:
    assert "pallas_flash[flax]" in str(error)
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# Score functions ------------------------------------------------------------------------------------------------------

def nearer(score, batch, head, q_pos, kv_pos):
    return score - 0.1 * (head + batch + 1).astype(score.dtype) * abs(q_pos - kv_pos).astype(score.dtype)


def test_a_decode_step_has_its_position_in_a_score_function():
    """Each row of a causal call is a step whose mask shows the filled slots; two batch dimensions are one."""
    q, k, v = (normal(i, (2, 1, LENGTH, HEADS, 8)) for i in range(3))
    attend = attention_fn(score=nearer, implementation="reference")
    whole = attend(q, k, v, is_causal=True)
    at = np.array([3, LENGTH - 1])
    filled = jnp.asarray(np.arange(LENGTH) <= at[:, None])[:, None, None, None, :]
    pick = lambda x: np.take_along_axis(np.asarray(x), at[:, None, None, None, None], axis=2)
    np.testing.assert_allclose(attend(pick(q), k, v, mask=filled), pick(whole), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="one query with the score function nearer must come with a mask of the keys"):
        attend(q[:, :, :1], k, v)


def test_a_score_function_of_construction_and_one_of_a_call():
    q, k, v = (normal(i, (2, LENGTH, HEADS, 8)) for i in range(3))
    learned = ALiBi(jnp.ones(HEADS))
    wanted = flash_attention(q, k, v, score=learned, implementation="reference")
    attend = attention_fn(score=nearer, implementation="reference")
    np.testing.assert_array_equal(attend(q, k, v, score=learned), wanted)
    assert attend == attention_fn(score=nearer, implementation="reference") != attention_fn(implementation="reference")
    with pytest.raises(ValueError, match=r"same in every call, got ALiBi\(slopes=float32\[4\]\), which holds arrays"):
        attention_fn(score=learned)
    with pytest.raises(UnsupportedError, match="score functions are not told the positions"):
        attention_fn(score=nearer, context_parallel=ContextParallel("x"))(q, k, v)
