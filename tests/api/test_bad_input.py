"""Bad input raises before anything is computed; the message says what must hold, what was given, and what to do.

Every case is called with shapes alone, so a check that needed values would fail.
"""

import ast
import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import (
    AttentionSpec,
    Causal,
    Dense,
    Full,
    InBounds,
    Mask,
    PrefixLM,
    SegmentIds,
    UnsupportedError,
    Window,
    dot_product_attention,
    explain,
    flash_attention,
)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def ids(*sizes):
    return shape(*sizes, dtype=jnp.int32)


def booleans(*sizes):
    return shape(*sizes, dtype=jnp.bool_)


SHAPES = dict(query=shape(2, 16, 4, 8), key=shape(2, 16, 2, 8), value=shape(2, 16, 2, 8))


def every(dtype):
    """query, key and value of one dtype."""
    return {name: shape(*x.shape, dtype=dtype) for name, x in SHAPES.items()}


def raised(call, keywords):
    """The message of the ValueError that a call raises; keywords may hold functions that make a mask."""
    with pytest.raises(ValueError) as error:
        mask = keywords.get("mask")
        made = {"mask": mask()} if inspect.isfunction(mask) and mask is not Causal else {}
        call(**(SHAPES | keywords | made))
    assert type(error.value) in (ValueError, UnsupportedError)
    return str(error.value)


TAKES = "must have one of the dtypes bfloat16, float16, float32, float64"
ROWS_AND_COLUMNS = "(batch=2 or 1, q_heads=4 or 1, q_len=16 or 1, kv_len=16 or 1)"
MATCH = "Make it match query and key; if one of batch and heads is left out, it is heads."
ARRAY = "Pass a JAX or NumPy array."
IN_FRONT = "Reshape it: missing axes are added in front."
X64 = 'Call jax.config.update("jax_enable_x64", True) first, or cast to float32.'
A_MASK = "Wrap a boolean array as Dense(array), or name the rule: Causal(), Window(left, right)."
SCORES = "(batch=2, q_heads=4, q_len=16, kv_len=16)"

