"""The passes as lists of launches: arrays are found by name, and nothing is computed between two launches."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_flash import Causal, device
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
