"""The passes as lists of launches: arrays are found by name, and nothing is computed between two launches."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_flash import ALiBi, Causal, InBounds, device, flash_attention
from pallas_flash.kernels.ampere import defaults, launches
from pallas_flash.kernels.ampere.schedule import kernels
from pallas_flash.spec import AttentionSpec

KERNEL, REFERENCES = "custom_vmap_call", {"new_ref", "get"}
"""What `plgpu.kernel` is in a jaxpr, and what makes a buffer that a launch updates, and reads it afterwards."""


@pytest.mark.parametrize("options", [
    {}, dict(mask=Causal(-30)), dict(deterministic=True),
    dict(mask=Causal() & InBounds(kv_len=np.array([3000, 5])).canonical(), dropout_rate=0.1, deterministic=True)],
    ids=["every-query-attends", "some-queries-are-idle", "deterministic", "lengths-dropout"])
@pytest.mark.parametrize("d", [128, 256])
def test_only_the_kernels_that_explain_names_are_launched(options, d):
    q = jax.ShapeDtypeStruct((2, 3000, 2, d), jnp.bfloat16)
    spec = AttentionSpec.of(q, q, q, **dict(mask=Causal()) | options)
    for launch, default in ((launches.forward, defaults.default_forward),
                            (launches.backward, defaults.default_backward)):
        schedule = default(spec, device.A100)
        found = launch(spec, schedule)
        jaxpr = jax.make_jaxpr(found)(*found.inputs.values())
        assert {equation.primitive.name for equation in jaxpr.eqns} <= {KERNEL} | REFERENCES
        assert tuple(re.findall(r"\bname=(attention_\w+)", str(jaxpr))) == kernels(schedule)
        assert jaxpr.out_avals == [jax.core.ShapedArray(kind.shape, kind.dtype) for kind in found.result_types]
        for name in {name for step in found.launches for name in step.inputs}:
            assert name in found.inputs or any(name in step.outputs for step in found.launches), name


def on_two_devices(function):
    """`function` of a batch that two devices share."""
    def call(*arrays):
        if len(jax.devices()) < 2:
            pytest.skip("needs 2 devices")
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))
        return jax.shard_map(function, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"))(*arrays)
    return call


@pytest.mark.parametrize("transform", [lambda f: f, jax.vmap, on_two_devices], ids=["grad", "vmap", "shard_map"])
def test_each_kernel_is_lowered_once(transform, x64):
    """In 64-bit mode, too: kernels count in int32."""
    def loss(q, k, v):
        out, lse = flash_attention(q, k, v, mask=Causal(), return_lse=True, implementation="ampere")
        return out.astype(jnp.float32).sum() + lse.sum()

    q = jax.ShapeDtypeStruct((*[3] * (transform is jax.vmap), 2, 256, 4, 64), jnp.bfloat16)
    with device.assume(device.H200):
        gradients = jax.jit(transform(jax.grad(loss, (0, 1, 2))))
        text = gradients.trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    wanted = ["backward_finish", "backward_kv", "backward_prepare", "forward"]
    assert sorted(re.search(r"attention_([a-z_]+[a-z])", line)[1] for line in calls) == wanted


COMPLETED = {
    "keys": dict(bias=(2, 1, 1, 256), mask=Causal()),
    "pairs-lengths-dropout": dict(bias=(1, 4, 256, 256), mask=InBounds(kv_len=np.array([200, 5])), dropout_rate=0.1),
    "pairs-in-16-bits": dict(bias=(2, 4, 256, 256), dtype=jnp.bfloat16, mask=Causal()),
    "alibi-documents": dict(score=ALiBi(np.ones(4, np.float32)), segment_ids=np.arange(512).reshape(2, 256) // 100),
    "alibi-d256": dict(score=ALiBi(np.ones(4, np.float32)), d=256),
}


@pytest.mark.parametrize("name", COMPLETED)
def test_biases_and_score_functions_reach_the_kernels_and_have_gradients(name):
    """Arrays come in the order in which launches read them: another one would have other shapes."""
    options = COMPLETED[name].copy()
    d, shape, dtype = options.pop("d", 64), options.pop("bias", None), options.pop("dtype", jnp.float32)
    if "dropout_rate" in options:
        options["dropout_rng"] = np.array([1, 2], np.uint32)
    learned = {"bias": jax.ShapeDtypeStruct(shape, dtype)} if shape else {}
    if "score" in options:
        learned["slopes"] = jax.ShapeDtypeStruct((4,), jnp.float32)

    def loss(q, learned):
        given = options | {name: x for name, x in learned.items() if name == "bias"}
        if "slopes" in learned:
            given["score"] = ALiBi(learned["slopes"])
        return flash_attention(q, q, q, implementation="ampere", **given).astype(jnp.float32).sum()

    q = jax.ShapeDtypeStruct((2, 256, 4, d), jnp.bfloat16)
    with device.assume(device.H200):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(q, learned)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert {x: y.shape for x, y in traced.out_info[1].items()} == {x: y.shape for x, y in learned.items()}
    assert {"forward", "backward_kv", "backward_prepare"} <= set(re.findall(r"attention_([a-z_]+[a-z])", text))


EXPORTED = {device.A100: False, device.RTX_4090: False, device.H200: True, device.B200: True, device.RTX_5090: True}
"""Whether Mosaic GPU emits an instruction for a GPU that those before 9.0 lack."""


@pytest.mark.parametrize("gpu", EXPORTED, ids=lambda gpu: gpu.name)
def test_exported_programs_are_for_the_generation_that_was_asked_for(gpu):
    """Regression: without a GPU, Mosaic lowered for compute capability 9.0, whatever device is assumed. A program that
    was exported for an A100 had an instruction that it lacks, of which only its first call would have told.
    """
    attend = jax.jit(lambda q: flash_attention(q, q, q, mask=Causal(), implementation="ampere"))
    with device.assume(gpu):
        text = jax.export.export(attend, platforms=["cuda"])(jax.ShapeDtypeStruct((1, 100, 1, 64), jnp.bfloat16))
    assert "mosaic_gpu" in text.mlir_module()
    assert ("fence.mbarrier_init" in text.mlir_module()) == EXPORTED[gpu]


@pytest.mark.parametrize("transform", [lambda f: f, jax.vmap, on_two_devices], ids=["grad", "vmap", "shard_map"])
def test_each_assumed_device_has_kernels_of_its_own(transform):
    """Also in one process, where JAX keeps what it traced; and inside of `shard_map`, which has a mesh of its own."""
    loss = lambda q: flash_attention(q, q, q, mask=Causal(), implementation="ampere").astype(jnp.float32).sum()
    gradient = jax.jit(transform(jax.grad(loss)))
    q = jax.ShapeDtypeStruct((*[3] * (transform is jax.vmap), 2, 100, 1, 64), jnp.bfloat16)
    for gpu in (device.A100, device.H200, device.A100):
        with device.assume(gpu):
            traced = gradient.trace(q)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert ("fence.mbarrier_init" in text) == EXPORTED[gpu]
