"""The Hopper implementation under JAX's transformations, lowered for an H100 on any machine: each kernel once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_flash as pf
from pallas_flash import autodiff, device
from pallas_flash.kernels.mosaic import batching
from pallas_flash.spec import AttentionSpec, Operands

Q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
STACKED = jax.ShapeDtypeStruct((3, *Q.shape), Q.dtype)
OFFSETS = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((3,), jnp.int32)


def attend(q, k, v):
    return pf.flash_attention(q, k, v, mask=pf.Causal(), implementation="hopper")


def loss(q, k, v, deterministic=False):
    out = pf.flash_attention(q, k, v, mask=pf.Causal(), implementation="hopper", deterministic=deterministic)
    return out.astype(jnp.float32).sum()


in_turns = functools.partial(loss, deterministic=True)


BATCH = P("batch")


def on_two_devices(function, in_specs=BATCH, out_specs=BATCH):
    """`function` of a batch that two devices share. It asks for them when it is called: while tests are collected, the
    machine may have one."""
    def call(*arrays):
        if len(jax.devices()) < 2:
            pytest.skip("needs 2 devices")
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*arrays)
    return call


def scanned(q, k, v):
    return jax.lax.scan(lambda x, _: (attend(x, k, v), None), q, None, length=3)[0]


def loss_at(q, k, v, offset):
    """With a mask that holds arrays: an offset, and the lengths of keys."""
    mask = pf.Causal(offset=offset) & pf.InBounds(kv_len=jnp.array([200, 256]))
    return pf.flash_attention(q, k, v, mask=mask, implementation="hopper").astype(jnp.float32).sum()


KEEP = jax.checkpoint_policies.save_only_these_names(*pf.RESIDUAL_NAMES)
CASES = {
    "jit": (attend, (Q, Q, Q)),
    "vmap": (jax.vmap(attend), (STACKED, STACKED, STACKED)),
    "vmap-shared-keys": (jax.vmap(attend, in_axes=(0, None, None)), (STACKED, Q, Q)),
    "vmap-grad": (jax.vmap(jax.grad(loss, (0, 1, 2)), in_axes=(0, None, None)), (STACKED, Q, Q)),
    "grad": (jax.grad(loss, (0, 1, 2)), (Q, Q, Q)),
    "vmap-grad-in-turns": (jax.vmap(jax.grad(in_turns, (0, 1, 2))), (STACKED, STACKED, STACKED)),
    "remat-in-turns": (jax.grad(jax.checkpoint(in_turns, policy=KEEP), (0, 1, 2)), (Q, Q, Q)),
    "shard_map-grad-in-turns": (on_two_devices(jax.grad(in_turns, (0, 1, 2))), (Q, Q, Q)),
    "remat": (jax.grad(jax.checkpoint(loss, policy=KEEP), (0, 1, 2)), (Q, Q, Q)),
    "scan": (scanned, (Q, Q, Q)),
    "grad-arrays": (jax.grad(loss_at, (0, 1, 2)), (Q, Q, Q, OFFSETS[0])),
    "vmap-grad-arrays": (jax.vmap(jax.grad(loss_at, (0, 1, 2)), in_axes=(0, None, None, 0)),
                         (STACKED, Q, Q, OFFSETS[1])),
    "shard_map": (on_two_devices(attend), (Q, Q, Q)),
    "shard_map-grad": (on_two_devices(jax.grad(loss, (0, 1, 2))), (Q, Q, Q)),
}


DIFFERENTIATED = tuple(name for name in CASES if "grad" in name or "remat" in name)


def kernels(name):
    """The names of the Mosaic kernels in a lowered program."""
    function, shapes = CASES[name]
    with device.assume(device.H100):
        text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    return sorted(re.search(r"attention_[a-z_]+[a-z]", line).group() for line in calls)


@pytest.mark.parametrize("name", CASES)
def test_each_kernel_is_lowered_once(name):
    backward = ["attention_backward_kv", "attention_backward_prepare"]
    if not name.endswith("in-turns"):  # blocks of short sequences in turns round dq themselves
        backward = ["attention_backward_finish", *backward]
    assert kernels(name) == (backward if name in DIFFERENTIATED else []) + ["attention_forward"]


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_lowers_with_64_bit_types(d, deterministic, x64):
    """Kernels count in int32 whatever the type of JAX's plain integers is."""
    q = jax.ShapeDtypeStruct((1, 300, 2, d), jnp.bfloat16)
    gradients = jax.grad(functools.partial(loss, deterministic=deterministic), (0, 1, 2))
    with device.assume(device.H100):
        text = jax.jit(gradients).trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
    assert "attention_backward" in text


