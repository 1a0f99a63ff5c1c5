"""The launch that makes what the kernels with mma.sync read of a mask's arrays: the numbers are those that XLA makes.
In Pallas' interpreter, and marked gpu on a GPU; masks are those of the Hopper kernels' tests.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import test_array_masks as masks_of
from hopper.test_mask_kernel import GPU_MASKS, HEADS, LENGTH, check, made_by_xla

from pallas_flash import device
from pallas_flash.kernels.ampere import calls, defaults, launches, mask_arrays, rules
from pallas_flash.kernels.ampere.schedule import BackwardSchedule, DqSchedule, ForwardSchedule, kernels
from pallas_flash.kernels.mosaic import mask_kernel, mask_rules
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.spec import AttentionSpec, Operands

FORWARD = ForwardSchedule(block_kv=32, mask_kernel=True)
BACKWARD = BackwardSchedule(block_q=32, dq=DqSchedule(block_kv=32, row_tiles=1), mask_kernel=True)


@pytest.mark.interpreted
@pytest.mark.parametrize(("name", "schedule"), [
    ("lengths-offsets", FORWARD), ("documents-causal", BACKWARD), ("sequences-at-their-ends", FORWARD)])
def test_numbers_are_those_that_xla_makes(name, schedule):
    """Also the ranges of 64 rows beside those of a query tile of 128."""
    spec, mask = masks_of.spec_of(masks_of.MASKS[name]), masks_of.canonical(masks_of.MASKS[name])
    assert mask_rules.kernel_makes(spec) and rules.reasons_against(spec, schedule, 101_376) == []
    assert ("row_tiles" in mask_arrays.types(spec, schedule)) == (schedule is FORWARD)
    with interpreted():
        check(spec, schedule, mask, mask_arrays)


def test_another_runtime_makes_what_the_first_launch_reads(monkeypatch):
    """The arrays of the mask, and not what XLA makes of them where there is no such launch; or where the numbers of all
    tiles do not fit into shared memory.
    """
    spec, mask = masks_of.spec_of(masks_of.DOCUMENTS), masks_of.canonical(masks_of.DOCUMENTS)
    with monkeypatch.context() as without:
        without.setattr(defaults, "with_mask_kernel", lambda spec, schedule, device: schedule)
        before = calls.passes(spec, device.A100)
    assert all("field0" not in found.inputs for found in before), "XLA makes them"
    given = Operands(*(None,) * 5, mask, (), None, None, None)
    for found, other in zip(calls.passes(spec, device.A100), before, strict=True):
        made, read = found.make(given), {name for name in found.inputs if name.startswith("field")}
        assert made.keys() == read and set(found.launches[0].inputs) == read
        assert len(found.launches) == len(other.launches) + 1 and found.results == other.results
        assert other.make(given).keys() == set(found.launches[0].outputs)
    assert kernels(defaults.default_forward(spec, device.A100)) == ("attention_forward",), "XLA makes them itself"
    assert kernels(FORWARD) == ("attention_mask", "attention_forward") and kernels(BACKWARD)[0] == "attention_mask"
    long = dataclasses.replace(spec, q_len=1 << 19, kv_len=1 << 19)
    given, gpus = dataclasses.replace(BACKWARD, mask_kernel=False), (device.L4, device.B200)
    assert [defaults.with_mask_kernel(long, given, gpu).mask_kernel for gpu in gpus] == [False, True]


@pytest.mark.parametrize("name", ["window-of-each-head", "dense", "dense-documents"])
def test_what_it_does_not_make_is_a_reason(name):
    spec = masks_of.spec_of(masks_of.MASKS[name])
    for schedule in (FORWARD, BACKWARD):
        assert any("mask_kernel" in reason for reason in rules.reasons_against(spec, schedule, 101_376))


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", GPU_MASKS)
def test_passes_are_the_same_bit_by_bit_on_a_gpu(name):
    """And so are the numbers; with d 64 both kernels of the backward, so that no sum has another order."""
    rng, batch = np.random.default_rng(0), 1 if name == "sequences" else 2
    q, k, v, dout = (jnp.asarray(rng.standard_normal((batch, LENGTH, HEADS, 64)), jnp.bfloat16) for _ in range(4))
    spec, mask = AttentionSpec.of(q, k, v, mask=GPU_MASKS[name]), masks_of.canonical(GPU_MASKS[name])

    def run(make, schedule, *arrays):
        found = make(spec, schedule)
        made = dict(zip(mask_kernel.fields(spec), jax.tree.leaves(mask))) if schedule.mask_kernel else (
            made_by_xla(spec, schedule, mask, mask_arrays))
        return jax.jit(lambda *given: found(*given))(*arrays, *(made[x] for x in found.inputs if x in made))

    results = (q, k, v)
    for make, schedule in ((launches.forward, FORWARD), (launches.backward, BACKWARD)):
        check(spec, schedule, mask, mask_arrays)
        found, wanted = (run(make, dataclasses.replace(schedule, mask_kernel=x), *results) for x in (True, False))
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, wanted, strict=True))
        results = q, k, v, *wanted[:2], dout, jnp.zeros_like(wanted[1])
