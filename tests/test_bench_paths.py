"""What a call from PyTorch costs by each way, without a GPU: turns, checks, first calls, records and tables."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from bench import bridge_hosts, bridge_kinds, bridge_paths, bridge_standin, first_call, report  # noqa: E402
from bench.bridge_paths import PATHS, Path  # noqa: E402
from torch_bridge.direct import attention, shortcut  # noqa: E402

WRONG = Path("wrong", "Wrong", lambda q, k, v, is_causal: q + k + v)
FAILS = Path("fails", "Fails", lambda q, k, v, is_causal: q / {}["no plan"])


def test_the_host_of_each_way_is_timed_once_its_results_are_right(monkeypatch):
    monkeypatch.setattr(bridge_paths, "SMALL", (1, 2, 16, 8))
    monkeypatch.setattr(bridge_paths, "PATHS", (PATHS[0], WRONG, FAILS))
    found = list(bridge_paths._hosts("cpu", bridge_paths.PATHS, rounds=2, repeats=2))
    assert {r["path"]: r["reason"].split(":")[0] for r in found if "reason" in r} == {"wrong": "wrong",
                                                                                    "fails": "KeyError"}
    timed = [r for r in found if "reason" not in r]
    assert [r["what"] for r in timed] == ["forward", "forward with gradient", ".backward()", "forward and .backward()",
                                          "forward and autograd.grad"]
    assert all(r["path"] == "torch" and r["host_us"] > 0 and r["over_torch"]["median"] == 1 for r in timed)


def test_kinds_of_calls_are_timed_once_both_ways_agree(monkeypatch):
    monkeypatch.setattr(bridge_kinds, "LENGTH", 16)
    wrong = bridge_kinds.Kind("wrong", lambda x, device: sum(x) * (1 + int(os.environ[bridge_paths.VARIABLE])))
    fails = bridge_kinds.Kind("fails", lambda x, device: x["no plan"])
    kinds = *(kind for kind in bridge_kinds.KINDS if kind.name in ("dropout, causal", "ids, one query")), wrong, fails
    kinds = tuple(kind._replace(q_len=min(kind.q_len, 16)) for kind in kinds)
    found = [*bridge_kinds.measure("cpu", 2, 1, kinds)]
    assert {r["case"]: r["reason"][:8] for r in found if "reason" in r} == {"wrong": "the ways", "fails": "direct: "}
    timed = [(r["case"], r["what"], r["path"]) for r in found if "reason" not in r and r["host_us"] > 0]
    assert timed == [(case, what, path) for case in ("ids, one query", "dropout, causal")
                     for what in bridge_kinds.CALLS for path in ("direct", "dlpack")]
    assert attention.MOST_ALONE < attention.MOST_WITH_GRADIENTS < 1000, "as before"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of PyTorch 2.11 itself
def test_the_parts_of_a_step_and_compiled_calls_are_timed(monkeypatch):
    monkeypatch.setattr(bridge_paths, "SMALL", (1, 2, 16, 8))
    monkeypatch.setattr(bridge_paths, "PATHS", (PATHS[0], WRONG, PATHS[0]._replace(name="direct")))
    found = list(bridge_hosts.measure("cpu", 2, 1, backend="eager"))
    timed = [r["what"] for r in found if r["path"] == "direct" and r["host_us"] > 0 and r["over_torch"]]
    assert timed[-8:] == [*(f"in a step, {part}" for part in bridge_hosts.PARTS),
                          "forward and .backward(), in one thread", "compiled, forward",
                          "compiled, forward with gradient", "compiled, forward and .backward()"]
    assert len(found) == 2 * len(timed)


@pytest.mark.skipif(not shutil.which("gcc"), reason="the stand-in driver is made with gcc")
def test_calls_before_a_driver_that_does_nothing_take_shortcuts():
    with bridge_standin.stand_ins():
        calls = bridge_standin.calls()
        torch_bridge.report(reset=True)
        for call in calls.values():
            for _ in range(3):
                assert bridge_standin.microseconds(call, 1) > 0
        counts = [(row.what, row.calls) for row in torch_bridge.report() if "launched directly" in row.problem]
        assert sorted(counts) == [("backward", 6), ("forward", 12)] and shortcut._recent


def test_a_way_is_taken_only_while_it_is_measured(monkeypatch):
    for before in ("1", None):
        monkeypatch.delenv(bridge_paths.VARIABLE, raising=False)
        if before:
            monkeypatch.setenv(bridge_paths.VARIABLE, before)
        for path in PATHS:
            with path.taken():
                assert os.environ[bridge_paths.VARIABLE] == ("1" if path.name == "direct" else "0")
        assert os.environ.get(bridge_paths.VARIABLE) == before


def test_turns_are_interleaved_and_the_first_round_is_not_counted():
    log = []

    def turn(path):
        log.append(path.name)
        return float(len(log))
    times = bridge_paths._interleaved(turn, list(PATHS[:2]), 2, lambda: log.append("wait"))
    assert [name for name in log if name != "wait"] == ["torch-cudnn", "torch", "torch", "torch-cudnn", "torch-cudnn",
                                                        "torch"]
    assert log[::2] == ["wait"] * 7 and {name: len(x) for name, x in times.items()} == {"torch": 2, "torch-cudnn": 2}


@pytest.mark.parametrize("fills", [True, False])
def test_a_replay_must_give_what_the_call_gives(fills, monkeypatch):
    """On the CPU what is captured runs at once, so the stand-in of a graph fills its results again, or does not."""
    made = []

    class Stream:
        def wait_stream(self, stream):
            pass

        def synchronize(self):
            pass

    class Graph:
        def replay(self):
            if fills:
                made[-1].fill_(3.0)
    for name, value in (("Stream", Stream), ("CUDAGraph", Graph), ("current_stream", Stream),
                        ("stream", contextlib.nullcontext), ("synchronize", lambda: None),
                        ("graph", lambda graph, stream: contextlib.nullcontext())):
        monkeypatch.setattr(torch.cuda, name, value)

    def call():
        made.append(torch.full((4,), 3.0))
        return made[-1:]
    if fills:
        assert bridge_paths._captured(call).results[0] is made[3]
    else:
        with pytest.raises(ValueError, match=r"a replay differs from the call by 1\.0e\+00"):
            bridge_paths._captured(call)


def test_the_first_call_of_a_process_on_a_cpu():
    found = first_call.measure("torch", (1, 2, 16, 8), "cpu")
    assert set(found["milliseconds"]) == {"import", "first forward", "first backward", "second forward",
                                          "second backward"}
    assert found["error"] < bridge_paths.LIMIT and found["warnings"] == [] and found["beside_torch_mib"] is None


def test_a_process_of_its_own_imports_no_jax_before_the_bridge_does():
    """Whether the bridge imports JAX could not be seen otherwise."""
    code = "import sys, bench.first_call, torch_bridge; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_process_that_took_another_way_or_failed_is_no_measurement(monkeypatch):
    fine = {"milliseconds": {}, "beside_torch_mib": 0.0, "imports_jax": False, "error": 3e-3, "warnings": []}

    def ends_with(found):
        def run(command, env, **options):
            assert command[-6:] == ["bench.first_call", "bridge", "1", "8", "128", "64"]
            assert env[bridge_paths.VARIABLE] == "1" and env[bridge_paths.PLANS] == "folder"
            if found is None:
                raise subprocess.CalledProcessError(1, command, stderr="Traceback\nOSError: no disk")
            return types.SimpleNamespace(stdout=f"a line\n{json.dumps(found)}\n")
        monkeypatch.setattr(subprocess, "run", run)
        return bridge_paths._in_a_process(PATHS[3], bridge_paths.SMALL, "folder", 1.0)
    assert ends_with(fine) == fine
    assert ends_with(None)["reason"].endswith("OSError: no disk")
    assert ends_with(fine | {"warnings": ["it goes through DLPack"]}) == {"reason": "it goes through DLPack"}
    assert "wrong" in ends_with(fine | {"error": 0.5})["reason"]


def test_a_path_that_no_graph_is_captured_of_is_recorded(monkeypatch):
    """Regression: of the large problem, only stderr told that a path was left out."""
    def refuses(*tensors, is_causal):
        raise RuntimeError("no such backend")
    case, path = bridge_paths._Case.of((1, 1, 8, 16), "cpu"), PATHS[0]._replace(attend=refuses)
    monkeypatch.setattr(bridge_paths._Case, "of", lambda shape, device: case)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    (record,) = bridge_paths._graphs(bridge_paths.LARGE, (path,), 1, 1)
    assert record["what"] == "graphs" and record["shape"] == list(bridge_paths.LARGE)
    assert record["reason"] == "RuntimeError: no such backend"


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bridge_paths"])
    with pytest.raises(SystemExit, match=r"measures on a GPU of compute capability 9\.0 .*: torch sees no CUDA GPU"):
        bridge_paths.main()


def _records():
    environment = dict(time="2026-01-02T03:04:05+00:00", commit="0123456789abcdef", dirty=False, platform="gpu",
                       device="NVIDIA H200", driver=None, ptxas=None, versions={})
    times = {"torch": [2e-5, 2.2e-5], "direct": [3e-5, 3.3e-5]}
    for record in bridge_paths._records("forward", "host_us", bridge_paths.SMALL, times):
        yield {"environment": environment} | record
    yield {"environment": environment} | bridge_paths._refused("graph, forward", bridge_paths.SMALL, PATHS[2], "cannot")
    for path, way, jax in ((PATHS[3], "plans on disk", False), (PATHS[2], "dlpack", True)):
        yield {"environment": environment, "kind": "bridge-first-call", "way": way, "path": path.name,
               "label": path.label, "shape": [1, 8, 128, 64], "beside_torch_mib": 0.0, "imports_jax": jax, "error": 0.0,
               "milliseconds": {"import": 5.0, "first forward": 2.0, "first backward": 3.0, "second forward": 0.1}}
    yield {"environment": environment, "kind": "bridge-first-call", "way": "no plans", "path": "direct",
           "label": PATHS[3].label, "shape": [1, 8, 128, 64], "reason": "no ptxas"}


def test_the_tables_of_ways():
    text = report.block("paths", list(_records()))
    rows = re.findall(r"^\| ([^-(].*) \|$", text, re.MULTILINE)
    assert "forward, 1 x 8 x 128 x 64 | host | 21.0 | 31.5 (1.50)" in rows
    assert "torch_bridge, direct, plans on disk, 64 | 5.0 | 2.0 | 3.0 | 0.1 | 0.0 | no" in rows
    assert "torch_bridge by DLPack, 64 | 5.0 | 2.0 | 3.0 | 0.1 | 0.0 | yes" in rows
    assert "torch_bridge, direct, no plans, 64 | no ptxas | – | – | – | – | –" in rows
    assert "torch_bridge, direct" in report.block("benchmarks", list(_records()))
    assert text.endswith("NVIDIA H200; commit 0123456789; 2026-01-02.")
    assert report.block("paths", []) == report.NOTHING