ARRAYS = {
    "query of 2 axes": (
        dict(query=shape(16, 8)),
        "query must have 4 axes (BLHD), or 3 without the batch, got query.shape=(16, 8). Add or merge batch axes."),
    "all of 5 axes": (
        {name: shape(1, *x.shape) for name, x in SHAPES.items()},
        "query must have 4 axes (BLHD), or 3 without the batch, got query.shape=(1, 2, 16, 4, 8). "
        "Add or merge batch axes."),
    "key without a batch": (
        dict(key=shape(16, 2, 8)),
        "key must have as many axes as query, got key.shape=(16, 2, 8), query.shape=(2, 16, 4, 8). "
        "Give all of query, key and value a batch axis, or none."),
    "value without a batch": (
        dict(value=shape(16, 2, 8)),
        "value must have as many axes as query, got value.shape=(16, 2, 8), query.shape=(2, 16, 4, 8). "
        "Give all of query, key and value a batch axis, or none."),
    "query a list": (
        dict(query=[[[[1.0]]]]), f"query must be an array, got type(query)=list. {ARRAY}"),
    "key missing": (
        dict(key=None), f"key must be an array, got type(key)=NoneType. {ARRAY}"),
    "value a number": (
        dict(value=1.0), f"value must be an array, got type(value)=float. {ARRAY}"),
    "batch of key": (
        dict(key=shape(3, 16, 2, 8)),
        "query and key must have the same batch size, got query.shape=(2, 16, 4, 8), key.shape=(3, 16, 2, 8) (BLHD). "
        "Broadcast one."),
    "batch of value": (
        dict(value=shape(1, 16, 2, 8)),
        "query and value must have the same batch size, got query.shape=(2, 16, 4, 8), value.shape=(1, 16, 2, 8) "
        "(BLHD). Broadcast one."),
    "length of value": (
        dict(value=shape(2, 15, 2, 8)),
        "key and value must have the same length, got key.shape=(2, 16, 2, 8), value.shape=(2, 15, 2, 8) (BLHD). "
        "Pad or cut one of them."),
    "length of value, heads first": (
        dict(layout="BHLD", query=shape(2, 4, 16, 8), key=shape(2, 2, 16, 8), value=shape(2, 2, 15, 8)),
        "key and value must have the same length, got key.shape=(2, 2, 16, 8), value.shape=(2, 2, 15, 8) (BHLD). "
        "Pad or cut one of them."),
    "heads of value": (
        dict(value=shape(2, 16, 1, 8)),
        "key and value must have the same number of heads, got key.shape=(2, 16, 2, 8), value.shape=(2, 16, 1, 8) "
        "(BLHD). Repeat one."),
    "heads that do not divide": (
        dict(key=shape(2, 16, 3, 8), value=shape(2, 16, 3, 8)),
        "the heads of key must divide the heads of query, got query.shape=(2, 16, 4, 8), key.shape=(2, 16, 3, 8) "
        "(BLHD). Repeat or drop key heads."),
    "no key heads": (
        dict(key=shape(2, 16, 0, 8), value=shape(2, 16, 0, 8)),
        "the heads of key must divide the heads of query, got query.shape=(2, 16, 4, 8), key.shape=(2, 16, 0, 8) "
        "(BLHD). Repeat or drop key heads."),
    "head dimension of key": (
        dict(key=shape(2, 16, 2, 4)),
        "query and key must have the same head dimension, got query.shape=(2, 16, 4, 8), key.shape=(2, 16, 2, 4) "
        "(BLHD). Project one."),
    "too long": (
        dict(query=shape(2, 2**29 + 1, 4, 8)),
        "lengths must be at most 536870912, got query.shape=(2, 536870913, 4, 8), key.shape=(2, 16, 2, 8) (BLHD). "
        "Split the sequence."),
    "layout": (
        dict(layout="BSHD"),
        "layout must be one of ('BLHD', 'BHLD'), got layout='BSHD'. Name the order of the axes."),
    **{f"all {dtype}": (every(dtype), f"query {TAKES}, got query.dtype={dtype}. Cast it.")
       for dtype in ("int32", "bool", "complex64", "uint8")},
    **{f"all {dtype}": (every(dtype), f"query {TAKES}, got query.dtype={dtype}. "
                                      "Cast it to bfloat16 and multiply its scale into `scale`.")
       for dtype in ("float8_e4m3fn", "float8_e5m2")},
    "all float64": (
        {name: np.zeros(x.shape) for name, x in SHAPES.items()},
        f"query can be float64 only in JAX's 64-bit mode, got query.dtype=float64 with jax_enable_x64=False. {X64}"),
    "value float64": (
        dict(value=np.zeros((2, 16, 2, 8))),
        f"value can be float64 only in JAX's 64-bit mode, got value.dtype=float64 with jax_enable_x64=False. {X64}"),
    "key of another dtype": (
        dict(key=shape(2, 16, 2, 8, dtype=jnp.bfloat16)),
        "query and key must have the same dtype, got query.dtype=float32, key.dtype=bfloat16. Cast one of them."),
    "value of another dtype": (
        dict(value=shape(2, 16, 2, 8, dtype=jnp.float16)),
        "query and value must have the same dtype, got query.dtype=float32, value.dtype=float16. Cast one of them."),
    "query in another byte order": (
        dict(query=np.zeros((2, 16, 4, 8), np.dtype(np.float32).newbyteorder())),
        f"query must have the byte order of this machine, got query.dtype={np.dtype(np.float32).newbyteorder().str}. "
        'Convert it: query.astype(query.dtype.newbyteorder("=")).'),
    "key of integers": (
        dict(key=ids(2, 16, 2, 8)), f"key {TAKES}, got key.dtype=int32. Cast it."),
}

