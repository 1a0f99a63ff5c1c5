"""The passes as lists of launches: arrays are found by name, and nothing is computed between two launches."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_flash import Causal, UnsupportedError, device, flash_attention
from pallas_flash.kernels.ampere import defaults, launches
from pallas_flash.kernels.ampere.schedule import kernels
from pallas_flash.spec import AttentionSpec

KERNEL, REFERENCES = "custom_vmap_call", {"new_ref", "get"}
"""What `plgpu.kernel` is in a jaxpr, and what makes a buffer that a launch updates, and reads it afterwards."""


@pytest.mark.parametrize("offset", [0, -30], ids=["every-query-attends", "some-queries-are-idle"])
def test_only_the_kernels_that_explain_names_are_launched(offset):
    q = jax.ShapeDtypeStruct((2, 3000, 2, 128), jnp.bfloat16)
    spec = AttentionSpec.of(q, q, q, mask=Causal(offset))
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


def test_exported_programs_are_for_the_generation_that_was_asked_for():
    """Regression: without a GPU, Mosaic lowers for compute capability 9.0, whatever device is assumed. A program that
    was exported for an A100 has an instruction that it lacks, of which only its first call would tell.
    """
    q = jax.ShapeDtypeStruct((1, 100, 1, 64), jnp.bfloat16)
    attend = jax.jit(lambda q: flash_attention(q, q, q, mask=Causal(), implementation="ampere"))
    exported = lambda: jax.export.export(attend, platforms=["cuda"])(q).mlir_module()
    with device.assume(device.A100), pytest.raises(
            UnsupportedError, match=r"lowered for NVIDIA A100\S* here: needs .* lowers as 9.0, the target has 8.0"):
        exported()
    with device.assume(device.B200):
        assert "mosaic_gpu" in exported()
