"""Benchmarks of features, without a GPU: their problems, plain calls, truths, records, and what PyTorch computes."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import chain, check, cli, contestants, features, plain, records, report, run
from pallas_flash import masks
from pallas_flash.testing import problems

SMALL = {problem.name.removesuffix("-d16-s64"): dataclasses.replace(problem, dtypes=("float32",))
         for problem in problems.features(64, 2, 16)}
XLA = next(c for c in contestants.OURS if c.name == "xla")


def test_every_feature_has_both_head_sizes_and_a_plain_call():
    found = problems.select(["features"])
    assert {problem.d for problem in found} == {64, 128} and len(found) == 2 * len(SMALL)
    for problem in found:
        assert problem.plain and problem.batch * problem.q_len == 16_384 and problem.q_heads == 16
        assert features.wanted(problem)
        assert all(not call.mask.has_arrays and not features.wanted(call) for call in plain.calls(problem))
    assert not {problem.name for problem in problems.select(["gpu"])} & {problem.name for problem in found}


@pytest.mark.parametrize("name", SMALL)
def test_pairs_are_those_that_the_mask_keeps(name):
    problem = SMALL[name]
    pos = jnp.arange(problem.q_len)
    keep = masks.over_batch(problem.mask.canonical(), lambda part: part.keep(pos[:, None], pos[None, :]))
    keep = np.broadcast_to(keep, (problem.batch, 1, problem.q_len, problem.q_len))
    assert features.attended(problem) == keep.sum()
    assert run.flops(problem, "forward") == 4 * keep.sum() * problem.q_heads * problem.d


def test_packed_documents_are_those_of_the_ids():
    for name in ("documents", "ragged"):
        ids, packed = SMALL[f"{name}-ids"], SMALL[f"{name}-packed"]
        np.testing.assert_array_equal(features.boundaries(ids), features.boundaries(packed))
        assert features.attended(ids) == features.attended(packed)
        assert plain.share(ids) == plain.share(packed) == 1
        assert sum(call.batch * call.q_len for call in plain.calls(packed)) == packed.q_len
    assert [call.q_len for call in plain.calls(SMALL["documents-ids"])] == [16]
    assert len(plain.calls(SMALL["ragged-packed"])) == 5
    assert features.longest(SMALL["ragged-packed"]) == max(call.q_len for call in plain.calls(SMALL["ragged-ids"]))


@pytest.mark.parametrize("name", ["documents-packed", "ragged-ids", "ragged-packed", "lengths"])
def test_what_plain_calls_get_is_all_of_the_tokens(name):
    problem = SMALL[name]
    x = contestants.inputs_of(problem).q
    parts = plain._cut(problem, x)
    assert [part.shape[:2] for part in parts] == [(call.batch, call.q_len) for call in plain.calls(problem)]
    np.testing.assert_array_equal(plain._joined(problem, parts), x)


def _ignorant(problem):
    """A library that knows of the rule alone."""
    is_causal, window = contestants.simple_mask(problem)
    return lambda q, k, v, **others: jax.nn.dot_product_attention(
        q, k, v, is_causal=is_causal, local_window_size=window)


IGNORANT = contestants.JaxContestant("ignorant", "Ignorant", _ignorant, needs_simple_mask=False)


@pytest.mark.parametrize("name", ["documents-packed", "bias-gradient", "dropout", "sinks"])
def test_features_are_right_before_they_are_timed(name, monkeypatch):
    """The truths hold where two other programs agree with them, and not where a feature is ignored."""
    if name != "sinks":
        monkeypatch.setattr(chain, "length", lambda *args: None)  # half of what is to be compiled
    problem, left_out = SMALL[name], []
    hooks = run.Hooks(lambda *reason: left_out.append(reason))
    (found,) = run.measure(problem, [XLA], [plain.PLAIN, IGNORANT], ["both"], run.Options(2, 0.0005), {}, hooks)
    assert [record["contestant"] for record in found] == ["xla", "plain"]
    mine, other = found
    learned = {f"d{name}" for name in problem.learned}
    assert set(mine["errors"]) == {"out", "dq", "dk", "dv"} | learned and max(mine["errors"].values()) < 1e-6
    assert max(other["errors"].values()) < 1e-6 and not learned & set(other["errors"])
    assert {record["kind"] for record in found} == {"feature"}
    ratio = other["ratio_to"]["xla"]["median"]
    assert mine["of_plain"]["median"] == pytest.approx(ratio * mine["plain_share"]) and "of_plain" not in other
    ((_, direction, label, reason),) = left_out
    assert (direction, label) == ("both", "Ignorant") and "wrong: relative errors" in reason


@pytest.mark.parametrize("name", ["ragged-packed", "padding", "window-softcap", "bias-gradient", "dropout"])
def test_the_truth_is_that_of_the_reference(name):
    problem = SMALL[name]
    arrays = contestants.inputs_of(problem)
    case = check.Check(problem, arrays, gradients=True)
    reference = contestants._ours("reference")
    function, args = contestants._direction(reference.attention(problem), arrays, "both")
    results = contestants._named("both", jax.jit(function)(*args))
    assert max(case.errors(reference, results).values()) < 1e-6
    for i, corner in enumerate(case.corners):  # all of the tokens of packed sequences
        assert case._truths[i]["out"].shape == (len(corner.batches), 1, problem.q_len, problem.d_v)


def test_a_library_says_which_features_it_lacks():
    fa3, cudnn = (dataclasses.replace(c, platforms=("cpu", "gpu"))
                  for c in contestants.find(["fa3", "cudnn"], contestants.PEERS))
    assert fa3.why_not(SMALL["bias-gradient"]) == "takes no bias, no the gradient of a bias"
    assert fa3.why_not(SMALL["ragged-ids"]) == fa3.why_not(SMALL["ragged-packed"]) == fa3.why_not(SMALL["sinks"]) == ""
    assert cudnn.why_not(SMALL["lengths"]) == cudnn.why_not(SMALL["padding-full"]) == ""
    assert cudnn.why_not(SMALL["dropout"]) == "takes no dropout"
    assert "no feature" in plain.PLAIN.why_not(problems.find("causal-d128-s512"))


def test_what_dropout_does_on_average():
    """A result without dropout is as wrong as one with too much of it, or one that is not scaled."""
    rng, rate = np.random.default_rng(0), 0.1
    weights, value = np.full((300, 900), 1 / 900), rng.standard_normal((900, 30))
    drop = lambda rate, scale: (weights * (rng.random(weights.shape) >= rate) * scale) @ value
    errors = {name: check.Check._noise(found.ravel(), (weights @ value).ravel(), rate) for name, found in {
        "right": drop(rate, 1 / (1 - rate)), "none": drop(0, 1), "too much": drop(0.2, 1 / 0.8),
        "not scaled": drop(0.6, 1.0)}.items()}
    assert errors["right"] < 0.1 and all(error > check.NOISE for name, error in errors.items() if name != "right")


def test_pytorch_gets_the_same_features(monkeypatch):
    """On the CPU, with PyTorch's plain backend in place of a GPU's."""
    torch = pytest.importorskip("torch")
    from bench import torch_contestants
    for name, value in (("is_available", True), ("synchronize", None), ("memory_allocated", 0),
                        ("max_memory_allocated", 7), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    torch.manual_seed(0)
    efficient = next(c for c in torch_contestants.TORCH if c.name == "torch-efficient")
    math = torch_contestants.TorchContestant("torch-math", "PyTorch", "MATH", efficient.takes)
    assert math.why_not(SMALL["documents-packed"]) == "takes no packed sequences"
    for name in ("ragged-ids", "lengths", "bias-gradient", "dropout"):
        problem = SMALL[name]
        truths = run._Truths(problem, contestants.inputs_of(problem), True, contestants.SHARED)
        assert math.why_not(problem) == ""
        prepared = math.prepare(problem, truths.arrays, "both")
        errors = truths.errors(math, prepared, prepared.call)
        assert set(errors) == {"out", "dq", "dk", "dv", *(f"d{name}" for name in problem.learned)}
        assert not truths.wrong(math, errors), name
        assert name == "dropout" or max(errors.values()) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gets_the_same_masks(monkeypatch):
    """On the CPU, not compiled, and forward alone: it has no backward there."""
    torch = pytest.importorskip("torch")
    from bench import torch_contestants
    for name, value in (("is_available", True), ("synchronize", None), ("memory_allocated", 0),
                        ("max_memory_allocated", 7), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flex = next(c for c in torch_contestants.TORCH if c.name == "torch-flex")
    assert flex.why_not(SMALL["bias"]) == "takes no bias"
    for name in ("ragged-ids", "ragged-packed", "lengths", "lengths-full", "window-softcap"):
        problem = SMALL[name]
        assert flex.why_not(problem) == ""
        truths = run._Truths(problem, contestants.inputs_of(problem), False, contestants.SHARED)
        prepared = flex.prepare(problem, truths.arrays, "forward")
        errors = truths.errors(flex, prepared, prepared.call)
        assert set(errors) == {"out"} and errors["out"] < 1e-5, name


def test_flex_attention_is_compiled_for_every_shape(monkeypatch):
    """Regression: torch's compiler left the ninth shape of a process, and all later ones, uncompiled."""
    torch = pytest.importorskip("torch")
    from bench import torch_contestants
    compiled, real = [], torch.compile

    def record(graph, _):
        compiled.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=record, **options))
    flex = next(c for c in torch_contestants.TORCH if c.name == "torch-flex")
    for count in range(1, 11):
        q = torch.zeros(1, SMALL["sinks"].q_heads, 16 * count, 16)
        flex._function(SMALL["sinks"])(q, q, q)
        assert len(compiled) == count