MASKS = {
    **{f"a mask of type {type(mask).__name__}": (
        dict(mask=mask), f"mask must be a pallas_flash Mask, got type(mask)={type(mask).__name__}. {A_MASK}")
       for mask in (np.ones((16, 16), bool), Causal, "causal", True)},
    **{f"Dense{sizes}": (
        dict(mask=lambda sizes=sizes: Causal() & Dense(booleans(*sizes))),
        f"Dense.attend must have shape {ROWS_AND_COLUMNS}, got Dense.attend.shape={read_as}. {MATCH}")
       for sizes, read_as in (((3, 1, 16, 16),) * 2, ((2, 2, 16, 16),) * 2, ((15, 16), (1, 1, 15, 16)),
                              ((16, 17), (1, 1, 16, 17)), ((4, 16, 16), (4, 1, 16, 16)))},
    **{f"Dense{sizes}": (
        dict(mask=lambda sizes=sizes: Dense(booleans(*sizes))),
        f"Dense.attend must have 2 to 4 axes ([batch, [heads,]] then positions), got attend.shape={sizes}. Reshape it.")
       for sizes in ((16,), (1, 1, 1, 16, 16))},
    **{f"Dense of {dtype}": (
        dict(mask=lambda dtype=dtype: Dense(shape(16, 16, dtype=dtype))),
        f"Dense.attend must be boolean, got attend.dtype={dtype}. "
        "Compare integers with 0; pass an additive float mask as `bias`.") for dtype in ("int32", "float32")},
    **{f"{name}={value!r}": (
        dict(mask=lambda rule=rule, value=value: rule(value)),
        f"{name} must be an integer or an integer array, got {name.split('.')[1]}={value!r}. "
        "Pass positions as integers.")
       for name, rule, value in (
           ("Window.left", Window, 2.5), ("Window.left", Window, None), ("Window.right", lambda x: Window(1, x), "all"),
           ("Window.right", lambda x: Window(1, x), True), ("Window.offset", Causal, 1.0),
           ("PrefixLM.prefix", PrefixLM, 0.5), ("InBounds.q_len", InBounds, 3.0))},
    "offsets that are not integers": (
        dict(mask=lambda: Causal(shape(2))),
        "Window.offset must be an integer or an integer array, got offset.dtype=float32. Pass positions as integers."),
    **{f"Window({left}, {right})": (
        dict(mask=lambda left=left, right=right: Window(left, right)),
        f"Window needs -left <= right, got left={left}, right={right}. "
        "Give the number of keys on each side of the aligned one, and leave out a side without a limit.")
        for left, right in ((-2, 1), (-1, -1), (3, -4))},
    "both sides of a window in one": (  # two entries of a batch of 2 without a word
        dict(mask=lambda: Window((3, 0))),
        "left and right of Window must be two arguments, got left=(3, 0). Write Window(3, 0), or pass an array for "
        "numbers that differ in the batch."),
    "offsets of another batch": (
        dict(mask=lambda: Causal(ids(3))),
        f"Window.offset must have shape (batch=2 or 1, q_heads=4 or 1), got Window.offset.shape=(3, 1). {MATCH}"),
    "lengths of another batch": (
        dict(mask=lambda: InBounds(kv_len=ids(3))),
        f"InBounds.kv_len must have shape (batch=2 or 1, q_heads=4 or 1), got InBounds.kv_len.shape=(3, 1). {MATCH}"),
    "prefixes of 3 axes": (
        dict(mask=lambda: PrefixLM(ids(2, 1, 1))),
        "PrefixLM.prefix must have 0 to 2 axes ([batch, [heads,]] then positions), got prefix.shape=(2, 1, 1). "
        "Reshape it."),
    "segment ids of another length": (
        dict(mask=lambda: SegmentIds(ids(2, 16), ids(2, 15))),
        "SegmentIds.kv_ids must have shape (batch=2 or 1, q_heads=4 or 1, kv_len=16), "
        f"got SegmentIds.kv_ids.shape=(2, 1, 15). {MATCH}"),
    "one segment id for all": (
        dict(mask=lambda: SegmentIds(ids(2, 1), ids(2, 16))),
        "SegmentIds.q_ids must have shape (batch=2 or 1, q_heads=4 or 1, q_len=16), "
        f"got SegmentIds.q_ids.shape=(2, 1, 1). {MATCH}"),
}