def test_a_mapped_call_is_for_the_device_it_was_traced_for():
    """vmap maps a jitted program after `where` was left behind, and asked JAX's first device for its SMs: a CPU has
    none.
    """
    spec = AttentionSpec.of(Q, Q, Q, mask=pf.Causal())
    operands = lambda *qkv: Operands(*qkv, None, (), pf.Causal(), (), None, None, None)
    run = lambda *qkv: autodiff.forward(spec, "hopper", operands(*qkv), where=device.H100)
    jax.jit(jax.vmap(run)).trace(STACKED, STACKED, STACKED).lower(lowering_platforms=("cuda",))


def exported(function, *shapes, platforms=("cuda",)):
    """The module of a function as `jax.export` makes it for an H100."""
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]
    with device.assume(device.H100):
        made = jax.export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(*shapes)
    return made.mlir_module()


@pytest.mark.filterwarnings("ignore::pallas_flash.FallbackWarning")
def test_a_symbolic_batch_is_left_to_xla():
    """Regression: a TracerBoolConversionError, from the table of tiles of a batch without a number."""
    (b,) = jax.export.symbolic_shape("b")
    q, lengths = jax.ShapeDtypeStruct((b, 128, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((b,), jnp.int32)
    attend = lambda q, n, **options: pf.flash_attention(q, q, q, kv_lengths=n, **options)
    assert "mosaic" not in exported(attend, q, lengths)
    for name in ("hopper", "ampere"):
        with pytest.raises(pf.UnsupportedError, match="needs a batch size that is a number, batch is b"):
            exported(functools.partial(attend, implementation=name), q, lengths)


def test_one_program_for_several_platforms_says_what_to_do():
    """Regression: a NotImplementedError about mpmd_map, which named neither the cause nor what to do."""
    with pytest.raises(pf.UnsupportedError, match=r'program for cuda and cpu: .* name implementation="xla"'):
        exported(attend, Q, Q, Q, platforms=("cuda", "cpu"))


@pytest.mark.parametrize("size", ["0", "b"])
def test_mapped_axes_that_are_empty_or_symbolic(size):
    """Regression: a ZeroDivisionError, or a TracerBoolConversionError, in a table of tiles for such a batch."""
    (size,) = jax.export.symbolic_shape(size)
    q, offsets = jax.ShapeDtypeStruct((size, *Q.shape), Q.dtype), jax.ShapeDtypeStruct((size,), jnp.int32)
    gradients = jax.vmap(jax.grad(loss_at), in_axes=(0, None, None, 0))
    assert ("attention_backward" in exported(gradients, q, Q, Q, offsets)) == (size != 0)


def test_elements_of_a_symbolic_axis_are_computed_in_turns():
    @batching.vmappable
    def run(spec, where, operands, dout):
        return operands.q[:, 0] * dout + operands.k[:, 0], operands.mask

    q = np.arange(3 * 2 * 3, dtype=np.float32).reshape(3, 2, 3, 1, 1)
    spec = AttentionSpec.of(*[jax.ShapeDtypeStruct((2, 3, 1, 1), jnp.float32)] * 3)

    def call(q, k, factor):
        return run(spec, Operands(q, k, k, None, (), pf.Full(), (), None, None, None), factor)[0]

    (b,) = jax.export.symbolic_shape("b")
    shapes = jax.ShapeDtypeStruct((b, *q.shape[1:]), q.dtype), jax.ShapeDtypeStruct(q.shape[1:], q.dtype)
    factor = np.float32(2).reshape(1, 1, 1)
    symbolic = jax.export.export(jax.jit(jax.vmap(call, in_axes=(0, None, None))))(*shapes, factor)
    np.testing.assert_array_equal(symbolic.call(q, np.ones(q.shape[1:], q.dtype), factor), q[:, :, 0] * 2 + 1)


@pytest.mark.parametrize("shape", [(1, 1, 1, 256), (1, 4, 256, 256)])
def test_the_gradient_of_a_bias_that_devices_share(shape):
    """Regression: a TypeError, from a loop whose sums varied over devices after its first step only."""
    def biased(bias, q):
        out = pf.flash_attention(q, q, q, bias=bias, implementation="hopper")
        return out.astype(jnp.float32).sum()

    call = on_two_devices(jax.grad(biased), (P(), BATCH), P())
    with device.assume(device.H100):
        lowered = jax.jit(call).trace(jax.ShapeDtypeStruct(shape, jnp.float32), Q).lower(lowering_platforms=("cuda",))
    assert "all_reduce" in lowered.as_text()
