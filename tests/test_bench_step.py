"""What attention costs a training step and a first `generate`, without a GPU: profiles, processes, memory, tables."""

import contextlib
import json
import os
import re
import shutil
import types
from unittest import mock

import jax
import pytest

torch = pytest.importorskip("torch")

from bench import (  # noqa: E402
    bridge_generate,
    bridge_paths,
    bridge_standin,
    bridge_step,
    module_memory,
    profiles,
    report,
    step_report,
)
from bench.profiles import Event  # noqa: E402
from bench.waiting import Waiting  # noqa: E402
from torch_bridge.direct import driver  # noqa: E402

CUDNN, FLASH, OURS = bridge_step.WAYS
MIB = 2**20


# Profiles ------------------------------------------------------------------------------------------------------------

def _event(name, category, start, duration, **more):
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": 7, "ts": start, "dur": duration, **more}


TRACE = {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "NVIDIA H200"}], "traceEvents": [
    _event("aten::mm", "cpu_op", 90.0, 15.0), _event("cudaLaunchKernel", "cuda_runtime", 95.0, 4.0),
    _event("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "kernel", 100.0, 50.0),
    _event("attention_forward_mosaic_gpu_kernel", "kernel", 150.0, 40.5),
    _event("Optimizer.step#AdamW.step", "gpu_user_annotation", 100.0, 500.0),
    _event("attention_backward_kv_mosaic_gpu_kernel", "kernel", 210.0, 80.0),
    _event("attention_backward_prepare_mosaic_gpu_kernel", "kernel", 200.0, 20.0),
    _event("Memset (Device)", "gpu_memset", 300.0, 1.5), _event("Memcpy DtoD", "gpu_memcpy", 302.0, 2.0),
    {"ph": "s", "id": 1, "pid": 0, "tid": 7, "ts": 100.0, "cat": "ac2g", "name": "ac2g"},
    {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}}]}


def test_of_a_trace_the_work_of_the_device_counts():
    found = profiles.read(TRACE, "cuda")
    assert [event.start_us for event in found] == [100.0, 150.0, 200.0, 210.0, 300.0, 302.0]
    ours = profiles.matching(found, OURS.kernels["cuda"])
    assert [event.name.partition("_mosaic")[0] for event in ours] == [
        "attention_forward", "attention_backward_prepare", "attention_backward_kv"]
    assert profiles.sum_us(ours) == 140.5 and profiles.busy_us(ours) == 130.5, "two kernels overlap for 10 us"
    assert profiles.busy_us(found) == 50 + 130.5 + 1.5 + 2.0
    assert [event.name for event in profiles.read(TRACE, "cpu")] == ["aten::mm"]
    assert profiles.busy_us([]) == profiles.sum_us([]) == 0


def test_busy_time_does_not_count_what_is_within_another():
    nested = [Event("inner", 2.0, 3.0), Event("outer", 0.0, 10.0), Event("last", 9.0, 12.0), Event("later", 20.0, 21.0)]
    assert profiles.busy_us(nested) == 13


def test_what_is_no_trace_is_refused():
    with pytest.raises(ValueError, match=r"must have a list traceEvents, got \['events'\]"):
        profiles.read({"events": []}, "cuda")


def test_a_call_is_profiled():
    x = torch.ones(4, 4)
    names = [event.name for event in profiles.of_call(lambda: x @ x, "cpu")]
    assert "aten::mm" in names


@pytest.mark.parametrize(("way", "kernels"), [
    (CUDNN, ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_kernel0_0",
             "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31_kernel0_0",
             "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128>"]),
    (FLASH, ["void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4>>",
             "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>"]),
    (OURS, ["attention_forward_mosaic_gpu_kernel"])], ids=lambda x: getattr(x, "name", ""))