OTHER_ARRAYS = {
    **{f"bias{sizes}": (
        dict(bias=shape(*sizes)), f"bias must broadcast to {SCORES}, got bias.shape={sizes}. {IN_FRONT}")
       for sizes in ((4, 16, 15), (2, 2, 16, 16), (3, 4, 16, 16), (1, 1, 1, 16, 16))},
    "bias of booleans": (
        dict(bias=booleans(16, 16)),
        f"bias {TAKES}, got bias.dtype=bool. Pass a boolean array as a mask: Dense(array)."),
    **{f"bias of {dtype}": (
        dict(bias=shape(16, 16, dtype=dtype)), f"bias {TAKES}, got bias.dtype={dtype}. Cast it.")
       for dtype in ("int32", "float8_e4m3fn")},
    "bias of float64": (
        dict(bias=np.zeros((16, 16))),
        f"bias can be float64 only in JAX's 64-bit mode, got bias.dtype=float64 with jax_enable_x64=False. {X64}"),
    "bias a list": (
        dict(bias=[[0.0]]), f"bias must be an array, got type(bias)=list. {ARRAY}"),
    **{f"segment_ids{sizes}": (
        dict(segment_ids=ids(*sizes)),
        f"segment_ids must broadcast to (batch=2, length=16), got segment_ids.shape={sizes}. {IN_FRONT}")
       for sizes in ((2, 15), (3, 16), (2, 1), (2, 16, 1))},
    **{f"segment_ids of {dtype}": (
        dict(segment_ids=shape(2, 16, dtype=dtype)),
        f"segment_ids must hold integers, got segment_ids.dtype={dtype}. Cast it to int32.")
       for dtype in ("float32", "bool")},
    "segment_ids lists that are too short": (
        dict(segment_ids=[[0] * 15] * 2),
        f"segment_ids must broadcast to (batch=2, length=16), got segment_ids.shape=(2, 15). {IN_FRONT}"),
    **{f"{name} of unequal lists": (
        {name: [[0] * 2, [0]]}, f"{name} must be lists of equal lengths, or an array, got {name}=[[0, 0], [0]]. "
                                "Pad the shorter ones.") for name in ("segment_ids", "kv_lengths")},
    **{f"{name}={value!r}": (
        {name: value}, f"{name} must hold integers, got {name}={value!r}. Pass integers, or an array of them.")
       for name in ("segment_ids", "kv_lengths") for value in ([1.5, 2], ["a"], [None])},
    "no lengths": (
        dict(kv_lengths=[]), f"kv_lengths must broadcast to (batch=2), got kv_lengths.shape=(0,). {IN_FRONT}"),
    "no segment_ids": (
        dict(segment_ids=[]),
        f"segment_ids must broadcast to (batch=2, length=16), got segment_ids.shape=(0,). {IN_FRONT}"),
    **{f"{name} that marks positions, {dtype}": (
        {name: shape(2, 16, dtype=dtype)},
        f"{name} must broadcast to (batch=2), got {name}.shape=(2, 16). Count the real positions of each row; an array "
        f"that marks them is a mask, Dense((x != 0)[:, {axes}]), or segment_ids, -1 at padding.")
       for name, axes in (("kv_lengths", "None, None, :"), ("q_lengths", "None, :, None"))
       for dtype in ("int32", "bool")},
    **{f"{name}={value!r}": (
        {name: value}, f"{name} must be at least 0, got {shown}=-4. Pass the number of real positions.")
       for name in ("kv_lengths", "q_lengths")
       for value, shown in ((-4, f"min({name})"), ([3, -4], f"min({name})"), (np.array([3, -4]), f"min({name})"))},
    **{f"InBounds({value!r})": (
        dict(mask=lambda value=value: InBounds(kv_len=value)),
        f"InBounds.kv_len must be at least 0, got {shown}=-4. Pass the number of real positions.")
       for value, shown in ((-4, "InBounds.kv_len"), (np.array([3, -4]), "min(InBounds.kv_len)"))},
    "three segment_ids": (
        dict(segment_ids=(ids(2, 16),) * 3),
        "segment_ids must be an array, or a tuple (q_ids, kv_ids), got len(segment_ids)=3. "
        "Pass integers of shape (batch, length)."),
    "segment_ids of keys": (
        dict(segment_ids=(ids(2, 16), ids(2, 15))),
        f"segment_ids[1] must broadcast to (batch=2, length=16), got segment_ids[1].shape=(2, 15). {IN_FRONT}"),
    "segment_ids for two lengths": (
        dict(query=shape(2, 12, 4, 8), segment_ids=ids(2, 12)),
        "segment_ids must be a tuple (q_ids, kv_ids) where query and key differ in length, got q_len=12, kv_len=16. "
        "Pass the ids of both."),
    **{f"{name}{sizes}": (
        {name: ids(*sizes)}, f"{name} must broadcast to (batch=2), got {name}.shape={sizes}. {IN_FRONT}")
       for name in ("q_lengths", "kv_lengths") for sizes in ((3,), (2, 1))},
    "q_lengths a long list": (
        dict(q_lengths=[1, 2, 3]), f"q_lengths must broadcast to (batch=2), got q_lengths.shape=(3,). {IN_FRONT}"),
    "kv_lengths of float32": (
        dict(kv_lengths=shape(2)), "kv_lengths must hold integers, got kv_lengths.dtype=float32. Cast it to int32."),
    **{f"sinks{sizes}": (
        dict(sinks=shape(*sizes)), f"sinks must have shape (q_heads,) = (4,), got sinks.shape={sizes}. "
                                   "Give one logit a query head; under shard_map, of the shard's heads.")
       for sizes in ((), (3,), (2, 4), (1, 4))},
    **{f"sinks of {dtype}": (
        dict(sinks=shape(4, dtype=dtype)), f"sinks must have one of the dtypes bfloat16, float16, float32, float64, "
                                           f"got sinks.dtype={dtype}. Cast it.")
       for dtype in ("int32", "bool", "float8_e4m3fn")},
    "sinks a list": (
        dict(sinks=[0.0] * 4), "sinks must be an array, got type(sinks)=list. Pass a JAX or NumPy array."),
    "kv_lengths a float": (
        dict(kv_lengths=3.5), "kv_lengths must hold integers, got kv_lengths=3.5. Pass integers, or an array of them."),
}

