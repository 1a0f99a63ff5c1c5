"""The Hopper backward kernels themselves on a CPU: Pallas' GPU interpreter runs them, with its race detector, on small
shapes; and their schedules.

See `test_forward` for what the interpreter lacks.
"""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import with_rest
from jax._src import source_info_util
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # where the interpreter says whether it saw a race

from pallas_flash import autodiff, device, masks, softmax
from pallas_flash.kernels.hopper import defaults, launches, rules, work
from pallas_flash.kernels.hopper.backward import prepare
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, DqSchedule, KvSchedule, SplitSchedule, WideSchedule
from pallas_flash.kernels.mosaic import dropout, interpret, scores
from pallas_flash.spec import AttentionSpec, Gradients, Results
from pallas_flash.testing import conformance
from pallas_flash.testing.problems import Problem

pytestmark = pytest.mark.interpreted
CAUSAL = masks.Causal()
FUSED = BackwardSchedule(KvSchedule(dq="shared"))
ORDERED = BackwardSchedule(KvSchedule(dq="shared", dq_slots=2, ordered=True))
FIRST = BackwardSchedule(KvSchedule(dq="shared", dq_slots=2, first_writes=True))
SLOTS = BackwardSchedule(KvSchedule(dq="shared", dq_slots=2))
OWN = BackwardSchedule(KvSchedule(num_stages=4, dq="own", pipelined=True))
OWN_FIRST = BackwardSchedule(KvSchedule(num_stages=4, dq="own", pipelined=True, dq_slots=3, first_writes=True))
OWN_ORDERED = BackwardSchedule(KvSchedule(num_stages=4, dq="own", pipelined=True, dq_slots=3, ordered=True))
TWO = BackwardSchedule(KvSchedule(), DqSchedule(block_kv=32))
PIPELINED = BackwardSchedule(KvSchedule(num_stages=4, pipelined=True),
                             DqSchedule(block_kv=64, k_stages=4, pipelined=True))
SPLIT = BackwardSchedule(SplitSchedule(), DqSchedule(v_stages=1))
PAIRS = BackwardSchedule(WideSchedule("dk"), WideSchedule("dq"), WideSchedule("dv", num_stages=2, slots=3))
WIDE = BackwardSchedule(*(dataclasses.replace(kernel, cluster=1) for kernel in (PAIRS.kv, PAIRS.dq, PAIRS.dv)))
SMALL = dict(batch=1, q_heads=1, kv_heads=1)

CASES: dict[str, tuple[BackwardSchedule, dict]] = {
    "fused": (FUSED, dict(q_len=200, kv_len=200, d=128, d_v=128)),
    "fused-paired-gqa": (dataclasses.replace(SLOTS, kv=dataclasses.replace(SLOTS.kv, paired=True)),
                         dict(q_len=200, kv_len=200, d=128, d_v=128, q_heads=2)),
    "fused-slots-gqa": (SLOTS, dict(q_len=130, kv_len=130, d=128, d_v=128, q_heads=2)),
    # Of queries 0 to 63 none attends to a key: nobody writes their sums.
    "first-writes-idle": (FIRST, dict(q_len=300, kv_len=200, d=128, d_v=128, mask=masks.Causal(-70))),
    "first-writes-own-gqa": (OWN_FIRST, dict(q_len=300, kv_len=300, d=64, d_v=64, q_heads=2, mask=masks.Window(90, 5))),
    "first-writes-paired-gqa": (dataclasses.replace(FIRST, kv=dataclasses.replace(FIRST.kv, paired=True)),
                                dict(q_len=200, kv_len=200, d=128, d_v=128, q_heads=2)),
    "first-writes-paired-full-float16": (
        dataclasses.replace(FIRST, kv=dataclasses.replace(FIRST.kv, paired=True)),
        dict(q_len=70, kv_len=300, d=128, d_v=128, mask=masks.Full(), dtypes=("float16",))),
    "ordered": (ORDERED, dict(q_len=500, kv_len=500, d=128, d_v=128, deterministic=True)),
    "ordered-half": (dataclasses.replace(ORDERED, kv=dataclasses.replace(ORDERED.kv, longest_last=4)),
                     dict(q_len=600, kv_len=600, d=128, d_v=128, deterministic=True)),
    "ordered-own-gqa": (OWN_ORDERED, dict(q_len=300, kv_len=300, d=64, d_v=64, q_heads=2, deterministic=True)),
    "ordered-sections": (dataclasses.replace(OWN_ORDERED, kv=dataclasses.replace(OWN_ORDERED.kv, section_bytes=1)),
                         dict(q_len=300, kv_len=300, d=64, d_v=64, q_heads=2, kv_heads=2, deterministic=True)),
    "rounded": (dataclasses.replace(ORDERED, kv=dataclasses.replace(ORDERED.kv, rounds_dq=True)),
                dict(q_len=500, kv_len=500, d=128, d_v=128, deterministic=True)),
    "rounded-window-bhld": (dataclasses.replace(ORDERED, kv=dataclasses.replace(ORDERED.kv, rounds_dq=True)),
                            dict(q_len=400, kv_len=400, d=128, d_v=72, layout="BHLD", mask=masks.Window(150, 0),
                                 deterministic=True, dropout_rate=0.2)),
    "rounded-own-gqa": (dataclasses.replace(OWN_ORDERED, kv=dataclasses.replace(OWN_ORDERED.kv, rounds_dq=True)),
                        dict(q_len=300, kv_len=300, d=64, d_v=64, q_heads=2, deterministic=True)),
    "rounded-own-full-float16": (
        dataclasses.replace(OWN_ORDERED, kv=dataclasses.replace(OWN_ORDERED.kv, rounds_dq=True)),
        dict(q_len=70, kv_len=300, d=64, d_v=64, mask=masks.Full(), deterministic=True, dtypes=("float16",))),
    "ordered-own-full": (OWN_ORDERED, dict(q_len=70, kv_len=300, d=64, d_v=64, mask=masks.Full(), deterministic=True)),
    "fused-own": (OWN, dict(q_len=200, kv_len=200, d=64, d_v=64)),
    "fused-own-held": (dataclasses.replace(OWN, kv=dataclasses.replace(OWN.kv, held="kv")),
                       dict(q_len=130, kv_len=130, d=64, d_v=64)),
    "fused-own-window-bhld": (OWN, dict(q_len=300, kv_len=300, d=64, d_v=64, layout="BHLD", mask=masks.Window(40, 5))),
    "fused-own-ragged-dropout-gqa": (OWN, dict(q_len=70, kv_len=170, d=64, d_v=40, mask=masks.Full(), q_heads=2,
                                               dropout_rate=0.3)),
    "two": (TWO, dict(q_len=150, kv_len=100, d=64, d_v=64, q_heads=2, mask=masks.Causal(-20))),
    "two-pipelined-float16": (PIPELINED, dict(q_len=100, kv_len=130, d=40, d_v=72, mask=masks.Causal(30),
                                        dtypes=("float16",))),
    "two-softcap": (TWO, dict(q_len=100, kv_len=100, d=64, d_v=64, softcap=3.0)),
    "two-tiny-scale": (TWO, dict(q_len=100, kv_len=100, d=64, d_v=64, scale=1e-40)),  # lse / scale is no float32
    "two-negative-scale": (TWO, dict(q_len=100, kv_len=100, d=64, d_v=64, scale=-0.2)),
    "split": (SPLIT, dict(q_len=130, kv_len=130, d=256, d_v=256)),
    "split-d192-d128-dropout-gqa": (SPLIT, dict(q_len=70, kv_len=130, d=192, d_v=128, q_heads=2, mask=masks.Causal(60),
                                                dropout_rate=0.3)),
    "wide": (WIDE, dict(q_len=70, kv_len=70, d=264, d_v=136)),
    "wide-d512": (WIDE, dict(q_len=100, kv_len=100, d=512, d_v=512)),
    "wide-d320-window-bhld": (WIDE, dict(q_len=150, kv_len=150, d=320, d_v=320, layout="BHLD",
                                         mask=masks.Window(40, 5))),
    "wide-d384-d64-softcap-float16": (WIDE, dict(q_len=70, kv_len=70, d=384, d_v=64, softcap=2.0,
                                                 dtypes=("float16",))),
    "wide-d48-d328-dropout-gqa": (WIDE, dict(q_len=70, kv_len=130, d=48, d_v=328, q_heads=2, mask=masks.Full(),
                                             dropout_rate=0.3)),
    "split-softcap-float16": (SPLIT, dict(q_len=70, kv_len=70, d=72, d_v=136, softcap=2.0, dtypes=("float16",))),
}