def test_kernels_are_told_apart_by_their_names(way, kernels):
    others = ["nvjet_sm90_tst_128x256_64x4", "void at::native::vectorized_elementwise_kernel<4, ...>"]
    events = [Event(name, 0.0, 1.0) for name in kernels + others]
    assert [event.name for event in profiles.matching(events, way.kernels["cuda"])] == kernels
    for other in bridge_step.WAYS:
        assert other is way or not profiles.matching(events, other.kernels["cuda"])


# Steps ---------------------------------------------------------------------------------------------------------------

def _work(way, attention, rest=100.0):
    """The events of a step: what is not attention, then kernels of attention of these durations."""
    name = {"torch-cudnn": "cudnn_sdpa", "direct": "forward_mosaic", "fa3": "flash::Fwd"}[way.name]
    events = [Event("gemm", 0.0, rest)] if rest else []
    for duration in attention:
        start = events[-1].end_us if events else 0.0
        events.append(Event(name, start, start + duration))
    return events


def _turns(*ways):
    return [bridge_step._Turn(what, way, lambda: None) for what, way in ways]


STEPS = _turns((bridge_step.STEP, CUDNN), (bridge_step.STEP, OURS), (bridge_step.ALONE, bridge_step.FA3))


def _round(cudnn=(20.0, 60.0), ours=(10.0, 30.0), fa3=(10.0, 40.0)):
    return {(bridge_step.STEP, "torch-cudnn"): _work(CUDNN, cudnn), (bridge_step.STEP, "direct"): _work(OURS, ours),
            (bridge_step.ALONE, "fa3"): _work(bridge_step.FA3, fa3, rest=0.0)}


def test_times_are_compared_within_rounds():
    cudnn, ours, fa3 = bridge_step._times(STEPS, [_round(), _round(ours=(20.0, 40.0)), _round()], "cuda")
    assert (cudnn["step_us"], ours["step_us"], fa3["step_us"]) == (180, 140, 50)
    assert (cudnn["attention_us"], ours["attention_us"], fa3["attention_us"]) == (80, 40, 50)
    assert ours["step_over"]["training step torch-cudnn"]["median"] == pytest.approx(140 / 180)
    assert ours["attention_over"]["attention alone fa3"]["median"] == pytest.approx(40 / 50)
    assert ours["attention_us_range"] == [40, 60] and ours["rounds"] == 3 and ours["attention_kernels"] == 2
    assert ours["names"] == {"forward_mosaic": 40}


def test_a_round_of_which_the_profiler_missed_kernels_is_left_out():
    rounds = [_round(ours=(10.0,)), _round(), _round(cudnn=(1.0,)), _round()]
    found = list(bridge_step._times(STEPS, rounds, "cuda"))
    assert [(r["rounds"], r["rounds_left_out"], r["attention_us"]) for r in found] == [
        (2, 2, 80), (2, 2, 40), (2, 2, 50)]
    found = list(bridge_step._times(STEPS, [_round(ours=(10.0,)), _round(cudnn=(1.0,))], "cuda"))
    assert {r["reason"] for r in found} == {"the profiler missed kernels of attention in each of 2 rounds"}


def test_another_way_that_ran_is_no_time_of_this_one():
    of_ours = (bridge_step.STEP, "direct")
    nothing = [_round() | {of_ours: _work(OURS, [])}]
    _, ours, _ = bridge_step._times(STEPS, nothing, "cuda")
    assert ours["reason"] == "no kernel has 'mosaic' in its name: gemm"
    both = [_round() | {of_ours: [*_work(OURS, [1.0]), *_work(CUDNN, [1.0])]}]
    _, ours, _ = bridge_step._times(STEPS, both, "cuda")
    assert ours["reason"] == "kernels of PyTorch (cuDNN) ran, too"