NUMBERS = {
    **{f"scale={value!r}": (
        dict(scale=value), f"scale must be a Python number from -1e+30 to 1e+30, or None, got scale={value!r}. "
                           "For a traced scale, multiply the query with it and pass scale=1.0.")
       for value in (float("nan"), float("inf"), 1e39, 10**400, "1", True, 1j, np.ones(2))},
    **{f"softcap={value!r}": (
        dict(softcap=value),
        f"softcap must be a Python number from 1e-30 to 1e+30, or None, got softcap={value!r}. Pass None for no cap.")
       for value in (0, -1.0, 1e-39, 1e39, float("nan"), float("inf"), "30")},
    **{f"dropout_rate={value!r}": (
        dict(dropout_rate=value), f"dropout_rate must be a Python number in [0, 1], got dropout_rate={value!r}. "
                                  "Pass the probability of dropping an entry.")
       for value in (-0.1, 1.5, float("nan"), None, "0.1", True, np.ones(3))},
}

FLAGS = {
    f"{name}={value!r}": (
        {name: value}, f"{name} must be True or False, got {name}={value!r}. Pass a Python bool.")
    for name in ("deterministic", "return_lse") for value in ("no", 1, 0, None, 1.0, [])
}

CASES = ARRAYS | MASKS | OTHER_ARRAYS | NUMBERS | FLAGS


@pytest.mark.parametrize(("keywords", "message"), CASES.values(), ids=CASES)
def test_messages(keywords, message):
    assert raised(flash_attention, keywords) == message
    assert raised(explain, keywords) == message


def test_messages_have_one_form():
    """What must hold, got name=value; what to do."""
    for _, message in CASES.values():
        must, given = message.split(", got ")
        assert "=" in given and given.endswith(".") and must


# dot_product_attention names its own arguments ------------------------------------------------------------------------

WINDOW = "local_window_size must be an integer >= 0 or a pair (left, right) of them"
DOT_PRODUCT = {
    **{f"mask{sizes}": (
        dict(mask=booleans(*sizes)), f"mask must broadcast to {SCORES}, got mask.shape={sizes}. {IN_FRONT}")
       for sizes in ((3, 1, 16, 16), (2, 16, 16), (16, 15), (1, 1, 1, 16, 16))},
    "mask of floats": (
        dict(mask=shape(16, 16)), "mask must be boolean, got mask.dtype=float32. Pass an additive mask as `bias`."),
    "mask a list": (dict(mask=[[True]]), f"mask must be an array, got type(mask)=list. {ARRAY}"),
    "mask a rule": (dict(mask=Causal()), f"mask must be an array, got type(mask)=Window. {ARRAY[:-1]}; flash_attention "
                                         "takes a rule as its mask."),
    **{f"{name}={value!r}": ({name: value}, f"{name} must be True or False, got {name}={value!r}. Pass a Python bool.")
       for name in ("is_causal", "return_residual") for value in ("no", 1, None)},
    **{f"{name}": (
        {name: ids(3)}, f"{name} must broadcast to (batch=2), got {name}.shape=(3,). {IN_FRONT}")
       for name in ("query_seq_lengths", "key_value_seq_lengths")},
    "key_value_seq_lengths of floats": (
        dict(key_value_seq_lengths=shape(2)),
        "key_value_seq_lengths must hold integers, got key_value_seq_lengths.dtype=float32. Cast it to int32."),
    **{f"local_window_size={value!r}": (
        dict(local_window_size=value),
        f"{WINDOW}, got local_window_size={value!r}. Count the keys visible on each side.")
       for value in (-1, 2.5, (1, -1), (1, 2, 3), (1, None), True)},
    "key": ARRAYS["batch of key"], "bias": OTHER_ARRAYS["bias of booleans"],
    "dropout_rate": NUMBERS["dropout_rate=1.5"],
}


