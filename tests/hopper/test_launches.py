"""The passes as lists of launches: arrays are found by name, and nothing is computed between two launches."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_flash import device, masks
from pallas_flash.kernels.hopper import defaults, launches
from pallas_flash.kernels.hopper.kernel_names import kernels
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, KvSchedule
from pallas_flash.spec import AttentionSpec

KERNEL, REFERENCES = "custom_vmap_call", {"new_ref", "get"}
"""What `plgpu.kernel` is in a jaxpr, and what makes a buffer that a launch updates, and reads it afterwards."""


CAUSAL, LATER = masks.Causal(), masks.Causal(-30)  # of the second, the first queries attend to nothing


def spec_of(d, mask, dtype="bfloat16", **options):
    q = jax.ShapeDtypeStruct((2, 3000, 2, d), dtype)
    return AttentionSpec.of(q, q, q, mask=mask, **options)


SPECS = {
    "fused": spec_of(128, CAUSAL),
    "ordered": spec_of(64, CAUSAL, deterministic=True),
    "split": spec_of(256, CAUSAL),
    "fused-idle": spec_of(64, LATER, layout="BHLD"),
    "split-idle": spec_of(192, LATER),
    "float32": spec_of(128, LATER, "float32"),
}


def passes(spec):
    return (launches.forward(spec, defaults.default_forward(spec, device.H100)),
            launches.backward(spec, defaults.default_backward(spec, device.H100)))


@pytest.mark.parametrize("name", SPECS)
def test_only_kernels_are_launched(name):
    for found in passes(SPECS[name]):
        jaxpr = jax.make_jaxpr(found)(*found.inputs.values())
        primitives = [equation.primitive.name for equation in jaxpr.eqns]
        assert primitives.count(KERNEL) == len(found.launches)
        assert set(primitives) <= {KERNEL} | REFERENCES
        assert jaxpr.out_avals == [jax.core.ShapedArray(kind.shape, kind.dtype) for kind in found.result_types]


@pytest.mark.parametrize("name", SPECS)
def test_explain_names_the_kernels(name):
    spec = SPECS[name]
    schedules = defaults.default_forward(spec, device.H100), defaults.default_backward(spec, device.H100)
    for found, schedule in zip(passes(spec), schedules):
        text = str(jax.make_jaxpr(found)(*found.inputs.values()))
        assert tuple(re.findall(r"\bname=(attention_\w+)", text)) == kernels(schedule)


@pytest.mark.parametrize("name", SPECS)
def test_every_launch_finds_its_arrays(name):
    for found in passes(SPECS[name]):
        known = {*found.inputs, *found.constants}
        for launch in found.launches:
            assert set(launch.inputs) <= known
            assert set(launch.updates) <= set(launch.inputs) - {*found.inputs, *found.constants}
            known |= set(launch.outputs)
        assert set(found.results) <= known


def test_arrays_of_other_shapes_are_refused():
    forward, _ = passes(SPECS["fused"])
    q, k, v = (jnp.zeros(kind.shape, kind.dtype) for kind in forward.inputs.values())
    with pytest.raises(AssertionError, match="'q'"):
        forward(q[:1], k, v)


def test_an_assumed_schedule_is_that_of_its_pass_alone():
    spec = SPECS["fused"]
    schedule = BackwardSchedule(KvSchedule(dq="shared"))
    others = defaults.default_forward(spec, device.H100), defaults.default_backward(spec, device.H100)
    with defaults.assume(schedule):
        assert defaults.default_backward(spec, device.H100) is schedule
        assert defaults.default_forward(spec, device.H100) == others[0]
    assert defaults.default_backward(spec, device.H100) == others[1] != schedule


@pytest.mark.parametrize("name", SPECS)
def test_schedules_hold_the_devices_sms(name):
    small = device.Device("gpu", "a small one", (9, 0), 78, device.H100.smem_bytes)
    forward, backward = defaults.default_forward(SPECS[name], small), defaults.default_backward(SPECS[name], small)
    assert {forward.num_blocks, *(part.num_sms for part in (backward.kv, backward.dq) if part)} == {78}