def test_a_way_whose_gradients_are_wrong_is_not_timed(monkeypatch):
    @contextlib.contextmanager
    def not_causal():
        attend = torch.nn.functional.scaled_dot_product_attention
        other = lambda q, k, v, is_causal: attend(q, k, v)
        with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", other):
            yield
    monkeypatch.setattr(bridge_step, "WAYS", (FLASH, OURS._replace(name="wrong", taken=not_causal)))
    found = list(bridge_step.steps(bridge_step.SIZES["cpu"], "cpu", 1))
    reasons = {r["way"]: r["reason"] for r in found if "reason" in r}
    assert reasons["wrong"].startswith("wrong: a relative error of ") and set(reasons) == {"wrong", "fa3"}
    assert {(r["what"], r["way"]) for r in found if "reason" not in r} == {
        ("training step", "torch-flash"), ("attention alone", "torch-flash")}


def test_a_peer_in_jax_runs_at_the_shapes_of_a_layer_once_it_is_right(monkeypatch):
    setting = bridge_step._Setting(bridge_step.SIZES["cpu"], "cpu")
    assert "FlashAttention-3" in bridge_step.FA3.label and isinstance(bridge_step._fa3(setting), str)
    monkeypatch.setattr(bridge_step, "FA3", bridge_step.FA3._replace(name="jax-nn"))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's gradient mixes dtypes
        layers = bridge_step._fa3(setting)
        assert not isinstance(layers, str), layers
        layers()
        monkeypatch.setattr(bridge_step, "_error_of", lambda *args: 0.5)
        assert bridge_step._fa3(setting).startswith("wrong: a relative error of 5.0e-01")


# Everything, on CPU tensors ------------------------------------------------------------------------------------------

def test_all_of_it_runs_on_a_cpu(monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(bridge_step, "_leave_gpus_alone", lambda: None)  # it would do so for all tests after this
    monkeypatch.setattr(bridge_step.cli, "PEERS_FOLDER", tmp_path)
    monkeypatch.setattr(bridge_generate, "CACHES", ("static",))
    monkeypatch.setattr("sys.argv", ["bridge_step", "--cpu", "--rounds", "1", "--tokens", "3", "--repeats", "1"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(bridge_step.cli.ROOT), os.environ.get("PYTHONPATH", "")]))
    bridge_step.main()
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    measured = {(r["kind"], r["way"], r.get("what")) for r in found if "reason" not in r}
    assert measured == {
        *(("bridge-generate", way, None) for way in bridge_generate.WAYS), ("bridge-memory", "alone", None),
        *(("bridge-step", way, what) for what in (bridge_step.STEP, bridge_step.ALONE)
          for way in ("torch-flash", "direct"))}
    assert {r["way"] for r in found if "reason" in r} == {"torch-cudnn", "fa3"}
    assert all(r["seconds"]["generate"] > 0 and r["error"] > 0 for r in found if r["kind"] == "bridge-generate")