@pytest.mark.parametrize(("keywords", "message"), DOT_PRODUCT.values(), ids=DOT_PRODUCT)
def test_messages_of_dot_product_attention(keywords, message):
    assert raised(dot_product_attention, keywords) == message


# Keywords and operators that do not exist -----------------------------------------------------------------------------

KEYWORDS = {
    (flash_attention, "causal=True"): "Pass mask=Causal().",
    (flash_attention, "is_causal=True"): "Pass mask=Causal().",
    (explain, "is_causal=True"): "Pass mask=Causal().",
    (flash_attention, "window_size=(3, 0)"): "Pass mask=Window(left, right).",
    (flash_attention, "local_window_size=3"): "Pass mask=Window(left, right).",
    (flash_attention, "sofcap=3.0"): "Pass softcap=.",
    (flash_attention, "enable_gqa=True"): "Leave it out: the heads of key may divide those of query.",
    (flash_attention, "return_residual=True"): "Pass return_lse=True.",
    (flash_attention, "s_aux=None"): "Pass sinks=.",
    (explain, "learnable_sink=None"): "Pass sinks=.",
    (dot_product_attention, "softmax_offset=None"): "Pass sinks=.",
    (dot_product_attention, "causal=True"): "Pass is_causal=True.",
    **{(call, f"{name}=1"): "Pass mask=Causal(offset=...)."
       for call in (flash_attention, explain) for name in ("causal_offset", "offset")},
    **{(dot_product_attention, f"{name}=1"): "Call flash_attention, which takes mask=Causal(offset=...)."
       for name in ("causal_offset", "offset")},
    (dot_product_attention, "attn_mask=None"): "Pass mask=array or bias=array.",
    (dot_product_attention, "attention_mask=None"): "Pass mask=array.",
    (dot_product_attention, "window_size=3"): "Pass local_window_size=(left, right).",
    (dot_product_attention, "kv_lengths=3"): "Pass key_value_seq_lengths=.",
    (dot_product_attention, "broadcast_dropout=True"):
        "Give a Flax layer attention_fn=pallas_flash.flax.dot_product_attention, which takes what Flax passes.",
}


@pytest.mark.parametrize(("case", "do"), KEYWORDS.items(), ids=[f"{f.__name__}-{k}" for f, k in KEYWORDS])
def test_keywords_of_others(case, do):
    """Regression: Python's own TypeError, which names nothing that exists."""
    call, keyword = case
    name, value = keyword.split("=")
    with pytest.raises(TypeError) as error:
        call(**SHAPES, **{name: ast.literal_eval(value)})
    assert str(error.value) == f"{call.__name__}() has no argument `{name}`, got {keyword}. {do}"


def test_no_guess_by_likeness_to_a_name_of_another_library():
    """Regression: `offset` was like softmax_offset, so that sinks were to be passed."""
    with pytest.raises(TypeError, match=r"no argument `softmax_offsets`, got softmax_offsets=1. It has query, key,"):
        flash_attention(**SHAPES, softmax_offsets=1)


def test_a_flax_layer_with_the_wrong_function():
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.MultiHeadAttention(2, 16, decode=False, rngs=nnx.Rngs(0), attention_fn=dot_product_attention)
    with pytest.raises(TypeError, match=r"attention_fn=pallas_flash\.flax\.dot_product_attention"):
        layer(jnp.zeros((1, 4, 16)))


def test_signatures_are_those_that_are_written():
    asked = [*inspect.signature(flash_attention).parameters, "device"]
    assert asked == list(inspect.signature(explain).parameters)
    assert flash_attention.__name__ == "flash_attention" and "Exact attention" in flash_attention.__doc__


OPERATORS = {
    "mask & array": (lambda a: Causal() & a, "both sides of `&` must be masks, got types=Window & {0}. Wrap a boolean"),
    "array & mask": (lambda a: a & Causal(), "both sides of `&` must be masks, got types={0} & Window. Wrap a boolean"),
    "mask | array": (lambda a: Causal() | a, "masks can only be intersected, with `&`, got operator=Window | {0}."),
    "array | mask": (lambda a: a | Causal(), "masks can only be intersected, with `&`, got operator={0} | Window."),
    "mask ^ array": (lambda a: Causal() ^ a, "masks can only be intersected, with `&`, got operator=Window ^ {0}."),
    "~mask": (lambda a: ~Causal(), "masks can only be intersected, with `&`, got operator=~Window."),
}


