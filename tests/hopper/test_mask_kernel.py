"""The launch that makes what kernels read of a mask's arrays: the numbers are those that XLA makes. In Pallas'
interpreter, and marked gpu on a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # where the interpreter says whether it saw a race

from hopper import test_array_masks as masks_of
from pallas_flash import Causal, InBounds, SegmentIds, Window, device
from pallas_flash.kernels.hopper import calls, defaults, launches, mask_arrays, rules
from pallas_flash.kernels.hopper.kernel_names import kernels
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, DqSchedule, ForwardSchedule, KvSchedule
from pallas_flash.kernels.mosaic import mask_kernel, mask_rules
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.packed import Packed
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.testing import conformance
from pallas_flash.testing.problems import Problem

FORWARD = dataclasses.replace(masks_of.FORWARD, mask_kernel=True)
BACKWARD = dataclasses.replace(masks_of.BACKWARD, mask_kernel=True)


def made_by_xla(spec, schedule, mask, package=mask_arrays):
    return jax.jit(lambda mask: package.make(spec, schedule, mask))(mask)


def check(spec, schedule, mask, package=mask_arrays):
    """Every number that a package's launch makes is XLA's."""
    launch, wanted = package.launch(spec, schedule), made_by_xla(spec, schedule, mask, package)
    found = dict(zip(launch.outputs, jax.jit(launch.kernel)(*jax.tree.leaves(mask)), strict=True))
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(x), name)


@pytest.mark.interpreted
@pytest.mark.parametrize(("name", "schedule"), [
    ("lengths-offsets", FORWARD), ("prefix", BACKWARD), ("documents-causal", BACKWARD), ("ids-in-any-order", FORWARD),
    ("sequences-at-their-ends", FORWARD), ("sequences-at-their-ends", BACKWARD)])
def test_numbers_are_those_that_xla_makes(name, schedule):
    """Also behind the last position, and for tiles behind the last one."""
    spec, mask = masks_of.spec_of(masks_of.MASKS[name]), masks_of.canonical(masks_of.MASKS[name])
    assert mask_rules.kernel_makes(spec)
    with interpreted(detect_races=True):
        check(spec, schedule, mask)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.interpreted
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_the_sequence_of_a_position_is_looked_up(count):
    """Empty sequences, and padding behind the last one; positions behind the end are as the last one."""
    rng, tokens = np.random.default_rng(count), 90
    starts = np.sort(np.append(0, rng.integers(0, 81, count))).astype(np.int32)
    starts[0] = 0
    pos = np.arange(tokens + 20, dtype=np.int32)
    with interpreted():
        side = mask_kernel._Starts(jnp.asarray(starts)[None, None], 0, tokens)
        found = side.sequence_at(jnp.asarray(pos))
        spans = side.span(found)
    wanted = np.searchsorted(starts, np.minimum(pos, tokens - 1), side="right") - 1
    np.testing.assert_array_equal(found, wanted)
    for x, shift in zip(spans, (0, 1)):
        np.testing.assert_array_equal(x, starts[np.minimum(wanted + shift, count)])


@pytest.mark.interpreted
def test_a_pass_makes_its_arrays_itself():
    """Launch after launch: the mask's arrays go in as they came, and the counter is there."""
    mask = SegmentIds(masks_of.ids_in_any_order(24, 4)[:, :24], masks_of.ids_in_any_order(40, 5)[:, :40])
    problem = Problem("mask", "arrays", batch=2, q_heads=2, kv_heads=1, q_len=24, kv_len=40, d=64, d_v=64, mask=mask,
                      dtypes=("bfloat16",))
    operands, cotangent = conformance.random_case(problem, "bfloat16")
    budget, spec = conformance.budget(problem, "bfloat16", operands, cotangent), problem.spec()
    schedule = ForwardSchedule(block_kv=32, warpgroups=2, num_blocks=3, mask_kernel=True)
    assert rules.reasons_against(spec, schedule, 232_448) == []
    assert kernels(schedule) == ("attention_mask", "attention_forward")
    found = launches.forward(spec, schedule)
    assert [*found.inputs] == ["q", "k", "v", "field0", "field1"] and not found.constants
    with interpreted():
        out, stats = found(*map(jnp.asarray, (*operands[:3], *jax.tree.leaves(masks_of.canonical(mask)))))
    used = budget.used(budget.baseline._replace(out=out, lse=stats[:, :, 0]))
    assert max(used.values()) <= 1, used


def test_another_runtime_makes_what_the_first_launch_reads():
    """The arrays of the mask, and not what XLA makes of them where there is no such launch."""
    spec, mask = masks_of.spec_of(masks_of.DOCUMENTS), masks_of.canonical(masks_of.DOCUMENTS)
    given = Operands(*(None,) * 5, mask, (), None, None, None)
    for found in calls.passes(spec, device.H100):
        made, read = found.make(given), {name for name in found.inputs if name.startswith("field")}
        assert made.keys() == read and set(found.launches[0].inputs) == read
        assert all((made[name].shape, made[name].dtype) == (found.inputs[name].shape, found.inputs[name].dtype)
                   for name in read)
    assert "attention_mask" not in kernels(defaults.default_forward(spec, device.H100)), "XLA makes them itself"