class Races(gpu_callbacks.GPURaceDetectionState):
    """The interpreter's race detector, which lets blocks add to dq in global memory and count that they have: on a GPU
    those are atomic operations.
    """

    def check_read(self, thread, clock, buffer_key, rnge, source_info=None):
        if not is_atomic(buffer_key, source_info):
            super().check_read(thread, clock, buffer_key, rnge, source_info)

    def check_write(self, thread, clock, buffer_key, rnge, source_info=None):
        if not is_atomic(buffer_key, source_info):
            super().check_write(thread, clock, buffer_key, rnge, source_info)


ATOMIC = ("add_to_global", "await_additions", "count_addition", "additions_seen", "claimed", "count_written",
          "load_piece")


def is_atomic(buffer_key, source_info):
    in_global_memory = buffer_key.memory_space_id == 0
    place = "" if source_info is None else source_info_util.summarize(source_info)
    return in_global_memory and any(name in place for name in ATOMIC)


def interpreted(schedule, spec, operands, saved):
    """The gradients, from q, k and v, what the forward saved and the cotangents, and dropout's keys."""
    arrays = operands.q, operands.k, operands.v, *saved, *dropout.inputs(spec, operands)
    return interpreted_gradients(schedule, spec, arrays)


def interpreted_gradients(schedule, spec, arrays):
    """The gradients; raises if the interpreter, which starts a detector for each kernel, has seen a race in one."""
    detectors = []

    def detector(**keywords):
        detectors.append(Races(**keywords))
        return detectors[-1]

    with (unittest.mock.patch.object(gpu_callbacks, "GPURaceDetectionState", detector),
          interpret.interpreted(detect_races=True)):
        passed = launches.backward(spec, schedule)
        dq, dk, dv = passed(*arrays)
        found = Gradients(dq=dq, dk=dk, dv=dv, dbias=None, dscore=())
        jax.block_until_ready(found)
    least = 2 if isinstance(schedule.kv, KvSchedule) and schedule.kv.rounds_dq else 3
    assert len(detectors) == len(passed.launches) >= least, "a kernel for the statistics, and one to three more"
    assert not any(seen.races_found for seen in detectors)
    return found


@functools.cache
def truth(problem):
    """Operands, cotangents, the error budget, and what the forward would have saved."""
    dtype = problem.dtypes[0]
    operands, (dout, dlse) = conformance.random_case(problem, dtype)
    budget = conformance.budget(problem, dtype, operands, (dout, dlse))
    saved = jnp.asarray(budget.oracle.out, dtype), statistics(problem.spec(), budget.oracle.lse)
    return operands, (dout, dlse), budget, saved