@pytest.mark.parametrize(("operate", "message"), OPERATORS.values(), ids=OPERATORS)
def test_operators_of_masks(operate, message):
    """Regression: Python's own TypeError, or NumPy's."""
    for other in (np.ones((16, 16), bool), jnp.ones((16, 16), bool), None, True):
        with pytest.raises(TypeError) as error:
            operate(other)
        assert str(error.value).startswith(message.format(type(other).__name__))
        assert "Dense(array)" in str(error.value)


def test_masks_join_masks():
    assert str(Causal() & Window(3)) == "Causal() & Window(left=3)"
    with pytest.raises(TypeError, match=r"got operator=Window \| Window"):
        Causal() | Window(3)


def test_a_mask_is_called_by_its_own_class():
    """Regression: a class of a user's made of `Window`, with another `keep`, was shown as Causal() in reasons."""
    class Sparse(Window):
        def keep(self, q_pos, kv_pos):
            return super().keep(q_pos, kv_pos) & (kv_pos % 4 == 0)

    assert str(Sparse(right=0)) == "Sparse(right=0)"
    assert [str(mask) for mask in (Window(right=0, offset=2), Window(1, 0))] == [
        "Causal(offset=2)", "Window(left=1, right=0)"]


TORCH = {
    "query": lambda t: dict(query=t), "bias": lambda t: dict(bias=t), "segment_ids": lambda t: dict(segment_ids=t),
    "kv_lengths": lambda t: dict(kv_lengths=t), "Dense": lambda t: dict(mask=Dense(t)),
    "SegmentIds": lambda t: dict(mask=SegmentIds(t, t)), "Causal": lambda t: dict(mask=Causal(t)),
    "dropout_rng": lambda t: dict(dropout_rate=0.5, dropout_rng=t),
}


@pytest.mark.parametrize("make", TORCH.values(), ids=TORCH)
def test_torch_tensors_are_for_the_bridge(make):
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"torch_bridge\.flash_attention"):
        flash_attention(**{**{name: np.zeros(x.shape, np.float32) for name, x in SHAPES.items()},
                           **make(torch.zeros(2, dtype=torch.int32))})


def test_a_class_of_masks_without_keep():
    @dataclasses.dataclass(frozen=True)
    class Nothing(Mask):
        pass
    assert raised(flash_attention, dict(mask=lambda: Causal() & Nothing())) == (
        "a class of masks must define keep(q_pos, kv_pos), got mask=Nothing(), without. "
        "Return True where the query at q_pos attends to the key at kv_pos.")


# What only a call, or a trace, can get wrong --------------------------------------------------------------------------

KEY = "dropout_rng must be one JAX PRNG key, or uint32 of shape (2,)"
MAKE_ONE = "Make one with jax.random.key(seed)."
DROPOUT_RNG = {
    "missing": (None, "dropout_rng must be given when dropout_rate > 0, got dropout_rate=0.5, dropout_rng=None. "
                      "Pass a JAX PRNG key, a new one for every call."),
    "a number": (0, f"{KEY}, got dropout_rng with dtype=int, shape=None. {MAKE_ONE}"),
    "float": (np.zeros(2, np.float32), f"{KEY}, got dropout_rng with dtype=float32, shape=(2,). {MAKE_ONE}"),
    "four words": (np.zeros(4, np.uint32), f"{KEY}, got dropout_rng with dtype=uint32, shape=(4,). {MAKE_ONE}"),
    "two keys": (jax.eval_shape(lambda: jax.random.split(jax.random.key(0))),
                 f"{KEY}, got dropout_rng with dtype=key<fry>, shape=(2,). {MAKE_ONE}"),
}


class NotADataclass(Mask):
    pass


@dataclasses.dataclass
class NotFrozen(Mask):
    pass


