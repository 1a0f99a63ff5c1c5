"""The benchmark harness without a GPU: timing with a clock of our own, what contestants get, records and reports."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from bench import check, cli, contestants, environment, plots, records, report, run, timing, tune
from pallas_flash.kernels.hopper import defaults, rules
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
            lambda problem, direction, contestant, reason: left_out.append((direction, contestant.name, reason)))
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
    assert [(d, name) for d, name, _ in left_out] == [(d, name) for d in DIRECTIONS for name in ("wrong", "fails")]
    assert all(("wrong: relative errors" if name == "wrong" else "ZeroDivisionError") in reason
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


def test_torch_contestants_on_the_same_numbers(monkeypatch):
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
    for direction in DIRECTIONS:
        prepared = plain.prepare(SMALL, arrays, direction)
        assert prepared.extra_bytes == 7
        results = prepared.results(prepared.call.finish())
        assert max(case.errors(plain, results).values()) < 1e-5


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
    lines = list(report.write([*cpu, *_gpu_records()], readme, tmp_path / "docs" / "images"))
    text = readme.read_text()
    assert "old" not in text and "kept" in text and "not ours" in text
    assert "| `causal-d64-s512` | **700** | 90% | 500 (1.40) |" in text
    assert "| `causal-d64-s512` | 2.02e-03 (1.010) | – | – | – |" in text
    assert "20,000 (2.500) | 15,000 (2.500) |" in text and "8:2 heads, 4 x 4,096 tokens, bfloat16, remat" in text
    assert "### Without a GPU" in text and "`cpu-d64-small`" in text
    assert "NVIDIA H100; driver 580.1; ptxas 13.5; jax 0.11.2; matrix product 770.0 TFLOP/s; commit 0123456789" in text
    assert "![tflops-forward](docs/images/tflops-forward.png)" in text
    for name in ("tflops-forward", "tflops-backward", "memory"):
        assert (tmp_path / "docs" / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert lines[-1].endswith("3 generated blocks, changed")
    again = list(report.write([*cpu, *_gpu_records()], readme, tmp_path / "docs" / "images"))
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
    (tmp_path / "README.md").write_text("<!-- generated: benchmarks -->\n<!-- end generated -->\n")
    list(report.write([*old, *new], tmp_path / "README.md", tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "| `causal-d64-s512` | **900** | 90% |" in text
    assert "700" not in text and "causal-d64-s1024" not in text and "- NVIDIA H100" not in text


def test_without_records_nothing_is_claimed(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- generated: benchmarks -->\n1,000 TFLOP/s\n<!-- end generated -->\n")
    list(report.write([], readme, tmp_path))
    assert readme.read_text() == "<!-- generated: benchmarks -->\nNo record yet.\n<!-- end generated -->\n"
    assert plots.draw([], tmp_path) == []


# Command line and tuner ----------------------------------------------------------------------------------------------

def test_list_prints_problems_and_runs_nothing(capsys):
    cli.main(["run", "--list", "--problems", "causal-d128-*", "--peers", "jax-nn"])
    assert "causal-d128-s16384" in capsys.readouterr().out


def test_unknown_problems_are_an_error():
    with pytest.raises(SystemExit, match="no problem like"):
        cli.main(["run", "--problems", "no-such-problem", "--peers", "none"])


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_candidates_are_legal_and_start_with_the_default(kernel):
    problem = problems.find("causal-d128-s2048")
    found = tune.candidates(kernel, problem, [])
    assert found[0] == getattr(defaults, f"default_{kernel}")(problem.spec())
    assert len(found) > 5 and len(set(found)) == len(found)
    assert all(not rules.reasons_against(problem.spec(), schedule, 232_448) for schedule in found)


def test_crossed_fields_are_combined():
    problem = problems.find("causal-d128-s2048")
    found = tune.candidates("forward", problem, ["block_kv", "num_stages"])
    assert len({(s.block_kv, s.num_stages) for s in found}) == len(found) > 4
    with pytest.raises(SystemExit, match="the fields of forward are"):
        tune.candidates("forward", problem, ["tile"])


def test_a_schedule_is_the_default_only_while_it_is_tried(monkeypatch):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests need theirs
    spec = problems.find("causal-d128-s2048").spec()
    original = defaults.default_forward(spec)
    other = tune.vary(original, {"num_stages": original.num_stages + 1})
    with tune.scheduled("forward", other):
        assert defaults.default_forward(spec) == other
    assert defaults.default_forward(spec) == original


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