def statistics(spec, lse):
    """What the forward would have kept of rows whose lse is known in float64."""
    unit = softmax.unit(spec.scale, spec.softcap)
    rounded = jnp.asarray(lse, jnp.float32)
    start = np.asarray(softmax.reference_point(rounded, unit), np.float64)
    rest = np.where(np.isfinite(lse), lse / unit - np.where(np.isfinite(start), start, 0), 0)
    return jnp.stack([rounded, jnp.asarray(rest, jnp.float32)], axis=2)


def cotangents(dout, dlse):
    """Of out and the statistics."""
    return jnp.asarray(dout), jnp.asarray(with_rest(dlse, np.nan))


def problem_of(name):
    schedule, fields = CASES[name]
    return schedule, Problem(name, "interpreted", **(SMALL | dict(mask=CAUSAL, dtypes=("bfloat16",)) | fields))


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_oracle(name):
    agree(*problem_of(name))


def agree(schedule, problem):
    operands, (dout, dlse), budget, saved = truth(problem)
    spec = problem.spec()
    assert rules.reasons_against(spec, schedule, 232_448) == []
    operands = jax.tree.map(jnp.asarray, operands)
    found = interpreted(schedule, spec, operands, (*saved, *cotangents(dout, dlse)))
    used = budget.used(budget.baseline._replace(dq=found.dq, dk=found.dk, dv=found.dv))
    assert max(used.values()) <= 1, used


OF_PARTS = {
    "fused": (OWN, dict(q_len=40, kv_len=70, d=40, d_v=64, mask=masks.Causal(30))),
    "split-columns-bhld": (SPLIT, dict(q_len=20, kv_len=20, d=192, d_v=128, layout="BHLD")),
}
"""Heads of (B, L, 3, H, D), or columns of (B, H, L, 3 D)."""


@pytest.mark.parametrize("name", OF_PARTS)
def test_gradients_that_are_parts_of_arrays_are_those_of_dense_ones(name):
    """Bit by bit; and what else is in the arrays is not written."""
    schedule, fields = OF_PARTS[name]
    problem = Problem(name, "interpreted", **(SMALL | dict(mask=CAUSAL, dtypes=("bfloat16",)) | fields))
    operands, given, _, saved = truth(problem)
    arrays = *map(jnp.asarray, operands[:3]), *saved, *cotangents(*given)
    assert_parts_are_written(lambda: launches.backward(problem.spec(), schedule), arrays, 3 if "columns" in name else 2)


def assert_parts_are_written(make, arrays, axis):
    """By a backward that writes arrays of three times the size along an axis; its buffers hold NaN when it starts.

    Args:
      make: makes the pass, in which interpreted kernels are others.
    """
    with interpret.interpreted():
        dense = make()
        types = {name: kind.update(shape=(*kind.shape[:axis], 3 * kind.shape[axis], *kind.shape[axis + 1:]))
                 for name, kind in zip(dense.results, dense.result_types, strict=True)}
        expected, found = dense(*arrays), dense.writing(types)(*arrays)
    for name, part, whole in zip(dense.results, expected, found, strict=True):
        assert whole.shape == types[name].shape
        own, others = np.split(np.asarray(whole, np.float32), [part.shape[axis]], axis)
        np.testing.assert_array_equal(own, np.asarray(part, np.float32))
        assert np.isfinite(own).all() and np.isnan(others).all(), name


def test_a_cluster_of_two_blocks_agrees_with_the_oracle():
    """In a process with more virtual devices: the interpreter runs all threads of a cluster at once, and waits for
    itself where there are eight. What loads by multicast on a GPU is loaded by each block here.
    """
    code = ("import jax; jax.config.update('jax_disable_most_optimizations', True); "
            "from hopper import test_backward as t; t.agree(t.PAIRS, t.problem_of('wide')[1])")
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=32",
                       PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


