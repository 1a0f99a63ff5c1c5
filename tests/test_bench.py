"""The benchmark harness without a GPU: timing with a clock of our own, what contestants get, records and reports."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pkgutil
import re
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import (
    chain,
    check,
    cli,
    contestants,
    coverage,
    decode,
    environment,
    jobs,
    plots,
    records,
    report,
    ring,
    ring_step,
    run,
    timing,
    tune,
)
from pallas_flash import device, dispatch
from pallas_flash.masks import Causal, Full, PrefixLM, Window
from pallas_flash.testing import problems
from pallas_flash.testing.problems import Problem

SMALL = Problem("cpu-d64-small", "a test", batch=2, q_heads=4, kv_heads=2, q_len=96, kv_len=96, d=32, d_v=32,
                mask=Causal(), dtypes=("float32",), tags=("cpu",))
DIRECTIONS = ["forward", "backward", "both"]


class Machine:
    """A clock, and calls that take a given time on it."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def clock(self):
        return self.now

    def call(self, name, seconds):
        def start():
            self.now += seconds
            self.log.append(name)
            return name
        return timing.Call(start, lambda result: None)


# Timing --------------------------------------------------------------------------------------------------------------

def test_a_burst_fills_its_time_and_divides_it():
    machine = Machine()
    assert timing.burst(machine.call("a", 0.002), 0.01, machine.clock) == pytest.approx(0.002)
    assert len(machine.log) == 1 + 5
    assert timing.burst(machine.call("slow", 1.0), 0.01, machine.clock) == pytest.approx(1.0)
    assert machine.log.count("slow") == 1


def test_times_are_of_one_computation_of_a_chain():
    machine = Machine()
    assert timing.burst(machine.call("a", 0.002)._replace(count=4), 0.01, machine.clock) == pytest.approx(0.0005)
    assert timing.burst(machine.call("slow", 1.0)._replace(count=4), 0.01, machine.clock) == pytest.approx(0.25)


def test_contestants_take_turns_and_change_places():
    machine = Machine()
    calls = {name: machine.call(name, 0.01) for name in "abc"}
    times = timing.interleaved(calls, rounds=6, seconds=0.015, clock=machine.clock)
    assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6, "c": 6}
    bursts = [machine.log[i] for i in range(3, len(machine.log), 2)]  # after a first run of each, two calls a burst
    by_round = ["".join(bursts[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in by_round)
    assert len({order[0] for order in by_round}) == 3
    assert by_round[0] == "abc" and by_round[1] == "acb"


def test_every_round_is_announced():
    machine, rounds = Machine(), []
    timing.interleaved({"a": machine.call("a", 0.01)}, 4, 0.01, machine.clock, after_round=lambda: rounds.append(1))
    assert len(rounds) == 4


def test_ratios_are_of_a_round_not_of_medians():
    """A clock that slows down for everyone leaves the ratio alone."""
    mine, other = [1.0, 2.0, 4.0, 8.0, 16.0], [1.5, 3.0, 6.0, 12.0, 24.0]
    assert timing.ratios(mine, other) == (1.5, 1.5, 1.5)


def test_spread_is_median_and_quartiles():
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)
    assert timing.spread([7.0]) == (7.0, 7.0, 7.0)


def test_host_time_leaves_out_the_wait():
    machine = Machine()

    def wait(_):
        machine.now += 100
    call = machine.call("a", 0.001)
    assert timing.host_seconds(timing.Call(call.start, wait), 5, machine.clock) == pytest.approx(0.001)


# Problems and contestants --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("mask", "expected"), [
    (Full(), (False, None)), (Causal(), (True, None)), (Window(7, 0), (True, (7, 0))), (Window(7, 3), (False, (7, 3))),
    (Causal(offset=1), None), (PrefixLM(3), None), (Window(right=2), None)], ids=str)
def test_masks_that_other_libraries_can_say(mask, expected):
    assert contestants.simple_mask(dataclasses.replace(SMALL, mask=mask)) == expected


@pytest.mark.parametrize(("name", "direction"), [(c.name, d) for c in contestants.OURS for d in DIRECTIONS])
@pytest.mark.usefixtures("h100")
def test_a_record_names_the_schedules_that_run(name, direction):
    ours = next(c for c in contestants.OURS if c.name == name)
    parts = ours.schedule(problems.find("causal-d128-s2048"), direction).split("; ")
    assert len(parts) == (2 if direction == "both" else 1)
    assert all("Schedule(" in part for part in parts)


