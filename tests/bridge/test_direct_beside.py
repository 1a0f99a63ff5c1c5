"""What torch makes beside the launches is what JAX makes: every number of every array, for each pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from bridge.direct import H200, SMALL, VERSIONS
from pallas_flash import device, masks
from pallas_flash.kernels.hopper import calls, defaults
from pallas_flash.kernels.mosaic import bias
from pallas_flash.packed import Packing
from pallas_flash.spec import AttentionSpec, Operands
from torch_bridge.direct import beside, intervals, lower, operations, plan
from torch_bridge.direct.problem import Request

B, H, L, S = 2, 4, 300, 430
CAUSAL = masks.Window(masks.UNBOUNDED, 0, S - L)


def ints(*numbers):
    return np.array(numbers, np.int32)


@functools.cache
def random_ids(seed, *shape):
    return np.random.default_rng(seed).integers(-1, 5, shape).astype(np.int32)


@functools.cache
def random_floats(dtype, *shape):
    """Some of -inf, some of finfo.min, and a row of each."""
    random = np.random.default_rng(5)
    found = random.normal(size=shape) * 3
    found[random.random(shape) < 0.2] = -np.inf
    found[..., :1, :] = np.finfo(np.float32).min if dtype == "float32" else -3e4
    found[..., -1:, :] = found[..., -1:, :] - np.inf if shape[2] > 1 else found[..., -1:, :]
    return jnp.asarray(found, dtype)


def packed(given, spec):
    packing = Packing(given["q"], given["kv"], None, None, "last")
    return masks.checked(packing.mask(masks.Window(50, 3, 0), spec, batched=False))


STARTS = dict(q=ints(0, 5, 100, 100, 128, 290), kv=ints(0, 5, 110, 110, 138, 300))
CASES = {  # the arrays of a call, and its mask of them
    "kv lengths": (dict(kv=ints(430, 17)), lambda given, _: CAUSAL & masks.InBounds(kv_len=given["kv"])),
    "lengths of nothing": (dict(q=ints(0, 300), kv=ints(400, 0)),
                           lambda given, _: masks.InBounds(given["q"], given["kv"])),
    "offsets": (dict(at=ints(-400, 12)), lambda given, _: masks.Window(40, 7, given["at"])),
    "ids": (dict(q=np.sort(random_ids(0, B, L)), kv=np.sort(random_ids(1, B, S))),
            lambda given, _: CAUSAL & masks.SegmentIds(given["q"], given["kv"])),
    "ids in any order": (dict(q=random_ids(0, B, L), kv=random_ids(1, B, S)),
                         lambda given, _: masks.SegmentIds(given["q"], given["kv"])),
    "ids of one query": (dict(q=ints(3, -1).reshape(B, 1), kv=random_ids(1, B, S)),
                         lambda given, _: masks.Window(masks.UNBOUNDED, 0, 300) & masks.SegmentIds(
                             given["q"], given["kv"])),
    "packed": (STARTS, packed),
    "packed, not rising": (dict(q=ints(3, 90, 50, 999, 400, 400), kv=ints(-7, 5, 110, 90, 500, 200)), packed),
    "dense": (dict(mask=np.random.default_rng(3).random((B, 1, L, S)) < 0.02),
              lambda given, _: masks.Dense(given["mask"])),
    "padding": (dict(mask=np.random.default_rng(3).random((B, 1, 1, S)) < 0.5),
                lambda given, _: masks.Dense(given["mask"]) & CAUSAL),
    "dense, of heads": (dict(mask=np.random.default_rng(3).random((1, H, L, S)) < 0.3),
                        lambda given, _: masks.Dense(given["mask"])),
    "dense, of queries": (dict(mask=np.random.default_rng(3).random((B, 1, L, 1)) < 0.5),
                          lambda given, _: masks.Dense(given["mask"]) & CAUSAL),
    "bias of keys": (dict(bias=random_floats("float32", B, 1, 1, S)), lambda given, _: masks.Full()),
    "bias of keys and heads": (dict(bias=random_floats("bfloat16", 1, H, 1, S)), lambda given, _: masks.Full()),
    "bias of keys, causal": (dict(bias=random_floats("float32", 1, H, 1, S)), lambda given, _: CAUSAL),
    "bias of keys, the first queries see none": (dict(bias=random_floats("bfloat16", B, 1, 1, S)),
                                                 lambda given, _: masks.Window(masks.UNBOUNDED, 0, -40)),
    "bias of keys, the last queries see all": (dict(bias=random_floats("float32", B, 1, 1, S)),
                                               lambda given, _: masks.Window(masks.UNBOUNDED, 0, 300)),
    "bias of pairs": (dict(bias=random_floats("bfloat16", B, 1, L, S)), lambda given, _: masks.Full()),
    "bias of pairs, float32": (dict(bias=random_floats("float32", 1, H, L, S)), lambda given, _: masks.Full()),
    "bias of pairs, causal": (dict(bias=random_floats("float32", 1, H, L, S)), lambda given, _: CAUSAL),
    "bias of pairs, lengths": (dict(bias=random_floats("float16", 1, 1, L, S), kv=ints(430, 17)),
                               lambda given, _: CAUSAL & masks.InBounds(kv_len=given["kv"])),
    "bias, dense, dropout": (dict(bias=random_floats("float32", 1, H, 1, S), seed=ints(7, 8)),
                             lambda given, _: masks.Full()),
    "dropout": (dict(seed=ints(-5, 2**31 - 1)), lambda given, _: CAUSAL),
    "dropout, lengths": (dict(seed=ints(7, 8), kv=ints(3, 400)), lambda given, _: masks.InBounds(kv_len=given["kv"])),
}


def made(name, pass_name):
    """The function that makes the arrays of a pass, and those of the call."""
    given, rule = CASES[name]
    batch = 1 if "packed" in name else B
    q_len = 1 if "one query" in name else L
    q, k = (jax.ShapeDtypeStruct((batch, n, h, 64), "bfloat16") for n, h in ((q_len, H), (S, 2)))
    plain = AttentionSpec.of(q, k, k, dropout_rate=0.25 if "seed" in given else 0.0)
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)
    spec = plain.masked(rule(types, plain).canonical(), types.get("bias"))
    found = calls.passes(spec, device.H200)[("forward", "backward").index(pass_name)]

    def make(arrays):
        seed = jax.lax.bitcast_convert_type(arrays["seed"], "uint32") if "seed" in arrays else None
        return found.make(Operands(None, None, None, arrays.get("bias"), (), rule(arrays, plain).canonical(), (), seed,
                                   None, None))
    return make, given, types, found


def tensor_of(array):
    array = np.array(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def bits_of(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}.get(tensor.itemsize, tensor.dtype)).numpy()


@pytest.mark.parametrize("pass_name", ["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_jaxs(name, pass_name, monkeypatch):
    """Also of what a kernel makes where there is one: other generations have none."""
    for kernel in ("has_mask_kernel", "has_keys_kernel"):
        monkeypatch.setattr(defaults, kernel, lambda spec: False)
    make, given, types, found = made(name, pass_name)
    wanted = jax.jit(make)(given)
    written = beside.traced(make, types)
    assert {operation.name for operation in written.operations} <= plan.OPERATIONS
    constants = {key: tensor_of(x) for key, x in written.constants.items()}
    assert {*wanted} <= {*found.inputs}
    function = operations.Function(written.operations, [*given], constants, [*wanted])
    tensors = [*map(tensor_of, given.values())]
    for _ in range(2):  # what is made is new each time: the forward's kernel counts in it
        results = function(tensors)
        for (key, array), tensor in zip(wanted.items(), results, strict=True):
            assert tensor.is_contiguous() and str(tensor.dtype).removeprefix("torch.") == array.dtype.name
            np.testing.assert_array_equal(bits_of(tensor), bits_of(tensor_of(array)), err_msg=key)
            tensor.zero_()
    addresses = [x.untyped_storage().data_ptr() for x in (*results, *tensors, *constants.values())]
    assert len({*addresses}) == len(addresses)
    assert all(torch.equal(x, tensor_of(y)) for x, y in zip(tensors, given.values(), strict=True))


def test_launches_read_what_is_given_where_it_lies():
    """With kernels that make what is read of masks and seeds, operations only limit lengths, so that no sum overflows.
    """
    lengths, seed = ("kv_lengths", (1,), "int32"), ("seed", (2,), "int32")
    for given, wanted in (((lengths,), ["field0"]), ((("q_ids", (1, 200), "int32"), ("kv_ids", (1, 256), "int32")), []),
                          ((seed,), []), ((lengths, seed), ["field0"])):
        problem = dataclasses.replace(SMALL, given=given, dropout_p=0.25 * (seed in given))
        for pass_name in ("forward", "backward"):
            program = lower.lower(Request(problem, pass_name, H200, VERSIONS))
            assert [*program.made] == wanted and len(program.operations) <= 4 * len(wanted)
            read = {name for step in program.steps for name in step.arrays if name.startswith("given")}
            assert read == {f"given {name}" for name, _, _ in given if name != "kv_lengths"} <= {*program.buffers}
            assert not [name for name in program.inputs if "field" in name or "seed" in name]


@pytest.mark.parametrize("offset", [-400, -299, -40, 0, S - L, 300, 500])
def test_a_bias_of_keys_is_anchored_where_a_causal_mask_ends(offset):
    """The anchor of the loop over rows."""
    values, x = random_floats("float32", B, H, 1, S), jax.ShapeDtypeStruct((B, L, H, 64), "bfloat16")
    values = values.at[..., 7].set(5e3).at[..., 200].set(2e4)
    spec = AttentionSpec.of(x, *[jax.ShapeDtypeStruct((B, S, H, 64), "bfloat16")] * 2).masked(
        masks.Window(masks.UNBOUNDED, 0, offset).canonical(), values)
    operands = Operands(None, None, None, values, (), masks.Window(masks.UNBOUNDED, 0, offset).canonical(), (), None,
                        None, None)
    assert bias.is_anchored_at_once(spec)
    for a, b in zip(bias.inputs(spec, operands), bias.inputs(spec, operands, L), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "max", "min", "div", "where", "stack", "and"])
def test_intervals_hold_what_is_computed(name):
    """And what is said of a comparison, or of a limit, is so for every element. Sums that wrap around, too."""
    random = np.random.default_rng(0)
    for _ in range(200):
        ends = [sorted(random.integers(-scale, scale, 2).tolist()) for scale in random.choice((3, 50, 2**31 - 1), 2)]
        a, b = (random.integers(low, high, 30, endpoint=True).astype(np.int32) for low, high in ends)
        known = [intervals.Interval(*end) for end in ends]
        if name == "div":
            b, known[1] = b[:1] * 0 + 7, intervals.Interval(7, 7)
        given = ([np.arange(30) % 2 == 0, intervals.FLAGS],) * (name == "where") + ((a, known[0]), (b, known[1]))
        parameters = (0,) if name == "stack" else ()
        with np.errstate(over="ignore"):
            found = beside._HERE[name](*(x for x, _ in given), *parameters)
        low, high = intervals.of(name, [interval for _, interval in given], parameters)
        assert low <= found.min() and found.max() <= high
        for comparison in ("lt", "le", "gt", "ge", "eq", "ne"):
            answer = intervals.decided(comparison, *known)
            assert answer is None or (beside._HERE[comparison](a, b) == answer).all()
        which = intervals.returned(name, *known)
        assert which is None or np.array_equal(found, np.broadcast_to((a, b)[which], found.shape))