PARTIAL = {
    "fused-gqa": (FUSED, dict(q_len=50, kv_len=70, d=128, d_v=128, q_heads=2)),
    "ordered-own-bhld": (OWN_ORDERED, dict(q_len=70, kv_len=130, d=64, d_v=40, mask=masks.Full(), layout="BHLD",
                                           deterministic=True)),
    "first-writes": (FIRST, dict(q_len=150, kv_len=140, d=128, d_v=128, mask=masks.Causal(-70))),
    "split": (SPLIT, dict(q_len=70, kv_len=50, d=136, d_v=128, mask=masks.Causal(-20))),
    "wide": (WIDE, dict(q_len=70, kv_len=50, d=264, d_v=72, mask=masks.Causal(-20))),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_results_are_not_rounded(name):
    schedule, fields = PARTIAL[name]
    problem = Problem(name, "interpreted", **(SMALL | dict(mask=CAUSAL, dtypes=("bfloat16",)) | fields))
    operands, (dout, dlse), budget, saved = truth(problem)
    spec = dataclasses.replace(problem.spec(), partial=True)
    assert rules.reasons_against(spec, schedule, 232_448) == []
    operands = jax.tree.map(jnp.asarray, operands)
    kept, given = autodiff.without_out(spec, Results(*saved), Results(*cotangents(dout, dlse)))
    found = interpreted(schedule, spec, operands, (kept.stats, *given))
    used = budget.used(budget.baseline._replace(dq=found.dq, dk=found.dk, dv=found.dv))
    assert max(used.values()) <= 1, used
    error = lambda name, x: np.linalg.norm(np.asarray(x, np.float64) - getattr(budget.oracle, name))
    for name in ("dq", "dk", "dv"):
        x = getattr(found, name)
        assert x.dtype == jnp.float32
        assert error(name, x) < error(name, x.astype(jnp.bfloat16)), name


TURNS = {
    "causal": dict(),
    "causal-one-section": dict(batch=1, kv_heads=1),
    "half-ascending": dict(longest_last=4),
    "all-ascending": dict(longest_last=8),
    "all-descending": dict(longest_last=0),
    "many-sections-gqa": dict(batch=4, q_heads=4, kv_heads=2, section_bytes=1),
    "ragged-causal-later": dict(q_len=777, kv_len=1100, mask=masks.Causal(323)),
    "window": dict(mask=masks.Window(300, 0), section_bytes=1),
    "longest-first": dict(mask=masks.Window(left=0), longest_last=4),
    "window-both-sides": dict(q_len=900, kv_len=1300, mask=masks.Window(200, 500)),
    "full": dict(mask=masks.Full()),
    "prefix": dict(mask=masks.PrefixLM(400)),
}


@pytest.mark.parametrize("name", TURNS)
def test_turns_of_a_query_tile_are_the_order_in_which_blocks_start(name):
    """Then a block waits only for blocks that have started, and every addition has one place."""
    options = dict(batch=3, q_heads=2, kv_heads=2, q_len=1500, kv_len=1500, mask=CAUSAL) | TURNS[name]
    fields = {name: options.pop(name) for name in ("section_bytes", "longest_last") if name in options}
    spec = Problem("turns", "order", d=64, d_v=64, dtypes=("bfloat16",), **options).spec()
    schedule = KvSchedule(dq="own", ordered=True, **{"section_bytes": 4 << 20} | fields)
    assert work.has_order(spec, schedule)
    blocks, mask = work.kv_work(spec, schedule), work.worst_case(spec, schedule)
    heads, kv_tiles = (np.asarray(x) for x in blocks.head_and_tile(np.arange(blocks.blocks)))
    assert len({*zip(heads.tolist(), kv_tiles.tolist())}) == blocks.blocks == blocks.heads * blocks.tiles
    start, _, _, stop = (np.broadcast_to(x, kv_tiles.shape) for x in work.q_range(mask, spec, schedule, kv_tiles))
    for q_tile in range(-(-spec.q_len // schedule.block_q)):
        for head in range(blocks.heads):
            comes = (heads == head) & (start <= q_tile) & (q_tile < stop)
            turns = np.asarray(work.additions_before(mask, spec, schedule, q_tile, kv_tiles[comes]))
            np.testing.assert_array_equal(turns, np.arange(comes.sum()))
            assert int(np.asarray(work.last_key_tile(mask, spec, schedule, q_tile))) == kv_tiles[comes][-1]
    assert work.completes_in_runs(spec, schedule)


def test_the_order_of_additions_does_not_depend_on_the_place_in_a_batch():
    """A later batch entry, in another section of heads, has the same blocks in the same order."""
    spec = Problem("places", "order", batch=6, q_heads=2, kv_heads=2, q_len=1500, kv_len=1500, d=64, d_v=64,
                   mask=CAUSAL, dtypes=("bfloat16",)).spec()
    for section_bytes in (1, 1 << 20, 32 << 20):
        blocks = work.kv_work(spec, KvSchedule(dq="own", ordered=True, section_bytes=section_bytes))
        heads, kv_tiles = (np.asarray(x) for x in blocks.head_and_tile(np.arange(blocks.blocks)))
        orders = {tuple(kv_tiles[heads == head].tolist()) for head in range(blocks.heads)}
        assert len(orders) == 1, (section_bytes, orders)


def test_a_mask_that_leaves_queries_without_keys_has_no_order():
    problem = Problem("idle", "order", q_len=1500, kv_len=1500, d=64, d_v=64, mask=masks.Causal(-500),
                      dtypes=("bfloat16",), **SMALL)
    assert not work.has_order(problem.spec(), KvSchedule(dq="own", ordered=True))


@pytest.mark.parametrize("d", range(8, 257, 8))
@pytest.mark.parametrize("deterministic", [False, True])
def test_default_is_legal(d, deterministic):
    for d_v, length in itertools.product((8, 64, 72, 128, 192, 256), (100, 2000)):
        problem = Problem("any", "sizes", q_len=length, kv_len=length, d=d, d_v=d_v, mask=CAUSAL,
                          deterministic=deterministic, dtypes=("bfloat16",), **SMALL)
        spec = problem.spec()
        assert rules.reasons_against(spec, defaults.default_backward(spec, device.H100), 232_448) == []


@pytest.mark.parametrize("dims", [(264, 8), (8, 264), (320, 320), (384, 384), (512, 512), (512, 64), (128, 512)],
                         ids=str)
@pytest.mark.parametrize("options", [{}, dict(deterministic=True, softcap=2.0), dict(dtypes=("float16",), q_len=99)],
                         ids=["plain", "deterministic", "float16"])
def test_default_of_wide_heads_is_legal(dims, options):
    problem = Problem("wide", "sizes", **(SMALL | dict(q_len=2000, kv_len=2000, d=dims[0], d_v=dims[1], mask=CAUSAL,
                                                       dtypes=("bfloat16",)) | options))
    schedule = defaults.default_backward(problem.spec(), device.H100)
    assert isinstance(schedule.kv, WideSchedule)
    assert rules.reasons_against(problem.spec(), schedule, device.H100.smem_bytes) == []


def test_kernels_of_wide_heads_come_together():
    spec = Problem("wide", "sizes", q_len=99, kv_len=99, d=512, d_v=512, mask=CAUSAL, dtypes=("bfloat16",),
                   **SMALL).spec()
    for schedule in (BackwardSchedule(WIDE.kv, WIDE.dq), BackwardSchedule(SplitSchedule(), WIDE.dq),
                     BackwardSchedule(WIDE.dv, WIDE.dq, WIDE.kv)):
        assert any("need kernels of dk, dv and dq" in reason for reason in rules.reasons_against(
            spec, schedule, 232_448)), schedule
    for wrong, said in ((dict(slots=1), "slots at least 2"), (dict(cluster=4), "cluster must be 1 or 2")):
        schedule = dataclasses.replace(WIDE, dq=WideSchedule("dq", **wrong))
        assert any(said in reason for reason in rules.reasons_against(spec, schedule, 232_448))
    uneven = dataclasses.replace(WIDE, dv=WideSchedule("dv", cluster=2))
    assert any("the same cluster" in reason for reason in rules.reasons_against(spec, uneven, 232_448))
    no_arrays = dataclasses.replace(WIDE, mask_kernel=True)
    assert any("mask_kernel" in reason for reason in rules.reasons_against(spec, no_arrays, 232_448))
    large = dataclasses.replace(WIDE, kv=WideSchedule("dk", num_stages=2))
    assert any("bytes of" in reason for reason in rules.reasons_against(spec, large, 232_448))


def test_only_the_longest_blocks_come_last():
    """Of a mask whose first key tiles have the shortest blocks, none does."""
    schedule = KvSchedule(dq="own", ordered=True, longest_last=4)
    spec = lambda mask: Problem("lengths", "order", q_len=1024, kv_len=1024, d=64, d_v=64, mask=mask,
                                dtypes=("bfloat16",), **SMALL).spec()
    assert [work.kv_work(spec(mask), schedule).ascending for mask in (CAUSAL, masks.Window(left=0))] == [4, 0]


def test_who_rounds_dq_and_who_is_paired():
    def kv(q_len, d=128, batch=None, **options):
        x, y = (jax.ShapeDtypeStruct((batch or 16384 // q_len, length, 2048 // d, d), jnp.bfloat16)
                for length in (q_len, options.pop("kv_len", q_len)))
        spec = AttentionSpec.of(x, y, y, mask=CAUSAL, **options)
        found = defaults.default_backward(spec, device.H100)
        assert not rules.reasons_against(spec, found, device.H100.smem_bytes)
        return found.kv

    lengths = 512, 500, 1024, 4096
    assert [kv(n, d).rounds_dq for d in (64, 128) for n in lengths] == [True, True, False, False] * 2
    assert not kv(4096, kv_len=512, deterministic=True).rounds_dq, "one block would round 64 query tiles"
    assert kv(512, batch=1, deterministic=True).rounds_dq and not kv(512, batch=1).ordered
    assert kv(16384).paired and kv(512, batch=1).paired
    assert not any(kv(16384, **more).paired for more in (dict(softcap=20.0), dict(deterministic=True), dict(d=64)))


WRONG = {
    "rounds-in-any-order": (KvSchedule(dq="own", rounds_dq=True), {}, "s.rounds_dq=True needs s.ordered=False to be"),
    "rounds-terms": (KvSchedule(dq="own", ordered=True, rounds_dq=True), dict(partial=True), "spec.partial=True"),
    "paired-own": (KvSchedule(dq="own", paired=True), {}, "s.paired=True needs s.dq='own' to be shared"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_rounding_and_pairs_need(name):
    schedule, options, expected = WRONG[name]
    x = jax.ShapeDtypeStruct((1, 300, 1, 64), jnp.bfloat16)
    (reason,) = rules.reasons_against(AttentionSpec.of(x, x, x, mask=CAUSAL, **options), BackwardSchedule(schedule),
                                      232_448)
    assert expected in reason


DEADLOCKS = {  # a slot that is freed one step later, and only one of them
    "late-dq": (128, BackwardSchedule(KvSchedule(dq="shared", ds_slots=1))),
    "own-pipelined": (64, BackwardSchedule(KvSchedule(dq="own", pipelined=True, num_stages=1))),
    "dq-pipelined": (64, BackwardSchedule(KvSchedule(), DqSchedule(pipelined=True, k_stages=1))),
}


@pytest.mark.parametrize("name", DEADLOCKS)
def test_schedules_that_would_wait_for_themselves_are_illegal(name):
    d, schedule = DEADLOCKS[name]
    spec = Problem(name, "deadlocks", q_len=300, kv_len=300, d=d, d_v=d, mask=CAUSAL, dtypes=("bfloat16",),
                   **SMALL).spec()
    (reason,) = rules.reasons_against(spec, schedule, 232_448)
    assert "=1 to be 2" in reason


@pytest.mark.parametrize("array", ["k", "v"])
@pytest.mark.parametrize("schedule", [FUSED, TWO, SPLIT, WIDE], ids=["fused", "two", "split", "wide"])
def test_keys_that_only_padding_attends_to_are_not_looked_at(schedule, array):
    """NaN and Inf in keys, or values, that the mask gives to queries past the end alone."""
    d = {FUSED: 128, TWO: 64, SPLIT: 256, WIDE: 264}[schedule]
    problem = Problem("padding", "interpreted", q_len=90, kv_len=100, d=d, d_v=d, mask=CAUSAL, dtypes=("bfloat16",),
                      **SMALL)
    operands, (dout, dlse), budget, saved = truth(problem)
    bad = np.array(getattr(operands, array))
    bad[:, 92:95], bad[:, 95:97] = np.nan, np.inf
    operands = jax.tree.map(jnp.asarray, operands._replace(**{array: bad}))
    found = interpreted(schedule, problem.spec(), operands, (*saved, *cotangents(dout, dlse)))
    used = budget.used(budget.baseline._replace(dq=found.dq, dk=found.dk, dv=found.dv))
    assert max(used.values()) <= 1, used


@pytest.mark.parametrize("array", ["k", "v"])
@pytest.mark.parametrize("name", ["fused", "fused-own", "two", "split", "wide"])
def test_a_bad_key_reaches_only_what_attends_to_it(name, array):
    """0 * NaN is NaN, also in the product of dS with the keys."""
    schedule, problem = problem_of(name)
    bad = 70
    problem = dataclasses.replace(problem, mask=CAUSAL, q_len=100, kv_len=100)
    operands, (dout, dlse), budget, saved = truth(problem)
    sees_bad = np.arange(problem.q_len) >= bad
    out, stats = saved
    out = jnp.where(sees_bad[:, None, None], jnp.asarray(jnp.nan, out.dtype), out)
    saved = out, jnp.where(sees_bad, jnp.nan, stats) if array == "k" else stats
    x = np.array(getattr(operands, array))
    x[:, bad] = np.nan
    operands = jax.tree.map(jnp.asarray, operands._replace(**{array: x}))
    found = interpreted(schedule, problem.spec(), operands, (*saved, *cotangents(dout, dlse)))
    dq, expected = (np.asarray(x, np.float64)[:, :bad] for x in (found.dq, budget.oracle.dq))
    np.testing.assert_allclose(dq, expected, rtol=0.02, atol=0.02 * np.abs(expected).max())
    assert np.isnan(np.asarray(found.dq, np.float32)[:, bad:]).all()
    assert np.isnan(np.asarray(found.dk, np.float32)[:, bad]).all()


@pytest.mark.parametrize("options", [{}, dict(softcap=3.0), dict(scale=-0.2)], ids=["plain", "softcap", "negative"])
@pytest.mark.parametrize("name", ["fused-own", "two", "split", "wide"])
def test_a_bad_key_leaves_keys_of_other_queries_alone(name, options):
    """-inf - NaN is NaN: scores are hidden after lse has been subtracted from them."""
    schedule, problem = problem_of(name)
    bad, left, right, size = 50, 10, 5, 110
    fields = dict(softcap=None, scale=None) | options
    problem = dataclasses.replace(problem, mask=masks.Window(left, right), q_len=size, kv_len=size, **fields)
    operands, (dout, dlse), budget, saved = truth(problem)
    pos = np.arange(size)
    sees_bad = (pos - left <= bad) & (bad <= pos + right)
    out, stats = saved
    saved = jnp.where(sees_bad[:, None, None], jnp.asarray(jnp.nan, out.dtype), out), stats
    v = np.array(operands.v)
    v[:, bad] = np.nan
    operands = jax.tree.map(jnp.asarray, operands._replace(v=v))
    found = interpreted(schedule, problem.spec(), operands, (*saved, *cotangents(dout, dlse)))
    keep = np.broadcast_to(problem.mask.keep(pos[:, None], pos[None]), (size, size))
    spared = ~(keep & sees_bad[:, None]).any(axis=0)
    assert 50 < spared.sum() < size
    for name, rows in (("dq", ~sees_bad), ("dk", spared), ("dv", spared)):
        x, expected = (np.asarray(getattr(y, name), np.float64)[:, rows] for y in (found, budget.oracle))
        np.testing.assert_allclose(x, expected, rtol=0.02, atol=0.02 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("name", ["fused", "fused-own-window-bhld", "two", "split", "split-d192-d128-dropout-gqa",
                                  "wide"])
def test_idle_queries_are_not_looked_at(name):
    """NaN in queries that attend to nothing, and in their dout."""
    schedule, problem = problem_of(name)
    problem = dataclasses.replace(problem, mask=masks.Causal(-30), q_len=100, kv_len=100)
    operands, (dout, dlse), budget, saved = truth(problem)
    idle = np.expand_dims(np.arange(100) < 30, (1, 2) if problem.layout == "BLHD" else 1)
    q, dout = (np.where(idle, np.asarray(np.nan, x.dtype), x) for x in (operands.q, dout))
    operands = jax.tree.map(jnp.asarray, operands._replace(q=q))
    found = interpreted(schedule, problem.spec(), operands, (*saved, *cotangents(dout, dlse)))
    used = budget.used(budget.baseline._replace(dq=found.dq, dk=found.dk, dv=found.dv))
    assert max(used.values()) <= 1, used


def test_tiles_with_idle_queries_alone_are_copied():
    """Of 140 queries the first 70 attend to nothing; the last tile of 64 has rows past the end. With tiles of 128
    queries the first two of 64 are one."""
    for block_q, expected in ((64, [1, 1, 0]), (128, [1, 1, 0, 0])):
        schedule = BackwardSchedule(KvSchedule(block_q=block_q), DqSchedule(warpgroups=1))
        problem = Problem("copies", "idle", mask=masks.Causal(-70), dtypes=("bfloat16",), **SMALL | dict(
            q_len=140, kv_len=140))
        operands, (dout, dlse), _, (out, stats) = truth(problem)
        spec = problem.spec()
        launch = prepare.launch(spec, schedule)
        given = dict(out=out, stats=stats, dout=dout, dstats=cotangents(dout, dlse)[1], q=operands.q)
        with interpret.interpreted():
            made = launch.kernel(*(jnp.asarray(given[name]) for name in launch.inputs))
        found = dict(zip(launch.outputs, jax.block_until_ready(made), strict=True))
        np.testing.assert_array_equal(found["copied"], np.broadcast_to(expected, found["copied"].shape))
        q, copy = (np.float32(x).transpose(0, 2, 1, 3) if spec.layout == "BLHD" else np.float32(x)
                   for x in (operands.q, found["clean_q"]))
        assert not copy[:, :, :70].any()
        np.testing.assert_array_equal(copy[:, :, 70:128], q[:, :, 70:128])


@pytest.mark.parametrize("name", ["fused", "fused-own", "fused-own-held", "split", "wide"])
def test_hidden_values_may_be_any_number(name):
    """Regression: dP of a value of 3e38 is beyond float32, and dS was 0 * inf where the mask hides it."""
    schedule, problem = problem_of(name)
    problem = dataclasses.replace(problem, mask=masks.Causal(-30), q_len=100, kv_len=100)
    operands, (dout, dlse), budget, saved = truth(problem)
    v = np.array(operands.v)
    v[:, 70:] = 3e38
    operands = jax.tree.map(jnp.asarray, operands._replace(v=v))
    found = interpreted(schedule, problem.spec(), operands, (*saved, *cotangents(dout, dlse)))
    used = budget.used(budget.baseline._replace(dq=found.dq, dk=found.dk, dv=found.dv))
    assert max(used.values()) <= 1, used


def test_small_weights_of_float16_have_slopes():
    """Regression: where a weight rounded to 0, dS was 0 in tiles that the mask splits, and dk of a far key wrong."""
    length, far = 64, 5
    spec = AttentionSpec.of(*[jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float16)] * 3, mask=CAUSAL, scale=1.0)
    rng = np.random.default_rng(0)
    q, k = np.zeros((2, 1, length, 1, 64), np.float16)
    q[..., 0], k[:, far, :, 0] = 1, -14.5
    v, dout = (size * rng.standard_normal(q.shape).astype(np.float16) for size in (1, 1024))
    s = np.where(np.tri(length, dtype=bool), q[0, :, 0].astype(float) @ k[0, :, 0].astype(float).T, -np.inf)
    lse = np.log(np.exp(s).sum(axis=1))
    p, dp = np.exp(s - lse[:, None]), dout[0, :, 0].astype(float) @ v[0, :, 0].astype(float).T
    out = (p @ v[0, :, 0]).astype(np.float16)[None, :, None]
    delta = (out * dout.astype(float)).sum(axis=-1)[0, :, 0]
    wanted = (p * (dp - delta[:, None]))[:, far].sum()
    saved = out, statistics(spec, lse[None, None]), dout, np.zeros((1, 1, 2, length), np.float32)
    found = interpreted_gradients(TWO, spec, tuple(map(jnp.asarray, (q, k, v, *saved))))
    np.testing.assert_allclose(found.dk[0, far, 0, 0], wanted, rtol=0.05)


@pytest.mark.parametrize("name", ["two-softcap", "split-softcap-float16", "wide-d384-d64-softcap-float16"])
def test_a_bad_key_that_nothing_attends_to_has_no_slope(name):
    """0 * NaN is NaN: the slope of a soft cap of NaN, where the weight is 0."""
    schedule, problem = problem_of(name)
    problem, bad = dataclasses.replace(problem, mask=masks.Causal(-30), q_len=64, kv_len=64), 40
    operands, (dout, dlse), budget, saved = truth(problem)
    k = np.array(operands.k)
    k[:, bad] = np.nan
    operands = jax.tree.map(jnp.asarray, operands._replace(k=k))
    found = interpreted(schedule, problem.spec(), operands, (*saved, *cotangents(dout, dlse)))
    assert (np.asarray(found.dk, np.float32)[:, bad] == 0).all()
    used = budget.used(budget.baseline._replace(dq=found.dq, dk=found.dk, dv=found.dv))
    assert max(used.values()) <= 1, used


@pytest.mark.parametrize("name", ["fused", "fused-own", "two", "split", "wide"])
def test_large_queries_have_exact_exponents(name):
    """Beside others of their tile that are not large, and of the next tile, where none is."""
    schedule, problem = problem_of(name)
    problem = dataclasses.replace(problem, mask=CAUSAL, q_len=100, kv_len=100, q_heads=1, kv_heads=1)
    operands, cotangent = conformance.random_case(problem, "bfloat16")
    shift = np.where(np.arange(100) % 3 == 0, 4000.0, 0.0) * (np.arange(100) < 64)  # of lse, natural
    q, k = np.array(operands.q), np.array(operands.k)
    q[..., 0], k[..., 0] = (shift / problem.spec().scale)[:, None], 1
    operands = operands._replace(q=q, k=k)
    budget = conformance.budget(problem, "bfloat16", operands, cotangent)
    assert (np.abs(budget.oracle.lse) * softmax.LOG2E > scores.largest(problem.spec())).any()
    saved = jnp.asarray(budget.oracle.out, jnp.bfloat16), statistics(problem.spec(), budget.oracle.lse)
    operands = jax.tree.map(jnp.asarray, operands)
    found = interpreted(schedule, problem.spec(), operands, (*saved, *cotangents(*cotangent)))
    for name in ("dq", "dk", "dv"):
        x, expected = (np.asarray(getattr(y, name), np.float64) for y in (found, budget.oracle))
        expected = np.where(np.arange(x.shape[-1]) > 0, expected, x) if name == "dq" else expected
        np.testing.assert_allclose(x, expected, rtol=0.02, atol=0.02 * np.abs(expected).max(), err_msg=name)


GROUPED = [(8, 2048, 16, 4), (8, 2048, 8, 2), (2, 2048, 32, 8), (1, 2048, 16, 16), (4, 1024, 32, 8), (16, 1024, 8, 2)]


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize(("length", "mebibytes"), [(512, 16), (1024, 16), (2048, 32), (4096, 32), (16384, 64)])
@pytest.mark.parametrize("d", (64, 128))
def test_short_sequences_take_turns_unasked(d, length, mebibytes, deterministic):
    array = jax.ShapeDtypeStruct((16384 // length, length, 2048 // d, d), jnp.bfloat16)
    spec = AttentionSpec.of(array, array, array, mask=masks.Causal(), deterministic=deterministic)
    schedule = defaults.default_backward(spec, device.H100).kv
    assert schedule.ordered == (deterministic or length <= 2048)
    assert schedule.section_bytes == (mebibytes if schedule.ordered else 32) << 20
    assert work.kv_work(spec, schedule).ascending == length // schedule.block_kv // (
        1 if not schedule.ordered else 4 if length <= 4096 else 2)


def array_mask_spec(batch, length, q_heads, kv_heads=None):
    """A causal call with ids of documents, d 128."""
    array = lambda heads: jax.ShapeDtypeStruct((batch, length, heads, 128), jnp.bfloat16)
    ids = np.zeros((batch, length), np.int32)
    k = array(q_heads if kv_heads is None else kv_heads)
    return AttentionSpec.of(array(q_heads), k, k, mask=CAUSAL & masks.SegmentIds(ids, ids))


@pytest.mark.parametrize(("size", "mebibytes", "section"), [
    ((4, 4096, 16), 64, 16), ((1, 16384, 16), 256, 16), ((1, 65536, 16), 256, 4), ((8, 512, 16), 32, 64),
    ((4, 4096, 32, 8), 64, 4)], ids=str)
def test_run_time_masks_have_sections_of_many_heads(size, mebibytes, section):
    """16 query heads, so that documents of all end together; more of short sequences, fewer beyond 256 MiB."""
    spec = array_mask_spec(*size)
    schedule = defaults.default_backward(spec, device.H200).kv
    assert schedule.section_bytes == mebibytes << 20
    assert work.kv_work(spec, schedule).section == section
    plain = dataclasses.replace(spec, mask=CAUSAL, deterministic=False)
    assert defaults.default_backward(plain, device.H200).kv.section_bytes <= 32 << 20


def test_only_run_time_masks_let_the_first_block_write():
    """Plain calls keep their zeros; gradients that repeat need another order, and get two kernels."""
    spec = array_mask_spec(4, 4096, 16)
    assert defaults.default_backward(spec, device.H200).kv.first_writes
    assert not defaults.default_backward(dataclasses.replace(spec, mask=CAUSAL), device.H200).kv.first_writes
    assert not defaults.default_backward(dataclasses.replace(spec, deterministic=True), device.H200).fused
    assert not defaults.default_parts(spec, device.H200).first_writes  # several launches add to the same sums


def test_the_first_block_does_not_write_beside_biases_score_functions_and_dropout():
    """It is slower beside a bias of pairs, and was not timed beside others; with dropout it would spill."""
    bias = lambda *shape: dict(bias=jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    of_pairs, of_keys, score = bias(1, 16, 4096, 4096), bias(4, 1, 1, 4096), dict(score=lambda s, *_: s + 1)
    array, ids = jax.ShapeDtypeStruct((4, 4096, 16, 64), jnp.bfloat16), np.zeros((4, 4096), np.int32)
    every = of_pairs, of_keys, score, dict(dropout_rate=0.1)
    for options, mask in itertools.product(every, (CAUSAL, CAUSAL & masks.SegmentIds(ids, ids))):
        spec = AttentionSpec.of(array, array, array, mask=mask, **options)
        schedule = defaults.default_backward(spec, device.H200)
        assert schedule.fused and not schedule.kv.first_writes, (options, mask)


@pytest.mark.parametrize("size", [(4, 4096, 16), (3, 300, 8, 2), (1, 16384, 16)], ids=str)
def test_rows_come_once_and_backwards(size):
    """In the last section first, where the kernel of key tiles ends; all heads of some rows before others."""
    spec = array_mask_spec(*size)
    batch, length, heads, *_ = size
    schedule, count = defaults.default_backward(spec, device.H200).kv, -(-length // 64)
    found = work.rows_backwards(spec, schedule, jnp.arange(batch * heads * count), count)
    entry, head, rows = map(np.asarray, found)
    np.testing.assert_array_equal(np.sort((entry * heads + head) * count + rows), np.arange(batch * heads * count))
    section = work.kv_work(spec, schedule).section * spec.group
    assert (rows[:section] == count - 1).all() and (rows[-section:] == 0).all()
    order = (entry * heads + head) // section
    np.testing.assert_array_equal(order, np.sort(order)[::-1])


@pytest.mark.parametrize("d", (64, 128))
@pytest.mark.parametrize("size", GROUPED, ids=str)
def test_few_blocks_leave_no_sm_idle(size, d):
    """Unasked, no turns where their order costs more than they save; the longest blocks of all sections start early."""
    batch, length, q_heads, kv_heads = size
    array = lambda heads: jax.ShapeDtypeStruct((batch, length, heads, d), jnp.bfloat16)
    spec = AttentionSpec.of(array(q_heads), array(kv_heads), array(kv_heads), mask=masks.Causal())
    schedule = defaults.default_backward(spec, device.H100).kv
    assert not schedule.ordered
    tiles = length // schedule.block_kv
    steps = sum(range(1, tiles + 1)) * schedule.block_kv // schedule.block_q * batch * q_heads
    assert work.makespan(spec, schedule) <= 1.15 * steps / 132
    assert defaults.default_backward(dataclasses.replace(spec, deterministic=True), device.H100).kv.ordered