def test_figures_of_a_cpu_are_not_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["bridge_step", "--cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        bridge_step.main()
    assert "the figures of --cpu mean nothing" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bridge_step"])
    with pytest.raises(SystemExit, match=r"measures on a GPU of compute capability 9\.0 .*: torch sees no CUDA GPU"):
        bridge_step.main()


# Processes -----------------------------------------------------------------------------------------------------------

def _process(tmp_path, text, seconds=60.0):
    (tmp_path / "told.py").write_text(f"import json, sys, time\nfrom bench import waiting\n{text}\n")
    path = os.pathsep.join([str(bridge_step.cli.ROOT), str(tmp_path)])
    return Waiting("told", ["7"], {**os.environ, "PYTHONPATH": path}, seconds)


def test_a_process_goes_on_when_it_is_told_to(tmp_path):
    begun = tmp_path / "begun"
    process = _process(tmp_path, "print('hello')\nwaiting.wait_for_word()\n"
                       f"open({str(begun)!r}, 'w').close()\nprint(json.dumps(sys.argv[1:]))")
    assert process.ready() and not begun.exists()
    assert process.go() == ["7"] and begun.exists()


@pytest.mark.parametrize(("text", "reason"), [
    ("raise SystemExit('no model')", "exit code 1: no model"),
    ("waiting.wait_for_word()\nraise SystemExit('no memory')", "exit code 1: no memory"),
    ("waiting.wait_for_word()\nprint('nothing of use')", "exit code 0: ")])
def test_a_process_that_ends_badly_says_why(tmp_path, text, reason):
    assert _process(tmp_path, text).go()["reason"].strip() == f"its process ended with {reason}".strip()


def test_a_process_that_hangs_is_ended(tmp_path):
    assert _process(tmp_path, "waiting.wait_for_word()\ntime.sleep(60)", 2.0).go()["reason"].startswith(
        "its process ended with exit code -9")


def _generated(generate, error=0.01, **more):
    return {"seconds": {"import": 0.25, "generate": generate, "second generate": 0.5}, "imports_jax": False,
            "error": error, "warnings": [], **more}


def test_generating_is_compared_with_sdpa():
    def started(answers):
        of = lambda found: types.SimpleNamespace(ready=lambda: True, go=lambda: found)
        return bridge_generate.Started({("dynamic", way): [*map(of, found)] for way, found in answers.items()}, 20)
    answers = {"sdpa": [_generated(2.0), _generated(4.0)], "no plans": [_generated(8.0)],
               "plans on disk": [_generated(2.0), _generated(3.0)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridge_generate, "CACHES", ("dynamic",))
        sdpa, first, second = bridge_generate.measure(started(answers))
        assert sdpa["seconds"]["in all"] == 3.25 and sdpa["processes"] == 2 and sdpa["over_sdpa"] == 1
        assert first["more_s"] == 5 and second["over_sdpa"] == 2.75 / 3.25 and second["generate_over_sdpa"] == 2.5 / 3
        answers |= {"no plans": [_generated(8.0, error=0.03)],
                    "plans on disk": [_generated(2.0, warnings=["it goes through DLPack"])]}
        _, first, second = bridge_generate.measure(started(answers))
        assert first["reason"] == "wrong: a relative error of 3.0e-02, more than 2 times sdpa's, 1.0e-02"
        assert second["reason"] == "it goes through DLPack"
        answers |= {"sdpa": [{"reason": "no model"}], "no plans": [_generated(8.0)]}
        sdpa, first, _ = bridge_generate.measure(started(answers))
        assert sdpa["reason"] == "no model" and "over_sdpa" not in first


# Memory --------------------------------------------------------------------------------------------------------------

def test_bytes_count_for_the_innermost_step():
    used = [100]

    def take(count):
        used[0] += count
    meter = module_memory.Meter(lambda: used[0])

    def outer():
        take(1)
        meter.of("inner", lambda: take(10))
        meter.of("nothing", lambda: None)
        meter.of("inner again", lambda: take(20))
    meter.of("outer", outer)
    take(300)
    assert meter.steps == [{"step": "inner", "bytes": 10}, {"step": "inner again", "bytes": 20},
                           {"step": "outer", "bytes": 1}]
    assert meter.taken() == 331


@pytest.mark.skipif(not shutil.which("gcc"), reason="the stand-in driver is made with gcc")
def test_what_loads_and_launches_take_is_read_beside_a_driver(monkeypatch):
    """The driver here takes 2 MiB for the third module that is loaded."""
    used, loaded, call = [0], [], driver.call

    def taking(name, *arguments):
        loaded.extend(arguments[1:] if name == "cuModuleLoadData" else ())
        used[0] += 2 * MIB if name == "cuModuleLoadData" and len(loaded) == 3 else 0
        call(name, *arguments)
    monkeypatch.setattr(driver, "call", taking)
    with bridge_standin.stand_ins():
        meter, modules = module_memory.Meter(lambda: used[0]), []
        with module_memory.watched(meter, modules):
            bridge_standin.calls()["forward and autograd.grad"]()
        again = module_memory._again(modules, meter)
    assert len(modules) == 4, "one of the forward, three of the backward"
    assert meter.steps == [{"step": "cuModuleLoadData of module 3, 0 bytes", "bytes": 2 * MIB}]
    assert again == {"loads": 64, "code_bytes": 0, "bytes": 0} and driver.call is taking


# Tables --------------------------------------------------------------------------------------------------------------

ENVIRONMENT = dict(time="2026-01-02T03:04:05+00:00", commit="0123456789abcdef", dirty=False, platform="gpu",
                   device="NVIDIA H200", driver=None, ptxas=None, versions={})


def _records():
    common = {"shape": [4, 16, 4096, 128], "layers": 4, "vocabulary": 4096}
    yield from (record | common for record in bridge_step._times(STEPS, [_round(), _round()], "cuda"))
    yield {"kind": "bridge-step", "what": "training step", "way": "torch-flash", "label": FLASH.label,
           "reason": "no | backend", **common}
    for way, generate in (("sdpa", 2.0), ("no plans", 12.0), ("plans on disk", 1.5)):
        found, torchs = (bridge_generate._joined([_generated(x)]) for x in (generate, 2.0))
        yield {"kind": "bridge-generate", "way": way, "label": bridge_generate.WAYS[way], "cache": "static",
               "tokens": 20, **found, **bridge_generate._beside(found, torchs)}
    yield {"kind": "bridge-memory", "way": "alone", "shape": [1, 8, 128, 128], "bytes": 2 * MIB, "modules": [300_000],
           "steps": [{"step": "cuModuleLoadData of module 1, 300,000 bytes", "bytes": 2 * MIB}], "error": 0.001,
           "again": {"loads": 16, "code_bytes": 6 * MIB, "bytes": 4 * MIB}, "imports_jax": False, "warnings": []}
    yield {"kind": "bridge-memory", "way": "after an empty module", "shape": [1, 8, 128, 128], "reason": "no driver"}


def _found():
    return [{"environment": ENVIRONMENT} | record for record in _records()]


def test_the_tables_of_steps():
    text = report.block("steps", _found())
    rows = re.findall(r"^\| ([^-(].*) \|$", text, re.MULTILINE)
    assert "GPU time of a training step below that with PyTorch's cuDNN | 0.778 of it | yes" in rows
    assert "attention's kernels in it at most 1.0 of FlashAttention-3's, alone | 0.800 of them | yes" in rows
    assert "generate, static cache, plans on disk: no slower than with sdpa | 0.78 of its time | yes" in rows
    assert "generate, static cache, first process ever: at most 8 s more | 10.0 s | no" in rows
    assert "GPU memory beside PyTorch's allocator: 0 MiB | 2.0 MiB | no" in rows
    assert "training step, torch_bridge, direct | 0.14 | 0.778 | 0.04 | 0.800 | 3" in rows
    assert "attention alone, FlashAttention-3 (JAX) | 0.05 | – | 0.05 | 1.000 | 2" in rows
    assert "training step, PyTorch (FlashAttention-2) | no / backend | – | – | – | –" in rows
    assert "static cache, torch_bridge, plans on disk | 1.75 | 0.78 | 1.50 | 0.75 | 0.50 | no" in rows
    assert ("direct, alone | 2.0 | cuModuleLoadData of module 1, 300,000 bytes: 2.0 | 16 loads of 6.0 MiB in all: "
            "4.0 MiB") in rows
    assert "direct, after an empty module | no driver | – | –" in rows
    assert "4 layers, 4 x 4,096 tokens, 16 heads of 128" in text and text.endswith("0123456789; 2026-01-02.")
    assert "A GPT training step" in report.block("benchmarks", _found())
    assert report.block("steps", []) == report.NOTHING


def test_an_aim_that_was_not_measured_is_not_reached():
    assert step_report.bars([])[0][1:] == ["not measured", "–"]
    alone = [r for r in _found() if r.get("way") == "direct"]
    del alone[0]["step_over"]["training step torch-cudnn"]
    assert step_report.bars(alone)[0][1:] == ["what it is compared with was not measured", "–"]
    wrong = {"kind": "bridge-memory", "way": "alone", "reason": "its process ended"}
    assert step_report.bars([wrong])[-1][1:] == ["its process ended", "–"]
    assert bridge_paths.LIMIT < 0.1, "of memory's calls, too"