@pytest.mark.parametrize("has_bias", [False, True])
def test_one_query_with_ids_asks_once_whether_a_kernel_makes_its_mask(monkeypatch, has_bias):
    """Regression: beside a bias, which no kernel hides keys for, one place took ids and the other none: what is made of
    ids took twice as many operations as what is made of a boolean for each key.
    """
    mask = SegmentIds(np.zeros((1, 1), np.int32), (np.arange(256) // 100)[None].astype(np.int32)).canonical()
    shapes = [jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16) for length in (1, 256, 256)]
    keys = jnp.zeros((1, 1, 1, 256)) if has_bias else None
    spec = AttentionSpec.of(*shapes).masked(mask, keys)
    given, names = Operands(*(None,) * 3, keys, (), mask, (), None, None, None), []
    for asked in (lambda spec: False, defaults.has_mask_kernel):
        monkeypatch.setattr(defaults, "has_mask_kernel", asked)
        found = calls.passes(spec, device.H100)[0]
        made = found.make(given)
        assert made.keys() <= found.inputs.keys()
        assert all(x.shape == found.inputs[name].shape for name, x in made.items())
        names.append({*made})
    of_kernel = {name for name in names[1] if name.startswith("field")}
    assert (names[0] == names[1] and not of_kernel) if has_bias else of_kernel == names[1]
    assert not any("ids" in name for name in names[0]), "of booleans"


@pytest.mark.parametrize("name", ["window-of-each-head", "dense", "dense-documents"])
def test_what_it_does_not_make_is_a_reason(name):
    spec = masks_of.spec_of(masks_of.MASKS[name])
    for schedule in (FORWARD, BACKWARD):
        assert any("mask_kernel" in reason for reason in rules.reasons_against(spec, schedule, 232_448))


def test_xla_makes_the_arrays_itself():
    spec = masks_of.spec_of(masks_of.DOCUMENTS)
    for schedule in (defaults.default_forward(spec, device.H100), defaults.default_backward(spec, device.H100)):
        assert not schedule.mask_kernel


# -- on a GPU ----------------------------------------------------------------------------------------------------------

LENGTH, HEADS = 1100, 2


def documents(*lengths):
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def sequences(count):
    """So many sequences, some of them empty, of both sides, and padding."""
    cuts = [np.append(0, np.sort(np.random.default_rng(i).integers(0, LENGTH - 30, count))) for i in range(2)]
    starts = [x.astype(np.int32) for x in cuts]
    return Packed(Window(200, 0), *starts, *(np.searchsorted(x, np.arange(LENGTH), side="right").astype(np.int32) - 1
                                             for x in starts), "last")


GPU_MASKS = {
    "documents": Causal() & SegmentIds(*[np.stack([documents(500, 1, 99, 500), documents(64, 1036)])] * 2),
    "ids-in-any-order": SegmentIds(*(np.random.default_rng(i).integers(-1, 40, (2, LENGTH)).astype(np.int32) // 13
                                     for i in range(2))) & InBounds(kv_len=np.array([1100, 600])),
    "lengths": Causal(np.array([3, -400])) & InBounds(q_len=np.array([1100, 900]), kv_len=np.array([1000, 0])),
    "sequences": sequences(300),
}
SCHEDULES = {"forward": ForwardSchedule(block_kv=128, warpgroups=3, held_columns=0, mask_kernel=True),
             "two": BackwardSchedule(KvSchedule(), DqSchedule(block_kv=48), mask_kernel=True)}


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", GPU_MASKS)
def test_numbers_are_those_that_xla_makes_on_a_gpu(name, schedule):
    mask, schedule = masks_of.canonical(GPU_MASKS[name]), SCHEDULES[schedule]
    array = jax.ShapeDtypeStruct((1 if name == "sequences" else 2, LENGTH, HEADS, 64), jnp.bfloat16)
    spec = AttentionSpec.of(array, array, array, mask=GPU_MASKS[name])
    check(spec, schedule, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_MASKS)
def test_passes_are_the_same_bit_by_bit_on_a_gpu(name):
    """The forward, three times, so that the counter is seen to be new each time; and the backward of two kernels."""
    batch = 1 if name == "sequences" else 2
    rng = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(rng.standard_normal((batch, LENGTH, HEADS, 64)), jnp.bfloat16) for _ in range(4))
    mask = masks_of.canonical(GPU_MASKS[name])
    spec = AttentionSpec.of(q, k, v, mask=GPU_MASKS[name])

    def run(make, schedule, *arrays):
        found = make(spec, schedule)
        made = dict(zip(mask_kernel.fields(spec), jax.tree.leaves(mask))) if schedule.mask_kernel else (
            made_by_xla(spec, schedule, mask))
        return jax.jit(functools.partial(found))(*arrays, *(made[x] for x in found.inputs if x in made))

    forward = dataclasses.replace(defaults.default_forward(spec, device.H100), mask_kernel=True)
    wanted = run(launches.forward, dataclasses.replace(forward, mask_kernel=False), q, k, v)
    for _ in range(3):
        found = run(launches.forward, forward, q, k, v)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, wanted, strict=True))
    arrays = q, k, v, *wanted, dout, jnp.zeros_like(wanted[1])
    gradients = [run(launches.backward, dataclasses.replace(SCHEDULES["two"], mask_kernel=x), *arrays)
                 for x in (False, True)]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*gradients, strict=True))
