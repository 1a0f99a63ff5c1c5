"""The Hopper implementation under JAX's transformations, lowered for an H100 on any machine: one kernel call each."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_flash as pf
from pallas_flash import device

Q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
STACKED = jax.ShapeDtypeStruct((3, *Q.shape), Q.dtype)


def attend(q, k, v):
    return pf.flash_attention(q, k, v, mask=pf.Causal(), implementation="hopper")


def loss(q, k, v):
    return attend(q, k, v).astype(jnp.float32).sum()


def on_two_devices(function):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))


def scanned(q, k, v):
    return jax.lax.scan(lambda x, _: (attend(x, k, v), None), q, None, length=3)[0]


KEEP = jax.checkpoint_policies.save_only_these_names(*pf.RESIDUAL_NAMES)
CASES = {
    "jit": (attend, (Q, Q, Q)),
    "vmap": (jax.vmap(attend), (STACKED, STACKED, STACKED)),
    "vmap-shared-keys": (jax.vmap(attend, in_axes=(0, None, None)), (STACKED, Q, Q)),
    "vmap-grad": (jax.vmap(jax.grad(loss, (0, 1, 2)), in_axes=(0, None, None)), (STACKED, Q, Q)),
    "grad": (jax.grad(loss, (0, 1, 2)), (Q, Q, Q)),
    "remat": (jax.grad(jax.checkpoint(loss, policy=KEEP), (0, 1, 2)), (Q, Q, Q)),
    "scan": (scanned, (Q, Q, Q)),
    "shard_map": (on_two_devices(attend), (Q, Q, Q)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_forward_kernel_is_lowered(name):
    function, shapes = CASES[name]
    with device.assume(device.H100):
        text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line and "attention_forward" in line]
    assert len(calls) == 1