# Records and the table -----------------------------------------------------------------------------------------------

def test_who_cannot_run_a_feature_is_a_record(tmp_path):
    said, path = [], tmp_path / "records.jsonl"
    leave = cli._leaver(path, {"environment": {}}, said.append)
    leave("bias-d128-s4096", "forward", "A", "takes no bias")
    leave("causal-d128-s512", "forward", "A", "not today")
    (record,) = map(json.loads, path.read_text().splitlines())
    assert record["kind"] == "left out" and record["reason"] == "takes no bias" and len(said) == 2


def _records():
    environment = dict(time="2026-01-02T03:04:05+00:00", commit="0123456789abcdef", dirty=False, platform="gpu",
                       device="NVIDIA H200", driver=None, ptxas=None, versions={})
    common = dict(environment=environment, problem="ragged-ids-d128-s4096", direction="forward", errors={})
    problem = problems.find("ragged-ids-d128-s4096")
    speed = lambda name, label, us, **others: common | dict(
        kind="feature", contestant=name, label=label, median_us=us, spec=records.spec_fields(problem.spec()),
        tflops=1.0, ratio_to={} if name == "hopper" else {"hopper": dict(median=us / 200)}, **others)
    yield speed("hopper", "pallas_flash (hopper)", 200.0, of_plain=dict(median=0.87))
    yield speed("plain", "a plain call", 174.0)
    yield speed("fa3", "FlashAttention-3", 250.0)
    yield speed("torch-efficient", "PyTorch (efficient)", 900.0)
    yield common | dict(kind="left out", problem="bias-d128-s4096", label="pallas_flash (hopper)", reason="not yet")
    yield common | dict(kind="left out", problem="bias-d128-s4096", label="cuDNN", reason="not today")


def test_the_table_of_features():
    table = report.block("features", list(_records()))
    rows = re.findall(r"^\| `(\S+)` \| (.*) \|$", table, re.MULTILINE)
    assert rows == [("ragged-ids-d128-s4096", "forward | 0.200 | 0.87 | FlashAttention-3 | 0.250 | 1.25"),
                    ("bias-d128-s4096", "forward | – | – | – | – | –")]
    assert "\n\n- `bias-d128-s4096`: pallas_flash (hopper): not yet\n\nNVIDIA H200; commit 0123456789; 2026" in table
    assert "cuDNN" not in table
    assert "ragged-ids" in report.block("benchmarks", list(_records()))
    assert report.block("forward", list(_records())) == report.NOTHING  # numbers of features stay in their table


def test_a_peer_that_was_not_timed_again_stands_beside_our_new_time():
    """Regression: the table had the ratio to our old time."""
    found = list(_records())
    again = found[0] | dict(median_us=100.0, environment=found[0]["environment"] | dict(
        commit="fedcba9876543210", time="2026-01-03T03:04:05+00:00"))
    assert "0.100 | 0.87 | FlashAttention-3 | 0.250 | 2.50, of two runs" in report.block("features", [*found, again])