@pytest.mark.parametrize("rule", [NotADataclass, NotFrozen])
@pytest.mark.parametrize("others", [Full(), Window(3)], ids=str)
def test_classes_of_masks_that_forget_the_dataclass(rule, others):
    """Regression: a TypeError of dataclasses', or one about a hash."""
    assert raised(flash_attention, dict(mask=lambda: others & rule())) == (
        f"a class of masks must be a frozen dataclass, got mask={rule.__name__}(), which is not. "
        f"Write @dataclasses.dataclass(frozen=True) above class {rule.__name__}.")


@dataclasses.dataclass(frozen=True)
class Hidden(Mask):
    reach: int = dataclasses.field(default=3, compare=False)

    def keep(self, q_pos, kv_pos):
        return kv_pos > q_pos - self.reach


def test_fields_of_masks_that_are_not_compared():
    """Regression: what had been made for Hidden(3) was used for Hidden(4), which is equal to it."""
    assert raised(flash_attention, dict(mask=lambda: Causal() & Hidden(4))) == (
        "all fields of a class of masks must take part in comparison, or results of one would be computed with another"
        ", got Hidden with compare=False for reach. Leave out compare=False; of arrays only shapes are compared, and "
        "values may differ from call to call.")


@pytest.mark.parametrize(("rng", "message"), DROPOUT_RNG.values(), ids=DROPOUT_RNG)
@pytest.mark.parametrize("call", [flash_attention, dot_product_attention])
def test_dropout_rng(call, rng, message):
    assert raised(call, dict(dropout_rate=0.5, dropout_rng=rng)) == message


WITHOUT_VALUES = {
    "query": SHAPES, "value": {name: np.zeros(x.shape, np.float32) for name, x in SHAPES.items() if name != "value"},
    "bias": dict(bias=shape(16, 16)), "Dense.attend": dict(mask=lambda: Causal() & Dense(booleans(16, 16))),
    "sinks": dict(sinks=shape(4)),
    "InBounds.kv_len": dict(kv_lengths=ids(2)), "SegmentIds.q_ids": dict(segment_ids=ids(2, 16)),
}


@pytest.mark.parametrize(("name", "keywords"), WITHOUT_VALUES.items(), ids=WITHOUT_VALUES)
def test_shapes_without_values_are_for_explain(name, keywords):
    """Regression: flash_attention of a ShapeDtypeStruct was a TypeError of JAX's."""
    arrays = {} if name in SHAPES else {name: np.zeros(x.shape, np.float32) for name, x in SHAPES.items()}
    assert raised(flash_attention, arrays | keywords) == (
        f"{name} must hold values to compute with, got type({name})=ShapeDtypeStruct. "
        "Ask explain() about shapes alone, or trace with jax.eval_shape or jax.jit(...).lower.")


@pytest.mark.parametrize(("name", "must"), [
    ("scale", "scale must be a Python number from -1e+30 to 1e+30, or None"),
    ("softcap", "softcap must be a Python number from 1e-30 to 1e+30, or None"),
    ("dropout_rate", "dropout_rate must be a Python number in [0, 1]"),
])
def test_traced_numbers(name, must):
    call = lambda number: flash_attention(**SHAPES, **{name: number})
    with pytest.raises(ValueError) as error:
        jax.eval_shape(call, shape())
    assert str(error.value).startswith(f"{must}, got {name}=JitTracer")


def test_symbolic_lengths():
    """jax.export with a symbolic batch is fine, with a symbolic length it is not."""
    b, n = jax.export.symbolic_shape("b, n")
    explain(*(shape(b, 16, heads, 8) for heads in (4, 2, 2)))
    assert raised(explain, {name: shape(2, n, *x.shape[2:]) for name, x in SHAPES.items()}) == (
        "query must have numbers for all axes but the batch, got query.shape=(2, n, 4, 8). "
        "Export one program for each length.")


def test_a_spec_of_its_own_checks_the_same():
    """`AttentionSpec.of` is the only maker of specs, whoever calls it."""
    q, k = SHAPES["query"], SHAPES["key"]
    cases = {
        "query must have 4 axes (BLHD), got query.shape=(16, 8)": dict(q=shape(16, 8)),
        "key and value must have the same length": dict(v=shape(2, 15, 2, 8)),
        f"bias must have shape {(2, 4, 16, 16)}": dict(bias=shape(16, 16)),
        "mask must be a pallas_flash Mask": dict(mask="causal"),
        "softcap must be": dict(softcap=0),
    }
    for message, keywords in cases.items():
        with pytest.raises(ValueError) as error:
            AttentionSpec.of(**(dict(q=q, k=k, v=k) | keywords))
        assert message in str(error.value)