def test_flops_follow_the_mask():
    full, causal = (dataclasses.replace(SMALL, mask=mask) for mask in (Full(), Causal()))
    assert run.flops(full, "forward") == 4 * 2 * 4 * 96 * 96 * 32
    assert run.flops(causal, "forward") == 4 * 2 * 4 * (96 * 97 // 2) * 32
    assert run.flops(full, "backward") == 2.5 * run.flops(full, "forward")
    assert run.flops(full, "both") == 3.5 * run.flops(full, "forward")


def test_the_matrix_is_in_the_catalogue():
    names = {problem.name for problem in problems.select(["matrix"])}
    assert {f"causal-d{d}-s{s}" for d in (64, 128, 256) for s in (512, 2048, 16_384)} <= names
    for problem in problems.select(["matrix"]):
        assert problem.batch * problem.q_len == 16_384
        assert problem.q_heads * problem.d == 2_048


def test_names_of_contestants():
    ours = list(contestants.OURS)
    assert [c.name for c in contestants.find(["xla"], ours)] == ["xla"]
    assert contestants.find(["all"], ours) == ours
    assert contestants.find(["none"], ours) == []
    with pytest.raises(SystemExit, match="there are"):
        contestants.find(["fa4"], ours)


def test_what_is_not_installed_says_how_to_get_it():
    absent = contestants.JaxContestant("x", "X", lambda problem: None, packages=("no-such-package",), get="ask for it")
    assert absent.missing() == "no-such-package not installed: ask for it"


@pytest.fixture
def xla():
    return next(c for c in contestants.OURS if c.name == "xla")


@pytest.fixture
def jax_nn():
    return next(c for c in contestants.PEERS if c.name == "jax-nn")


def test_the_commit_where_there_is_no_history(monkeypatch):
    """A machine without the history recorded "HEAD", and every file as changed."""
    monkeypatch.setattr(environment, "_output", lambda *command: "")
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert environment._commit() == ("unknown", None)
    for told, expected in (("0123abc", ("0123abc", False)), ("0123abc+", ("0123abc", True))):
        monkeypatch.setenv("BENCH_COMMIT", told)
        assert environment._commit() == expected


def test_a_busy_machine_is_said_and_recorded(monkeypatch):
    """Regression: records made beside a test suite looked like any others, at a fifth of the speed."""
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    monkeypatch.setattr(os, "getloadavg", lambda: (4.0, 0.0, 0.0))
    assert environment.busy() is None and environment.describe()["load"] == 0.12
    monkeypatch.setattr(os, "getloadavg", lambda: (31.0, 0.0, 0.0))
    assert "97% of the cores busy" in environment.busy() and environment.describe()["load"] == 0.97


@pytest.fixture(scope="module")
def measured():
    """Records of a real run of a small problem on this machine, and what was left out."""
    left_out = []
    common = {"environment": environment.describe(), "matmul_flops": 1e12}
    wrong = contestants.JaxContestant("wrong", "Wrong", lambda problem: lambda q, k, v: v[:, :, [0, 0, 1, 1]])
    fails = contestants.JaxContestant("fails", "Fails", lambda problem: lambda q, k, v: 1 / 0)
    pair = [next(c for c in among if c.name == name)
            for among, name in ((contestants.OURS, "xla"), (contestants.PEERS, "jax-nn"))]
    with jax.default_matmul_precision("float32"):  # or a GPU leaves jax.nn out, whose products are TF32
        found = [record for batch in run.measure(
            SMALL, pair[:1], [pair[1], wrong, fails], DIRECTIONS, run.Options(3, 0.001), common,
            run.Hooks(lambda problem, direction, label, reason: left_out.append((direction, label, reason))))
            for record in batch]
    return found, left_out


def test_records_of_a_run(measured):
    found, _ = measured
    assert [(r["direction"], r["contestant"]) for r in found] == [(d, c) for d in DIRECTIONS for c in ("xla", "jax-nn")]
    for record in found:
        assert record["kind"] == "speed"
        assert len(record["rounds_us"]) == 3
        assert record["low_us"] <= record["median_us"] <= record["high_us"]
        assert record["tflops"] == pytest.approx(run.flops(SMALL, record["direction"]) / record["median_us"] / 1e6)
        assert record["matmul_share"] == pytest.approx(record["tflops"])
        assert set(record["errors"]) == {"forward": {"out"}, "backward": {"dq", "dk", "dv"},
                                         "both": {"out", "dq", "dk", "dv"}}[record["direction"]]
        assert record["extra_bytes"] > 0
        assert set(record["ratio_to"]) == ({"xla"} if record["contestant"] == "jax-nn" else set())
    assert found[0]["schedule"].startswith("Schedule(")
    assert found[0]["environment"]["versions"]["jax"] == jax.__version__


def test_wrong_and_failing_contestants_are_left_out_not_timed(measured):
    _, left_out = measured
    assert [(d, name) for d, name, _ in left_out] == [(d, name) for d in DIRECTIONS for name in ("Wrong", "Fails")]
    assert all(("wrong: relative errors" if name == "Wrong" else "ZeroDivisionError") in reason
               for _, name, reason in left_out)


def test_the_check_looks_at_every_head_of_the_corners_and_for_nan_everywhere(xla):
    arrays = contestants.inputs_of(SMALL)
    case = check.Check(SMALL, arrays, gradients=False)
    prepared = xla.prepare(SMALL, arrays, "forward")
    out = np.array(prepared.results(prepared.call.finish())["out"])
    assert case.errors(xla, {"out": jax.numpy.asarray(out)})["out"] < 1e-6
    for batch, head in ((0, 0), (0, 1), (1, 3)):
        changed = out.copy()
        changed[batch, 50, head] += 1
        assert case.errors(xla, {"out": jax.numpy.asarray(changed)})["out"] > case.limit
    middle = out.copy()
    middle[0, 5, 2] = np.nan
    assert case.errors(xla, {"out": jax.numpy.asarray(middle)})["out"] == np.inf


def test_torch_contestants_on_the_same_numbers(monkeypatch, on_cpu):
    """On the CPU, with PyTorch's plain backend in place of a GPU's."""
    torch = pytest.importorskip("torch")
    from bench import torch_contestants
    for name, value in (("is_available", True), ("synchronize", None), ("memory_allocated", 0),
                        ("max_memory_allocated", 7), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    arrays = contestants.inputs_of(SMALL)
    case = check.Check(SMALL, arrays, gradients=True)
    plain = torch_contestants.TorchContestant("torch-math", "PyTorch", "MATH")
    assert plain.why_not(SMALL) == ""
    assert "no mask" in plain.why_not(dataclasses.replace(SMALL, mask=PrefixLM(3)))
    _without_graphs(monkeypatch, torch.cuda)
    for direction in DIRECTIONS:
        prepared = plain.prepare(SMALL, arrays, direction)
        assert prepared.extra_bytes == 7
        for call in (prepared.call, prepared.chain(4)):
            results = prepared.results(call.finish())
            assert max(case.errors(plain, results).values()) < 1e-5
        assert call.count == 4


@pytest.fixture
def on_cpu():
    """JAX's arrays and programs on a CPU, also where there is a GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def _without_graphs(monkeypatch, cuda):
    """Streams and CUDA graphs as they are on a GPU, but what is captured runs at once."""
    class Stream:
        def wait_stream(self, stream):
            pass

        def synchronize(self):
            pass

    class Graph:
        captured = False

        def replay(self):
            assert self.captured

    @contextlib.contextmanager
    def capture(graph, stream):
        assert isinstance(stream, Stream)
        yield
        graph.captured = True
    for name, value in (("Stream", Stream), ("CUDAGraph", Graph), ("graph", capture), ("current_stream", Stream),
                        ("stream", contextlib.nullcontext)):
        monkeypatch.setattr(cuda, name, value)


# Chains --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("kv_len", "us", "expected"), [
    (1024, 100, 16), (1024, 500, 16), (1024, 5000, 2), (1024, 9000, None), (2048, 199, 16), (2048, 201, None)])
def test_short_calls_are_timed_in_chains_no_longer_than_a_burst(kv_len, us, expected):
    assert chain.length(kv_len, us * 1e-6, 0.01) == expected


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["xla", "jax-nn"])
def test_a_chain_computes_as_often_as_it_says(name, direction):
    """Without barriers XLA computes equal calls once."""
    contestant = next(c for c in (*contestants.OURS, *contestants.PEERS) if c.name == name)
    function, args = contestants._direction(contestant.attention(SMALL), contestants.inputs_of(SMALL), direction)
    compiled = {count: jax.jit(chain.chained(function, count)).lower(*args).compile() for count in (1, 3, 6)}
    flops = {count: executable.cost_analysis()["flops"] for count, executable in compiled.items()}
    assert flops[3] == pytest.approx(3 * flops[1], rel=0.01)
    assert flops[6] == pytest.approx(6 * flops[1], rel=0.01)
    results = compiled[3](*args)
    assert len(results) == 3
    jax.tree.map(np.testing.assert_array_equal, results, [jax.jit(function)(*args)] * 3)


def test_the_time_of_a_chain_is_that_of_its_calls():
    """A chain of eight takes more than four times one call: XLA dropped none. On a CPU it is this process's time, of
    all its threads: what others do on the machine made one of the two wait.
    """
    product, is_cpu = lambda x: x @ x, jax.default_backend() == "cpu"
    size = 700 if is_cpu else 8192  # a call takes longer than it takes to start it
    x = jax.random.normal(jax.random.key(0), (size, size))
    compiled = {count: jax.jit(chain.chained(product, count)).lower(x).compile() for count in (1, 8)}
    calls = {str(count): timing.Call(lambda call=call: call(x), jax.block_until_ready)
             for count, call in compiled.items()}
    times = timing.interleaved(calls, 9, 0.01, time.process_time if is_cpu else time.perf_counter)
    assert min(times["8"]) > 4 * min(times["1"])


def test_records_say_how_a_contestant_was_timed(monkeypatch, full_precision):
    monkeypatch.setattr(chain, "length", lambda *args: 3)
    ours = next(c for c in contestants.OURS if c.name == "xla")
    prepare = contestants.JaxContestant.prepare

    def unchainable(self, *args, **options):
        def fail(count):
            raise RuntimeError("cannot be captured\nand more")
        return prepare(self, *args, **options)._replace(chain=fail)
    other = dataclasses.replace(next(c for c in contestants.PEERS if c.name == "jax-nn"), name="other")
    monkeypatch.setattr(contestants.JaxContestant, "prepare", lambda self, *args, **options: (
        unchainable if self.name == "other" else prepare)(self, *args, **options))
    (found,) = run.measure(SMALL, [ours], [other], ["forward"], run.Options(2, 0.001), {}, run.Hooks(print))
    assert [record["chained"] for record in found] == [3, None]
    assert "not_chained" not in found[0] and found[1]["not_chained"] == "RuntimeError: cannot be captured"
    assert ["3 in a chain" in line for line in cli._summary(found)] == [True, False]


# Processes -----------------------------------------------------------------------------------------------------------

def _measure_or_die(pipe, folder):
    """In place of `jobs.measure`: what becomes of a task is in its problem's name."""
    pipe.send(("ready", None))
    while (task := pipe.recv()) is not None:
        pipe.send(("records", [{"problem": task.problem, "process": os.getpid()}]))
        if task.problem == "dies":
            os._exit(3)
        if task.problem == "fails":
            pipe.send(("failed", "ValueError: not today"))
        (folder / task.problem).touch()
        pipe.send(("ready", None))


def test_a_process_that_dies_loses_only_its_problem(tmp_path):
    names, records = ["a", "dies", "fails", "b", "c"], []
    tasks = [jobs.Task(name, ["forward"], run.Options()) for name in names]
    missing = jobs.share(tasks, 2, lambda kind, content: records.extend(content), _measure_or_die, tmp_path)
    assert missing == {"dies": "its process ended with exit code 3", "fails": "ValueError: not today"}
    assert sorted(record["problem"] for record in records) == sorted(names)  # what was measured before is kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "fails"]
    assert os.getpid() not in {record["process"] for record in records}


def test_problems_that_no_process_took_are_named(tmp_path):
    tasks = [jobs.Task(name, ["forward"], run.Options()) for name in ("dies", "a")]
    missing = jobs.share(tasks[:1] + tasks, 1, lambda kind, content: None, _measure_or_die, tmp_path)
    assert missing == {"dies": "no process was left", "a": "no process was left"}


def test_one_at_a_time_has_the_device(tmp_path):
    here = jobs.DeviceLock(tmp_path / "lock")
    with (tmp_path / "lock").open("a") as there:
        for _ in range(2):
            with here, pytest.raises(BlockingIOError):
                fcntl.flock(there, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(there, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(there, fcntl.LOCK_UN)


class Held(contextlib.AbstractContextManager):
    """A lock that knows whether it is held."""

    held = False

    def __enter__(self):
        assert not self.held
        self.held = True

    def __exit__(self, *exception):
        self.held = False


def test_compiling_leaves_the_device_to_others(monkeypatch, full_precision):
    """Executables are made without the lock, and run with it."""
    lock, log = Held(), []
    make = contestants.compiled

    def compiled(*args):
        executable = make(*args)
        log.append(("compile", lock.held))

        def call(*args):
            log.append(("run", lock.held))
            return executable(*args)
        call.memory_analysis = executable.memory_analysis
        return call
    monkeypatch.setattr(contestants, "compiled", compiled)
    monkeypatch.setattr(check, "compiled", compiled)
    monkeypatch.setattr(chain, "length", lambda *args: 2)
    pair = [next(c for c in among if c.name == name)
            for among, name in ((contestants.OURS, "xla"), (contestants.PEERS, "jax-nn"))]
    rounds = []
    hooks = run.Hooks(print, lambda: rounds.append(lock.held), lock)
    found = list(run.measure(SMALL, pair[:1], pair[1:], ["forward", "backward"], run.Options(2, 0.001), {}, hooks))
    assert [record["chained"] for batch in found for record in batch] == [2] * 4
    assert set(log) == {("compile", False), ("run", True)} and rounds == [True] * 4
    assert not lock.held


# Records and reports -------------------------------------------------------------------------------------------------

def test_records_come_back_as_they_were_written(measured, tmp_path):
    found, _ = measured
    path = tmp_path / "results" / records.file_name(found[0]["environment"])
    for record in found:
        records.append(path, record)
    (tmp_path / "results" / "other.jsonl").write_text('{"kind": "of another tool"}\n')
    assert records.read(tmp_path / "results") == found
    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:{len(found) + 1} is not a JSON record")):
        records.read(tmp_path / "results")


def test_the_newest_record_counts():
    old, new = {"problem": "a", "value": 1}, {"problem": "a", "value": 2}
    assert records.latest([old, new], "problem") == {("a",): new}


def _gpu_records():
    """Records as an H100 would leave them."""
    environment = dict(time="2026-01-02T03:04:05+00:00", commit="0123456789abcdef", dirty=False, platform="gpu",
                       device="NVIDIA H100", driver="580.1", ptxas="13.5", versions={"jax": "0.11.2"})
    for problem in problems.select(["matrix"]):
        for direction in ("forward", "backward"):
            for name, label, tflops in (("hopper", "pallas_flash (hopper)", 700.0), ("fa3", "FlashAttention-3", 500.0)):
                yield dict(environment=environment, kind="speed", problem=problem.name, direction=direction,
                           contestant=name, label=label, spec=records.spec_fields(problem.spec()), tflops=tflops,
                           matmul_share=0.9, matmul_flops=7.7e14, median_us=10.0, extra_bytes=1 << 20,
                           errors={"out": 2.02e-3 if name == "hopper" else 2e-3},
                           ratio_to={} if name == "hopper" else {"hopper": dict(median=1.4, low=1.3, high=1.5)})
    for name, us in (("hopper", 50.0), ("torch-cudnn", 27.0)):
        yield dict(environment=environment, kind="host", problem="host-tiny", direction="forward", contestant=name,
                   label=name, host_us=us)
    model = dict(layers=8, dim=1024, heads=8, kv_heads=2, batch=4, context=4096, dtype="bfloat16", remat=True)
    for attention, speed in (("flash", 10.0), ("flash", 20_000.0), ("cudnn", 15_000.0)):
        yield dict(environment=environment, kind="training", attention=attention, tokens_per_second=speed,
                   held_out_loss=2.5, **model)


def test_a_report_fills_the_blocks_of_a_readme(tmp_path, measured):
    readme = tmp_path / "README.md"
    readme.write_text("Title\n\n<!-- generated: forward -->\nold\n<!-- end generated -->\n\nkept\n\n"
                      "<!-- generated: benchmarks (written by bench) -->\n<!-- end generated -->\n\n"
                      "<!-- generated: of-another-tool -->\nnot ours\n<!-- end generated -->\n")
    cpu = [json.loads(json.dumps(record)) for record in measured[0]]
    for record in cpu:
        record["environment"]["platform"] = "cpu"  # wherever this test runs
    lines = list(report.write([*cpu, *_gpu_records()], [readme], tmp_path / "docs" / "images"))
    text = readme.read_text()
    assert "old" not in text and "kept" in text and "not ours" in text
    assert "| `causal-d64-s512` | **700** | 90% | 500 (1.40) |" in text
    assert "| `causal-d64-s512` | 2.02e-03 (1.010) | – | – | – |" in text
    assert "20,000 (2.500) | 15,000 (2.500) |" in text and "8:2 heads, 4 x 4,096 tokens, bfloat16, remat" in text
    assert "### Without a GPU" in text and "`cpu-d64-small`" in text
    assert "NVIDIA H100; driver 580.1; ptxas 13.5; jax 0.11.2; matrix product 770.0 TFLOP/s; commit 0123456789" in text
    assert f"![{plots.ALT['tflops-forward']}](docs/images/tflops-forward.png)" in text
    for name in plots.ALT:
        assert (tmp_path / "docs" / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert lines[-1].endswith("3 generated blocks, changed")
    again = list(report.write([*cpu, *_gpu_records()], [readme], tmp_path / "docs" / "images"))
    assert again[-1].endswith("as they were")


def test_rows_are_in_the_order_of_head_size_and_length():
    table = report.block("forward", [dict(r, device_name="x") for r in _gpu_records()])
    names = re.findall(r"`(causal-d\d+-s\d+)`", table)
    assert names[:3] == ["causal-d64-s512", "causal-d64-s1024", "causal-d64-s2048"]
    assert names.index("causal-d64-s16384") < names.index("causal-d128-s512") < names.index("causal-d256-s512")


def test_numbers_of_two_devices_never_share_a_table(tmp_path):
    old = list(_gpu_records())
    new = [dict(r, tflops=900.0, environment=r["environment"] | {"device": "NVIDIA H200"}) for r in old
           if r.get("contestant") == "hopper" and r["problem"] == "causal-d64-s512"]
    page = tmp_path / "benchmarks.md"
    page.write_text("<!-- generated: benchmarks -->\n<!-- end generated -->\n"
                    "<!-- generated: forward -->\n<!-- end generated -->\n")
    list(report.write([*old, *new], [page], tmp_path / "images"))
    everything, newest, _ = page.read_text().split("<!-- end generated -->")
    titles = re.findall("^### (.*)", everything, re.MULTILINE)
    assert titles[:2] == ["NVIDIA H200", "NVIDIA H100"]  # the newest first
    of_h200, of_h100 = everything.split("### NVIDIA H100\n")
    assert "| `causal-d64-s512` | **900** | 90% |" in of_h200 and "NVIDIA H200; driver" in of_h200
    assert "700" not in of_h200 and "causal-d64-s1024" not in of_h200
    assert "| `causal-d64-s1024` | **700** | 90% | 500 (1.40) |" in of_h100 and "900" not in of_h100
    assert "NVIDIA H100; driver" in of_h100 and "microseconds a call" in of_h100  # and its other tables
    assert "**900**" in newest and "700" not in newest
    assert f"![{plots.ALT['tflops-forward']}](images/tflops-forward.png)" in everything


def test_the_headline_compares_with_the_best_way_to_call_each_peer():
    found = list(_gpu_records())
    found += [dict(r, contestant=name, ratio_to={"hopper": dict(median=ratio, low=ratio, high=ratio)}) for r in found
              if r.get("contestant") == "fa3" for name, ratio in (("cudnn", 1.3), ("torch-cudnn", 1.25))]
    table = report.block("headline", found)
    rows = re.findall(r"^\| `(\S+)` \| (.*) \|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == [name for name in report.HEADLINE if name.startswith("causal")]
    assert {cells for _, cells in rows} == {"**700** | 1.40 | 1.25 | **700** | 1.40 | 1.25"}
    assert table.splitlines()[0].count("|") == 8 and "NVIDIA H100, 2026-01-02." in table
    catalogue = {problem.name for problem in problems.select(["*"])}
    assert len(report.HEADLINE) == 8 and catalogue >= set(report.HEADLINE)


def test_where_others_are_faster_is_said():
    """The worst call of each kind: those in which ours is as fast or faster leave no row."""
    ratio = lambda median: dict(median=median, low=median, high=median)
    found = list(_gpu_records())
    assert report.block("slower", found) == report.NOTHING
    assert report.block("speed", found) == (
        "On an NVIDIA H100, the forward takes 0.71 to 0.71 of FlashAttention-3's time in calls with a causal or no "
        "mask, the backward 0.71 to 0.71.")
    mine = next(r for r in found if r.get("contestant") == "hopper" and r.get("direction") == "backward")
    peer = dict(mine, contestant="fa3", label="FlashAttention-3", ratio_to={"hopper": ratio(0.8)})
    feature = dict(mine, kind="feature", problem="ragged-ids-d128-s4096", median_us=2.0)
    beside = dict(feature, contestant="fa3", label="FlashAttention-3", median_us=1.0, ratio_to={"hopper": ratio(0.5)})
    step = dict(kind="decode", environment=mine["environment"], problem="b1", us=dict(ours=10.0, torch=9.0),
                speed_over={"torch": ratio(0.9)})
    in_graphs = dict(step, problem="b2", us=dict(ours=10.0, bridge=6.0, torch=9.0))  # the bridge's is compared
    host = dict(kind="bridge-path", environment=mine["environment"], path="direct", what="forward and .backward()",
                host_us=10.0, over_torch=ratio(1.5))
    assert report.block("slower", [*found, peer, feature, beside, step, in_graphs, host]).splitlines()[2:] == [
        "| plain calls | FlashAttention-3 | 0.71 | 1.25 | – |",
        "| 5 uneven documents in each row, `segment_ids` | FlashAttention-3 | – | 2.00 | – |",
        "| a few queries to a contiguous cache | PyTorch | 1.11 | – | – |",
        "| the host's time of a small call from PyTorch; forward: without a gradient | PyTorch | – | – | 1.50 |"]


def test_the_table_of_gpus_has_all_that_are_given():
    given = {x.name for x in vars(device).values() if isinstance(x, device.Device)}
    assert {gpu.name for gpu in coverage.GPUS} == given - {device.CPU.name}


def test_tables_say_what_was_timed_in_chains():
    found = list(_gpu_records())
    assert "†" not in report.block("forward", found) and "‡" not in report.block("forward", found)
    short = "causal-d64-s512"
    for r in found:
        if r.get("problem") == short and r["contestant"] == "hopper":
            r["chained"] = 16
        elif r.get("problem") == short:
            r["not_chained"] = "cannot be captured"
    table = report.block("forward", found)
    assert f"| `{short}` † | **700** | 90% | 500 ‡ (1.40) |" in table and "| `causal-d64-s1024` |" in table
    assert table.endswith("† calls in chains, without the gaps between executables; ‡ of those, timed call by call.")


def test_all_of_ours_and_the_other_kinds_of_records_have_their_tables():
    found = list(_gpu_records())
    where = found[0]["environment"]
    ratio = dict(median=0.95, low=0.9, high=1.0)
    found += [dict(r, contestant="ampere", label="pallas_flash (ampere)", tflops=300.0, ratio_to={}) for r in found
              if r.get("contestant") == "hopper"]
    found += [dict(environment=where, kind="decode", problem="b1-s1024", us=dict(ours=7.4, reads=7.2, torch=6.6),
                   gbytes=dict(ours=560.0), speed_over=dict(reads=ratio, torch=ratio)),
              dict(environment=where, kind="ring", direction="both", strategy="ring", mask="causal", devices=2,
                   xla_flags="", length=131_072, alone_us=777e3, spread_us=404e3, efficiency=ratio),
              dict(environment=where, kind="ring-step", direction="forward", length=8192, devices=8, ring_us=6880.0,
                   merged_by="kernels", over_plain=ratio, step_over_square=ratio)]
    header, _, first, *_ = report.block("forward", found).splitlines()
    assert "pallas_flash (hopper)" in header and header.endswith("pallas_flash (ampere) |")
    assert first.endswith("| 300 |")
    assert "| 8,192 | forward | 8 | kernels | 6.88 | 0.950 | 0.950 |" in report.block("ring-step", found)
    assert "| 131,072 | causal | both | ring | 2 | 777.0 | 404.0 | 0.95 | – |" in report.block("ring", found)


def test_decoding_is_compared_with_what_was_timed_by_the_same_means():
    """In a CUDA graph or from JAX: the first column is not ours from JAX, with what XLA launches between kernels."""
    (where,) = {str(r["environment"]): r["environment"] for r in _gpu_records()}.values()
    ratio = dict(median=0.95, low=0.9, high=1.0)
    record = dict(environment=where, kind="decode", problem="b1-s1024", us=dict(ours=7.5, reads=7.2, torch=6.6),
                  gbytes=dict(ours=560.0, bridge=700.0), speed_over=dict(reads=ratio, torch=ratio))

    def row(**more):
        table = report.block("decode", [dict(record, device_name=where["device"], **more)])
        return next(line for line in table.splitlines() if "`b1-s1024`" in line)
    assert row() == "| `b1-s1024` | – | 560 | 7.5 | 7.2 (0.95) | 6.6 (0.95) | – |", "ours was not in a graph"
    times = {**record["us"], "bridge": 6.0, "fa3": 9.0, "torch-flex": 12.0}
    speed = dict.fromkeys((*times,), ratio)
    assert row(us=times, speed_over=speed) == (
        "| `b1-s1024` | 6.0 | 700 | 7.5 | 7.2 (0.95) | 6.6 (1.10) | – | 12.0 (2.00) | 9.0 (0.95) |")
    assert "| 7.2 (1.20) | 6.6 (1.10) |" in row(us=times, speed_over=speed, in_graphs=["bridge", "reads", "torch"])


def test_without_records_nothing_is_claimed(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- generated: benchmarks -->\n1,000 TFLOP/s\n<!-- end generated -->\n")
    list(report.write([], [readme], tmp_path))
    assert readme.read_text() == "<!-- generated: benchmarks -->\nNo record yet.\n<!-- end generated -->\n"
    assert plots.draw([], tmp_path) == []


# Command line and tuner ----------------------------------------------------------------------------------------------

def test_list_prints_problems_and_runs_nothing(capsys):
    cli.main(["run", "--list", "--problems", "causal-d128-*", "--peers", "jax-nn"])
    assert "causal-d128-s16384" in capsys.readouterr().out


def test_unknown_problems_are_an_error():
    with pytest.raises(SystemExit, match="no problem like"):
        cli.main(["run", "--problems", "no-such-problem", "--peers", "none"])


@pytest.fixture
def h100():
    with device.assume(device.H100):
        yield


def target(kernel, name="causal-d128-s2048"):
    return tune.Target(tune.TUNABLE[0], kernel, problems.find(name))


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.usefixtures("h100")
def test_candidates_are_legal_and_start_with_the_default(kernel):
    tuned = target(kernel)
    default, reasons_against, *_ = (pkgutil.resolve_name(name) for name in tuned.schedules)
    found = tune.candidates(tuned, [])
    assert found[0] == default(tuned.problem.spec(), device.H100)
    assert len(found) > 5 and len(set(found)) == len(found)
    assert all(not reasons_against(tuned.problem.spec(), schedule, 232_448) for schedule in found)


@pytest.mark.usefixtures("h100")
def test_crossed_fields_are_combined():
    found = tune.candidates(target("forward"), ["block_kv", "num_stages"])
    assert len({(s.block_kv, s.num_stages) for s in found}) == len(found) > 4
    with pytest.raises(SystemExit, match="the fields of forward are"):
        tune.candidates(target("forward"), ["tile"])


def test_a_schedule_is_the_default_only_while_it_is_tried(monkeypatch):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests need theirs
    tuned = target("forward")
    default = lambda: pkgutil.resolve_name(tuned.schedules.default)(tuned.problem.spec(), device.H100)
    original = default()
    other = tune.vary(original, {"num_stages": original.num_stages + 1})
    with tune.scheduled(tuned, other):
        assert default() == other
    assert default() == original


def test_what_is_tuned_is_what_runs_here_unless_named():
    problem = problems.find("causal-d128-s2048")
    assert cli._tuned(tune.TUNABLE[0], problem) == tune.TUNABLE[0]
    with device.assume(device.H100):
        assert cli._tuned(None, problem) == "hopper"
    with device.assume(device.CPU), pytest.raises(SystemExit, match="xla has one schedule only"):
        cli._tuned(None, problem)


def test_every_automatic_implementation_takes_part_and_has_a_colour():
    names = [row.name for row in dispatch.IMPLEMENTATIONS if row.automatic]
    assert [contestant.name for contestant in contestants.OURS] == names == list(plots.OURS)
    assert set(names) <= set(plots.COLOURS)
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)


def test_vary_reaches_into_parts():
    @dataclasses.dataclass(frozen=True)
    class Part:
        rows: int = 1

    @dataclasses.dataclass(frozen=True)
    class Whole:
        part: Part | None = Part()
    assert tune.vary(Whole(), {"part.rows": 2}) == Whole(Part(2))
    assert tune.vary(Whole(None), {"part.rows": 2}) is None
    assert tune.vary(Whole(), {"part.columns": 2}) is None


def test_the_steps_of_a_ring_are_timed_beside_plain_calls(monkeypatch):
    monkeypatch.setattr(ring_step, "BURST", 0.001)
    found = list(ring_step.measure(32, (2, 3), (2, 1), 8, rounds=1))
    assert [(record["direction"], record["devices"], record["merged_by"]) for record in found] == [
        (direction, n, "xla") for direction in ("forward", "backward") for n in (2, 3)]
    assert all(record["ring_us"] > 0 and record["over_plain"]["median"] > 0 for record in found)
    assert ["step_over_square" in record for record in found] == [False, True] * 2
    json.dumps(found)


def test_a_step_more_is_told_from_what_happens_once():
    """A ring of 10 and 3 a step, beside calls of 1 and 2 a square, which in a burst of its own takes 1.9."""
    times = {"4 kernels": [22.0], "8 kernels": [34.0], "4 plain": [7.0], "8 plain": [15.0], "square": [1.9],
             "diagonal": [1.0], "part": [2.5]}
    found = ring_step._compared(times, 8, 4, "kernels")
    assert found["over_plain"]["median"] == 34 / 15
    assert found["step_over_square"]["median"] == 1.5
    assert found["part_us"] == 2.5e6


def test_plain_calls_in_a_row_are_those_of_a_rings_pairs():
    begun = []

    def call(name):
        return timing.Call(lambda: begun.append(name) or name, lambda result: begun.append(f"waited for {result}"))
    plain = {name: {"forward": call(name)} for name in ("diagonal", "square")}
    ring_step._in_a_row(plain, 4, "forward").finish()
    assert begun == ["diagonal", *["square"] * 3, "waited for square"]


@pytest.mark.virtual
def test_a_sequence_over_devices_is_timed_beside_one_device():
    found = list(ring.measure(ring.Size(64, (2, 1), 8), ("ring", "all_gather"), "causal", 1, "overlap-2"))
    assert [(record["direction"], record["strategy"]) for record in found] == [
        (direction, strategy) for direction in ("forward", "both") for strategy in ("ring", "all_gather")]
    for record in found:
        assert 0 < record["model"] < 1
        assert record["devices"] == jax.device_count() > 1
        assert record["xla_flags"].endswith("--xla_gpu_experimental_parallel_collective_overlap_limit=2")
        assert record["largest_difference"] < 0.02
        assert record["efficiency"]["median"] > 0
    json.dumps(found)


@pytest.mark.parametrize("more", [dict(bias=(2, 1), sinks=True), dict(eight=True)], ids=str)
def test_decoding_is_timed_in_bytes_a_second(monkeypatch, more):
    """Without the others that a GPU has: reads alone, and PyTorch."""
    monkeypatch.setattr(decode, "BURST_SECONDS", 0.001)
    monkeypatch.setattr(decode, "_contestants", lambda problem, implementation: {
        "ours": decode._jax_calls(implementation, *problem.arrays(), problem.more_arrays())})
    problem = decode.Problem(2, 48, (2, 1), 8, shortest=5, page=16, **more)
    record = decode.measure("small", problem, "xla", rounds=1)
    assert problem.lengths.min() >= 5 and problem.lengths.max() <= 48
    assert problem.bytes_read == problem.lengths.sum() * 8 * 2 * (1 if problem.eight else 2)
    assert set(record["us"]) == {"ours"} and record["error"] == 0
    assert record["gbytes"]["ours"] == pytest.approx(problem.bytes_read / record["us"]["ours"] / 1e3)
    json.dumps(record)


@pytest.mark.parametrize("q_len", [1, 3])
def test_decoding_of_a_peer_that_takes_heads_last_is_the_same(monkeypatch, q_len):
    """FlashAttention-3, in whose place jax.nn's attention stands: as its own, a causal rule ends at the last key."""
    def flash_mha(q, k, v, is_causal, sinks):
        assert sinks is None
        rows, columns = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None]
        last = (columns <= rows + k.shape[1] - q.shape[1])[None, None]
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, mask=last if is_causal else None)

    monkeypatch.setitem(sys.modules, "dew_flash_attn", types.SimpleNamespace(flash_mha=flash_mha))
    problem = decode.Problem(2, 48, (4, 2), 8, q_len=q_len)
    q, filled = problem.arrays()
    call = decode._fa3(problem, q, filled, None)(2)
    wanted = np.asarray(decode._attend("xla")(q, filled, {}), np.float32)
    assert call.count == 2
    for out in call.start():
        np.testing.assert_allclose(np.asarray(out.swapaxes(1, 2), np.float32), wanted, atol=0.02)
