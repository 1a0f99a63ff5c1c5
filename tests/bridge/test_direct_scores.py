"""Score functions on the direct path: told to the process that compiles as data, launched by the stand-ins of
test_direct.py. That their plans launch what Mosaic launches: test_direct_offline.py.
"""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pallas_flash as pf
import torch_bridge
from bridge import test_scores
from bridge.direct import A100, FORWARD
from bridge.problems import operator_call, qkv
from bridge.test_direct import BF16, BOTH, launched
from bridge.test_direct_compile import ROOT, graphs_of
from bridge.test_scores import CASES, KV, LINES, RULES, SHOWN, H, L, Q, S, leaky, truth
from pallas_flash import scores
from pallas_flash.kernels.mosaic import traced
from pallas_flash.mask_fields import ArrayField
from torch_bridge.direct import attention, score_ir
from torch_bridge.direct.problem import Request

__all__ = ["launched"]  # a fixture


def placeholders(score):
    return scores.checked(score).with_placeholders()


@dataclasses.dataclass(frozen=True)
class Fading(test_scores.Fading):
    """In primitives that kernels have: arrays of floats, integers and booleans."""

    def power(self, x):
        return jnp.exp2(x)


MADE = {case: made for case, (made, _, _) in CASES.items()} | {"own": lambda *arrays: Fading(*arrays, LINES, SHOWN)}
FLOATS = ArrayField((4,), np.dtype(np.float32))
FUNCTIONS = {
    "plain": leaky, "same": lambda s, *_: s, "position": lambda s, b, h, i, j: s + (i - j).astype(s.dtype),
    "alibi": pf.ALiBi(FLOATS), "table": pf.RelativeBias(ArrayField((4, 9), np.dtype(np.float32))),
    "own": Fading(FLOATS, FLOATS, ArrayField((2, 16), np.dtype(np.int32)), ArrayField((16,), np.dtype(bool))),
    "smooth": lambda s, b, h, i, j: jnp.log1p(jnp.exp(s)) + jax.nn.gelu(s) + jax.nn.softplus(s * h.astype(s.dtype)),
    "rule of its own": lambda s, *_: jax.nn.relu(s) + jax.nn.relu6(2 * s)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_text_computes_what_the_function_does(name):
    """Values and slopes, and what kernels make of it."""
    score = placeholders(FUNCTIONS[name])
    text = score_ir.serialized(score)
    read = score_ir.function(text, "f")
    assert str(read) == "f" and score_ir.function(text, "f") is read
    random, sizes = np.random.default_rng(0), (2, 4, 16, 16)
    arrays = [[jnp.asarray(random.uniform(0.5, 2, x.shape), x.dtype) for x in scores.floats(score)],
              [jnp.asarray(random.integers(0, 2, x.shape), x.dtype) for x in scores.integers(score)]]
    s = jnp.asarray(random.normal(size=sizes, scale=3), jnp.float32)
    pairs = scores.tile(*sizes[:2], *[jnp.arange(16, dtype=jnp.int32)] * 2)
    found, wanted = (scores.value_and_slope(x.filled(*arrays), s, pairs) for x in (read, score))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert traced.why_not(read) == traced.why_not(score) == ()
    assert traced.fields(read) == traced.fields(score) and traced.is_additive(read) == traced.is_additive(score)


def test_a_text_says_what_is_computed_and_nothing_else():
    def times(factor):
        return score_ir.serialized(placeholders(lambda score, *_: score * factor))
    assert times(2.0) == times(2.0) != times(3.0)
    program = ("from pallas_flash import scores\nfrom torch_bridge.direct import score_ir\n"
               "print(score_ir.serialized(scores.checked(lambda score, batch, head, i, j: score * 2.0)))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == times(2.0), "in another process, written elsewhere"


@pytest.mark.parametrize("function, primitive", [
    (lambda score, *_: jnp.round(score), "round"),
    (lambda score, batch, head, *_: score * jnp.take(jnp.arange(4.0), head), "gather")])
def test_what_is_told_of_an_enumeration_has_no_text(function, primitive):
    """RoundingMethod is an IntEnum: it became an int, which the process that compiles did not take."""
    with pytest.raises(score_ir.UnserializableError, match=f"'{primitive}' is told"):
        score_ir.serialized(placeholders(function))


def test_the_key_of_a_plan_is_a_hash_of_the_text():
    def request(factor):
        operands, numbers = operator_call(*(x.detach() for x in qkv(Q, KV, KV, dtype=BF16)))
        name = torch_bridge.flash.scoring.named(lambda score, *_: score * factor, operands.query).name
        problem = attention.problem_of(operands, numbers._replace(score=name))
        assert problem.score_ir not in repr(problem) and name in repr(problem)
        return Request(problem, "forward", FORWARD.gpu, {})
    assert request(2.0) == request(2.0) and request(2.0).key == request(2.0).key != request(3.0).key
    assert Request.of(request(2.0).text) == request(2.0)


def step(case, tensors, arrays, douts):
    keywords = {name: x for name, x in RULES[case].items() if name != "sinks"}
    out, lse = torch_bridge.flash_attention(*tensors, score=MADE[case](*arrays), return_lse=True, **keywords)
    dout, dlse = douts[0].to(out.dtype), torch.where(lse == -torch.inf, 0, douts[1].to(lse.dtype))
    return [out, lse, *torch.autograd.grad((out, lse), [*tensors, *(x for x in arrays if x.requires_grad)],
                                           (dout, dlse))]


@pytest.mark.parametrize("learns", [False, True], ids=["", "learns"])
@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients(launched, case, learns):
    """The backward is launched, too, where no array of the function has a gradient."""
    torch.manual_seed(0)
    tensors = [x.detach().requires_grad_() for x in qkv(Q, KV, KV, dtype=BF16)]
    arrays = [(torch.rand(shape) + 0.5).requires_grad_(learns) for shape in CASES[case][2]]
    douts = torch.randn(Q).double(), torch.randn(Q[:3]).double()
    found = step(case, tensors, arrays, douts)
    assert launched == (["forward"] if learns and arrays else BOTH)
    wide, given = ([x.detach().double().requires_grad_(x.requires_grad) for x in xs] for xs in (tensors, arrays))
    keywords = {name: x for name, x in RULES[case].items() if name != "sinks"}
    out, lse = truth(case, *wide, *given, **keywords)
    exact = [out, lse, *torch.autograd.grad((out, lse), [*wide, *(x for x in given if x.requires_grad)], (
        douts[0].to(BF16).double(), torch.where(lse == -torch.inf, 0, douts[1])))]
    for a, b in zip(found, exact, strict=True):
        a, b = (x.detach().double().masked_fill(x == -torch.inf, 0) for x in (a, b))
        assert (a - b).norm() < 2e-2 * max(b.norm().item(), 1.0)


def test_eager_calls_are_launched_whatever_the_numbers_are(launched):
    """Another table of the same shape is read, and nothing is made anew; also behind what knows repeated calls."""
    q, k, v = (x.detach() for x in qkv(Q, KV, KV, dtype=BF16))
    outs = [torch_bridge.flash_attention(q, k, v, score=pf.ALiBi(torch.full((H,), slope))) for slope in (0.1, 2.0, 0.1)]
    assert launched == ["forward"] * 3 and torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])
    assert len(attention._directs) == 1
    for _ in range(3):
        found = torch_bridge.flash_attention(q, k, v, score=leaky, is_causal=True)
    wide = [x.double() for x in (q, k, v)]
    wanted, _ = truth("plain", *wide, is_causal=True)
    torch.testing.assert_close(found.double(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("make", [
    lambda: pf.ALiBi(torch.ones(H + 1)), lambda: pf.ALiBi(torch.ones(H - 1)),
    lambda: pf.RelativeBias(torch.ones(H - 1, 5)),
    lambda: pf.RelativeBias(torch.ones(H, 5), offset=torch.ones(7, dtype=torch.int32))],
    ids=["more heads", "fewer", "table", "offsets"])
def test_arrays_of_other_sizes_are_errors(launched, make):
    """Regression: the function that is launched does not ask for its sizes, and read the last number for the others."""
    q, k, v = (x.detach() for x in qkv(Q, KV, KV, dtype=BF16))
    for call in (torch_bridge.flash_attention, torch_bridge.explain_flash_attention):
        with pytest.raises(ValueError, match=r"must be of the .* of query"):
            call(q, k, v, score=make())
    assert launched == []


def test_under_the_compiler(launched, quiet):
    tensors = qkv(Q, KV, KV, dtype=BF16)

    def attend(q, k, v):
        return torch_bridge.flash_attention(q, k, v, score=leaky, is_causal=True)
    graphs, found = graphs_of(attend, *tensors)
    operators = torch.ops.pallas_flash
    assert graphs == [[operators.attention_direct.default], [operators.attention_backward_direct.default]]
    out = attend(*tensors)
    for a, b in zip(found, (out, *torch.autograd.grad(out, tensors, torch.ones_like(out))), strict=True):
        assert torch.equal(a, b)
    assert launched == BOTH * 2


def test_what_cannot_be_told_goes_through_dlpack_and_explain_says_so(launched):
    def looping(score, *_):
        return jax.lax.fori_loop(0, 3, lambda _, x: 0.5 * x, score)
    q, k, v = (x.detach() for x in qkv(Q, KV, KV, dtype=BF16))
    torch_bridge.report(reset=True)
    out = torch_bridge.flash_attention(q, k, v, score=looping)
    torch.testing.assert_close(out, torch_bridge.flash_attention(q, k, v, scale=0.125 * q.shape[3]**-0.5),
                               atol=2e-2, rtol=2e-2)
    assert launched == ["forward"]
    reason = "the process that compiles is not told of this score function: "
    assert reason in torch_bridge.explain_flash_attention(q, k, v, score=looping)
    (row,) = (row for row in torch_bridge.report() if "score=looping" in row.problem)
    assert any(reason in text for text in row.reasons)
    said = torch_bridge.explain_flash_attention(q, k, v, score=leaky)
    assert "path: direct" in said and "'hopper'" in said


def test_other_gpus_go_through_dlpack(launched, monkeypatch):
    monkeypatch.setattr(attention, "gpu_of", lambda device: A100)
    q, k, v = (x.detach() for x in qkv(Q, KV, KV, dtype=BF16))
    torch_bridge.flash_attention(q, k, v, score=leaky)
    assert launched == []
    said = torch_bridge.explain_flash_attention(q, k, v, score=leaky)
    assert "kernels of a score function for compute capability 9.0 alone" in said


def test_lengths_have_plans_of_their_own(launched):
    """A function may know of no positions beyond the call's."""
    for length in (5, 6, 7, 9):
        q, k, v = (x.detach() for x in qkv((2, H, length, 8), *[(2, 2, length, 8)] * 2, dtype=BF16))
        torch_bridge.flash_attention(q, k, v, score=leaky, is_causal=True)
    assert {key[0].q_len for key in attention._directs} == {5, 6, 7, 9} and L < S
