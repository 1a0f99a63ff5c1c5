"""XLA:GPU programs over 4 and 8 H200s, compiled without a GPU: what travels, what it travels behind, and memory."""

import json
import subprocess
from pathlib import Path

import pytest

from pallas_flash import device
from pallas_flash.context_parallel import model
from tests.context_parallel.offline import hlo, sizes
from tests.hopper.offline import places

ROOT = Path(__file__).parents[2]
WHY_NOT = places.why_not()
needs_cuda_wheels = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def compiled(work, *programs):
    """The report on each program, all from one process; kernels are not disassembled, which takes a third of the
    time."""
    ptxas = next(iter(places.compilers().values()))
    environment = {name: value for name, value in places.environment(work, ptxas).items()
                   if not name.startswith("MOSAIC_GPU_DUMP")}
    done = subprocess.run([places.interpreter(), "-m", "tests.context_parallel.offline.compile_programs", *programs],
                          cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def estimated(strategy, n):
    return model.estimate(strategy, sizes.problem(n), model.rates(device.H100))


@needs_cuda_wheels
def test_hops_of_a_ring_hide_behind_kernels(tmp_path):
    """Regression: hops that depend on nothing, unrolled, are all scheduled first, synchronously."""
    few, many = compiled(tmp_path, "ring:4:causal", "ring:8:causal")
    for n, report in ((4, few), (8, many)):
        assert report["traffic"].keys() == {"collective-permute"}
        permutes, wanted = report["traffic"]["collective-permute"], estimated("ring", n)
        assert permutes["synchronous"] == 0
        assert permutes["asynchronous"] == permutes["around_kernels"] == 2 * n - 1  # the last brings the sums home
        assert permutes["sent"] == wanted.bytes_forward + wanted.bytes_backward
        assert report["kernels"] % n == 0
        assert report["temporary"] <= 1.5 * wanted.transient_bytes
    assert many["temporary"] <= 0.6 * few["temporary"]


def written_once(n):
    """Bytes that a ring whose kernels merge writes beside them whatever n is, but for statistics, and those of its sums
    of a step."""
    p = sizes.problem(n)
    keys, sums = p.itemsize * p.kv, p.acc_itemsize * p.kv
    forward = keys + p.itemsize * p.q_out  # packed, rounded
    backward = keys + (keys + sums) + sums + keys  # packed, with the first sums, the last sums alone, rounded
    return forward + backward, sums


@needs_cuda_wheels
def test_kernels_that_merge_leave_nothing_beside_them(tmp_path):
    """No synchronous hop, memory like 1/n, and two kernels less for each step of a backward, which neither zeroes nor
    rounds dq. Between two kernels nothing is written but the sums that travel, in place. With more devices than are
    unrolled, too, as "rounds" are."""
    found = compiled(tmp_path, "merged:4:causal", "merged:8:causal", "rounds:8:causal")
    for n, report in zip((4, 8, 8), found, strict=True):
        permutes, wanted = report["traffic"]["collective-permute"], estimated("ring", n)
        assert permutes["synchronous"] == 0
        assert permutes["asynchronous"] == permutes["around_kernels"] == 2 * n
        assert permutes["sent"] == wanted.bytes_forward + wanted.bytes_backward
        assert report["kernels"] == 2 * n + 2
        assert report["temporary"] <= wanted.transient_bytes
        once, of_step = written_once(n)
        assert once < report["written"] - (n - 1) * of_step <= 1.02 * once
    assert all(many["temporary"] <= 0.51 * found[0]["temporary"] for many in found[1:])


@needs_cuda_wheels
def test_other_strategies_send_what_the_model_says(tmp_path):
    """Regression: XLA kept what an all-gather's forward had gathered until the backward. The all-to-all has fewer key
    heads than devices."""
    kinds = {"all_gather": {"all-gather", "reduce-scatter"}, "all_to_all": {"all-to-all"}}
    programs = [("all_gather", 4), ("all_gather", 8), ("all_to_all", 2), ("all_to_all", 4), ("all_to_all", 8)]
    masks = {"all_gather": "full", "all_to_all": "causal"}
    found = dict(zip(programs, compiled(tmp_path, *(f"{name}:{n}:{masks[name]}" for name, n in programs)), strict=True))
    for (strategy, n), report in found.items():
        wanted = estimated(strategy, n)
        assert report["traffic"].keys() == kinds[strategy]
        sent = sum(traffic["sent"] for traffic in report["traffic"].values())
        assert sent == wanted.bytes_forward + wanted.bytes_backward
        assert report["temporary"] <= 1.5 * wanted.transient_bytes
    # Like 1/n while each device has key heads of its own; an all-gather holds the whole sequence.
    assert found["all_to_all", 4]["temporary"] <= 0.6 * found["all_to_all", 2]["temporary"]


PROGRAM = """\
HloModule made_by_hand, is_scheduled=true

%kernel (p.1: bf16[8,4]) -> (bf16[8,4], f32[8]) {
  %p.1 = bf16[8,4]{1,0} parameter(0)
  ROOT %call.1 = (bf16[8,4]{1,0}, f32[8]{0:S(5)}) custom-call(%p.1), custom_call_target="mosaic_gpu_v2"
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%update (p.7: f32[16,4]) -> (f32[1], f32[16,4]) {
  %p.7 = f32[16,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %one = f32[1]{0} constant({1})
  %rows = f32[2,4]{1,0} dynamic-slice(%p.7, %zero, %zero), dynamic_slice_sizes={2,4}
  %in_place = f32[16,4]{1,0} dynamic-update-slice(%p.7, %rows, %zero, %zero)
  ROOT %both = (f32[1]{0}, f32[16,4]{1,0}) tuple(%one, %in_place)
}

%wrapped (p.2: f32[16,4]) -> f32[2,4] {
  %p.2 = f32[16,4]{1,0} parameter(0)
  ROOT %scatter.1 = f32[2,4]{1,0} reduce-scatter(%p.2), dimensions={0}, to_apply=%add
}

%more (p.3: (bf16[8,4])) -> pred[] {
  %p.3 = (bf16[8,4]{1,0}) parameter(0)
  ROOT %yes.1 = pred[] constant(true)
}

%body (p.4: (bf16[8,4])) -> (bf16[8,4]) {
  %p.4 = (bf16[8,4]{1,0}) parameter(0)
  %keys.1 = bf16[8,4]{1,0} get-tuple-element(%p.4), index=0
  %start.1 = ((bf16[8,4]{1,0}), bf16[8,4]{1,0}) collective-permute-start(%keys.1), source_target_pairs={{0,1},{1,0}}
  %fusion.1 = (bf16[8,4]{1,0}, f32[8]{0}) fusion(%keys.1), kind=kCustom, calls=%kernel
  %done.1 = bf16[8,4]{1,0} collective-permute-done(%start.1)
  %copy.1 = bf16[8,4]{1,0} copy(%done.1)
  %updated.1 = (f32[1], f32[16,4]{1,0}) fusion(%copy.1), kind=kLoop, calls=%update
  ROOT %tuple.1 = (bf16[8,4]{1,0}) tuple(%copy.1)
}

ENTRY %main (p.5: (bf16[8,4]), p.6: f32[16,4]) -> f32[2,4] {
  %p.5 = (bf16[8,4]{1,0}) parameter(0)
  %p.6 = f32[16,4]{1,0} parameter(1)
  %loop = (bf16[8,4]{1,0}) while(%p.5), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %keys.2 = bf16[8,4]{1,0} get-tuple-element(%loop), index=0
  %permute.1 = bf16[8,4]{1,0} collective-permute(%keys.2), source_target_pairs={{0,1},{1,0}}
  %start.2 = ((bf16[8,4]{1,0}), bf16[8,4]{1,0}) collective-permute-start(%keys.2), backend_config={"is_sync":true}
  %done.2 = bf16[8,4]{1,0} collective-permute-done(%start.2)
  %start.3 = ((f32[16,4]{1,0}), f32[2,4]{1,0}) async-start(%p.6), calls=%wrapped
  %gather.1 = bf16[64,4]{1,0} all-gather(%done.2), dimensions={0}
  ROOT %done.3 = f32[2,4]{1,0} async-done(%start.3)
}
"""


def test_programs_are_read():
    program = hlo.Program(PROGRAM, 8)
    assert program.traffic() == {
        "collective-permute": hlo.Traffic(synchronous=2, asynchronous=3, around_kernels=3, sent=5 * 64),
        "reduce-scatter": hlo.Traffic(synchronous=0, asynchronous=1, around_kernels=0, sent=7 * 32),
        "all-gather": hlo.Traffic(synchronous=1, asynchronous=0, around_kernels=0, sent=7 * 64)}
    assert program.kernels() == 3
    assert program.written() == 3 * (64 + 4 + 32)  # in the loop: a copy, and two updates in place
