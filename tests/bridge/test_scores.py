"""Score functions of JAX in PyTorch: `flash_attention(score=...)`, against a textbook in torch and against JAX."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pallas_flash as pf
from bridge import textbook
from bridge.problems import UNIT, assert_within_budget, heads_inside, operator_call, qkv
from torch_bridge import (
    exchange,
    explain_flash_attention,
    flash_attention,
    ops,
    programs,
    report,
    score_names,
    sharding,
)
from torch_bridge.direct import attention

ROOT = Path(__file__).parents[2]
B, H, G, L, S, E = 2, 4, 2, 5, 7, 8
Q, KV = (B, H, L, E), (B, G, S, E)
LINES = torch.tensor([[0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 2, 3]])


def leaky(score, batch, head, q_pos, kv_pos):
    return jnp.where(kv_pos < q_pos, jnp.maximum(score, 0.1 * score), score)


@dataclasses.dataclass(frozen=True)
class Fading(pf.Score):
    """Of examples/write_a_score.py, with a static number and a table of booleans."""

    half_lives: torch.Tensor
    gains: torch.Tensor
    lines: torch.Tensor
    shown: torch.Tensor
    base: float = 2.0

    def __call__(self, score, batch, head, q_pos, kv_pos):
        distance = abs(q_pos - kv_pos).astype(score.dtype)
        same_line = self.lines[batch, q_pos] == self.lines[batch, kv_pos]
        faded = score * self.power(-distance / self.half_lives[head]) + jnp.where(same_line, self.gains[head], 0)
        return jnp.where(self.shown[kv_pos], faded, -jnp.inf)

    def power(self, x):
        return self.base ** x


SHOWN = torch.tensor([True, True, False, True, True, True, True])


def fading(half_lives, gains):
    return Fading(half_lives, gains, LINES.to(gains.device), SHOWN.to(gains.device))


def fading_in_torch(s, b, h, q, k, half_lives, gains):
    lines, shown = LINES.to(s.device), SHOWN.to(s.device)
    faded = s * 2.0 ** (-(q - k).abs() / half_lives.to(s.dtype)[h])
    faded = faded + torch.where(lines[b, q] == lines[b, k], gains.to(s.dtype)[h], 0)
    return torch.where(shown[k], faded, -torch.inf)


def column(q, k, offset):
    return (k - q - offset + 2).clamp(0, 4)


OFFSETS = torch.tensor([1, -2])
CASES = {  # what makes the function of tensors, the same in torch, and the shapes of the tensors
    "plain": (lambda: leaky, lambda s, b, h, q, k: torch.where(k < q, torch.maximum(s, 0.1 * s), s), ()),
    "alibi": (lambda slopes: pf.ALiBi(slopes, offset=2), lambda s, b, h, q, k, slopes:
              s - slopes.to(s.dtype)[h] * (q + 2 - k).abs(), ((H,),)),
    "relative": (lambda table: pf.RelativeBias(table), lambda s, b, h, q, k, table:
                 s + table.to(s.dtype)[h, column(q, k, 0)], ((H, 5),)),
    "offsets": (lambda table: pf.RelativeBias(table, offset=OFFSETS.to(table.device)), lambda s, b, h, q, k, table:
                s + table.to(s.dtype)[h, column(q, k, OFFSETS.to(s.device)[b])], ((H, 5),)),
    "own": (fading, fading_in_torch, ((H,), (H,))),
}
RULES = {
    "plain": dict(is_causal=True, causal_offset=2, softcap=0.7), "alibi": dict(window=(3, 1)),
    "relative": dict(kv_lengths=torch.tensor([4, 7]), q_lengths=torch.tensor([5, 3])),
    "offsets": dict(attn_mask=torch.ones(B, 1, L, S, dtype=torch.bool).triu(-1), scale=0.3),
    "own": dict(is_causal=True, causal_offset=OFFSETS, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


def step(function, tensors, douts, **keywords):
    """out, lse and the gradients of all tensors, of both results."""
    out, lse = function(*tensors, **keywords)
    dout, dlse = (x.to(y.dtype) for x, y in zip(douts, (out, lse), strict=True))
    dlse = torch.where(lse == -torch.inf, 0, dlse)
    return [out.detach(), lse.detach().masked_fill(lse == -torch.inf, 0),
            *torch.autograd.grad((out, lse), tensors, (dout, dlse))]


def ours(case, query, key, value, *arrays, **keywords):
    return flash_attention(query, key, value, score=CASES[case][0](*arrays), return_lse=True, **keywords)


def truth(case, query, key, value, *arrays, **keywords):
    score = lambda s, *place: CASES[case][1](s, *place, *arrays)
    return textbook.attention(query, key, value, score=score, **keywords)


def given(case, dtype=torch.float64):
    """query, key, value and the arrays of a case."""
    arrays = [(torch.rand(shape).double() + 0.5).requires_grad_() for shape in CASES[case][2]]
    return [x.detach().to(dtype).requires_grad_() for x in (*qkv(Q, KV, KV, dtype=torch.float64), *arrays)]


def check(case, dtype, device="cpu", order=lambda x: x):
    """Ours in a dtype against the textbook in float64: out, lse and every gradient, those of the arrays too."""
    tensors = given(case, dtype)
    douts = torch.randn(Q, dtype=torch.float64), torch.randn(Q[:3], dtype=torch.float64)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    exact = step(functools.partial(truth, case), wide, douts, **RULES[case])
    theirs = step(functools.partial(truth, case), tensors, douts, **RULES[case])
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in RULES[case].items()}
    leaves = [order(x.detach().to(device)).requires_grad_() for x in tensors[:3]]
    leaves += [x.detach().to(device).requires_grad_() for x in tensors[3:]]
    found = step(functools.partial(ours, case), leaves, [x.to(device) for x in douts], **moved)
    for a, b in zip(found[2:], leaves, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    found = [x.cpu().to(dtype) for x in found]
    for a, b, c in zip(found, theirs, exact, strict=True):
        assert_within_budget([a], [b.to(dtype)], [c], UNIT[dtype], size=8.0)


@pytest.mark.parametrize("case", CASES)
def test_every_kind(case):
    check(case, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_storage(dtype):
    check("own", dtype, order=heads_inside)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_every_kind_on_a_gpu(asked, case):
    check(case, torch.bfloat16, device="cuda")


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.detach().numpy(), lambda x: jnp.asarray(x.detach().numpy())],
                         ids=["torch", "numpy", "jax"])
def test_it_is_what_jax_computes(make):
    q, k, v, half_lives, gains = (x.float().detach() for x in given("own"))
    arrays = [make(x) for x in (half_lives, gains, LINES, SHOWN)]
    found = flash_attention(q, k, v, score=Fading(*arrays), is_causal=True)
    with jax.default_device(jax.devices("cpu")[0]):
        score = Fading(*(jnp.asarray(x.numpy()) for x in (half_lives, gains, LINES, SHOWN)))
        expected = pf.flash_attention(*(jnp.asarray(x.numpy()) for x in (q, k, v)), mask=pf.Causal(), layout="BHLD",
                                      score=score)
    np.testing.assert_array_equal(found.numpy(), np.asarray(expected))


def test_the_bias_of_t5():
    embedding = torch.randn(8, H, requires_grad=True)
    q, k, v = (x.float() for x in given("plain"))
    out = flash_attention(q, k, v, scale=1.0, score=pf.RelativeBias.t5(embedding, bidirectional=True, max_distance=6))
    q, k, v, x = (jnp.asarray(x.detach().numpy()) for x in (q, k, v, embedding))

    def attend(x):
        return pf.flash_attention(q, k, v, scale=1.0, layout="BHLD",
                                  score=pf.RelativeBias.t5(x, bidirectional=True, max_distance=6))
    np.testing.assert_allclose(out.detach().numpy(), attend(x), atol=1e-6)
    (grad,) = torch.autograd.grad(out.sum(), embedding)
    np.testing.assert_allclose(grad.numpy(), jax.grad(lambda x: attend(x).sum())(x), atol=1e-5)


def test_other_arrays_compile_nothing(monkeypatch):
    programs.forward.cache_clear()
    exchange._plans.clear()
    made = []
    monkeypatch.setattr(exchange, "make_plan", lambda *args, make=exchange.make_plan: made.append(1) or make(*args))
    q, k, v, slopes = (x.float().detach() for x in given("alibi"))
    for factor in (1.0, 2.0, 3.0):
        out = flash_attention(q, k, v, score=pf.ALiBi(slopes * factor, offset=2))
        torch.testing.assert_close(out, truth("alibi", q, k, v, slopes * factor)[0])
    assert made == [1]


# --- names -----------------------------------------------------------------------------------------------------------


def times(factor):
    return lambda score, batch, head, q_pos, kv_pos: score * factor


def name(score):
    return score_names.name_of(score, (), False)


def test_a_name_is_what_is_computed():
    """Not how a function is called, nor where or how often it is written."""
    assert name(times(2.0)) == name(times(2.0)) == name(lambda s, b, h, i, j: s * 2.0)
    assert len({name(times(1.5)), name(times(2.0)), name(leaky), score_names.name_of(times(2.0), (), True)}) == 4


def test_what_a_function_is_differentiated_by_is_in_its_name():
    """`jax.custom_jvp` makes two functions of equal values; so does a table of numbers in the code, of equal shapes."""
    def ruled(factor):
        @jax.custom_jvp
        def square(x):
            return x * x
        square.defjvp(lambda x, t: (square(*x), factor * x[0] * t[0]))
        return lambda s, b, h, i, j: square(s)
    assert len({name(ruled(2.0)), name(ruled(1.0)), name(lambda s, b, h, i, j: s * s)}) == 3
    tables = [lambda s, b, h, i, j, n=n: s + jnp.asarray(np.arange(3000.0) % n, s.dtype)[j] for n in (7, 8)]
    assert name(tables[0]) != name(tables[1])
    x = torch.randn(1, 1, 3, 4, requires_grad=True)
    grads = [torch.autograd.grad(flash_attention(x, x, x, score=ruled(n)).sum(), x)[0] for n in (2.0, 1.0)]
    assert not torch.equal(*grads)


def test_another_process_has_the_same_names():
    program = ("from torch_bridge import score_names\n"
               "print(score_names.name_of(lambda s, b, h, i, j: s * 2.0, (), False))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT,
                          env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == name(times(2.0))


@dataclasses.dataclass(frozen=True)
class Scaled(pf.Score):
    by: torch.Tensor
    times: int = 1

    def __call__(self, score, batch, head, q_pos, kv_pos):
        return score * self.by[head] * self.times


def test_classes_and_shapes_are_in_the_name():
    kinds = [[score_names.ArrayKind(shape, "float")] for shape in ((4,), (8,))]
    names = {score_names.name_of(Scaled(torch.ones(4), n), kind, False) for n in (1, 2) for kind in kinds}
    made = score_names.from_fields(Scaled, [("times", 2)], ["by"], kinds[1], False)
    assert len(names) == 4 and made in names


FACTOR = 2.0


def by_factor(score, batch, head, q_pos, kv_pos):
    return score * FACTOR


def test_a_number_that_changes(monkeypatch):
    """What was named stays as it was: its backward is traced later."""
    q, k, v = (x.float() for x in given("plain"))
    outs = []
    for factor in (2.0, 3.0):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        outs.append(flash_attention(q, k, v, score=by_factor, softcap=3.7))
    for out, factor in zip(outs, (2.0, 3.0), strict=True):
        score = lambda s, *_, factor=factor: s * factor
        expected, _ = textbook.attention(q, k, v, score=score, softcap=3.7)
        for a, b in zip(torch.autograd.grad(out.sum(), (q, k)), torch.autograd.grad(expected.sum(), (q, k)),
                        strict=True):
            torch.testing.assert_close(a, b)


def test_a_graph_that_outlives_the_process(quiet, monkeypatch, tmp_path):
    class Model(torch.nn.Module):
        def forward(self, x):
            return flash_attention(x, x, x, score=times(0.7))
    x = torch.randn(1, 2, 6, 8)
    torch.export.save(torch.export.export(Model(), (x,)), tmp_path / "model.pt2")
    expected = Model()(x)
    monkeypatch.setattr(score_names, "_functions", {})  # as in another process
    score_names._name.cache_clear()
    exchange._plans.clear()
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    with pytest.raises(RuntimeError, match=r"hash of what it computes.*has not.*flash_attention\(\.\.\., score="):
        loaded(x)
    flash_attention(*[x.to("meta")] * 3, score=times(0.7))
    assert torch.equal(loaded(x), expected)


# --- contracts -------------------------------------------------------------------------------------------------------


class Biased(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.rand(H))

    def forward(self, q, k, v, lines):
        v = flash_attention(q, k, v, score=pf.ALiBi(self.slopes, offset=1))
        score = Fading(self.slopes + 1, self.slopes, lines[:, :L], SHOWN[:L], 3.0)
        return flash_attention(q, q, v, score=score, is_causal=True)


def same_results(run, plain, tensors, *others):
    found, expected = run(*tensors, *others), plain(*tensors, *others)
    for a, b in zip((found, *torch.autograd.grad(found.sum(), tensors)),
                    (expected, *torch.autograd.grad(expected.sum(), tensors)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_a_score_of_its_parameters(quiet, dynamic):
    model, tensors = Biased(), [x.float().detach().requires_grad_() for x in given("plain")]
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    same_results(lambda slopes, *args: run(*args), lambda slopes, *args: model(*args), [model.slopes, *tensors], LINES)


def test_compile_with_scores_from_outside(quiet):
    """torch.compile guards a closure by its code: another of the same code got the program of the first."""
    def attend(q, k, v, score):
        return flash_attention(q, k, v, score=score)
    tensors = [x.float().detach().requires_grad_() for x in given("plain")]
    run = torch.compile(attend, backend="aot_eager", fullgraph=True)
    scores = [times(0.5), times(3.0), pf.ALiBi(torch.rand(H)), pf.ALiBi(np.ones(H, np.float32)),
              pf.ALiBi(jnp.ones(H)), pf.ALiBi(2 * jnp.ones(H))]
    for score in (*scores, *scores):
        same_results(run, attend, tensors, score)


@dataclasses.dataclass(frozen=True)
class Static(pf.Score):
    table: torch.Tensor
    number: object

    def __call__(self, score, batch, head, q_pos, kv_pos):
        return score * (self.number[0] if isinstance(self.number, tuple) else self.number) * self.table[head]


@pytest.mark.parametrize("numbers", [(0.5, 3.0, 2.0), (2, 3, 4), ((0.5, 1), (3.0, 1), (2.0, 2))],
                         ids=["floats", "integers", "tuples"])
@pytest.mark.parametrize("is_within", [False, True], ids=["outside", "within"])
def test_compile_with_other_static_numbers(quiet, numbers, is_within):
    """From the second float on, torch.compile has one that stands for any of them, which was no constant."""
    def attend(q, k, v, table, given):
        return flash_attention(q, k, v, score=Static(table, given) if is_within else given)
    tensors, table = [x.float().detach().requires_grad_() for x in given("plain")], torch.rand(H)
    run = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for number in (*numbers, *numbers):
        same_results(run, attend, tensors, table, number if is_within else Static(table, number))


def test_a_score_that_is_written_in_the_compiled_function(quiet):
    def attend(q, k, v):
        return flash_attention(q, k, v, score=lambda score, *_: score * 0.25)
    tensors = [x.float().detach().requires_grad_() for x in given("plain")]
    same_results(torch.compile(attend, backend="aot_eager", fullgraph=True), attend, tensors)


def test_opcheck(quiet):
    q, k, v, half_lives, gains = (x.float().detach() for x in given("own"))
    operands, numbers = operator_call(q, k, v)
    scored = exchange.score_names.name_of(fading(half_lives, gains), [
        score_names.ArrayKind(tuple(x.shape), kind) for x, kind in
        ((half_lives, "float"), (gains, "float"), (LINES, "int"), (SHOWN, "bool"))], False)
    operands = operands._replace(score_floats=torch.cat((half_lives, gains)),
                                 score_integers=torch.cat((LINES.flatten(), SHOWN)).int())
    call, tests = (*operands, *numbers._replace(score=scored)), ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.attention, (*call, True), test_utils=tests)
    out, stats = ops.attention(*call, True)
    torch.library.opcheck(ops.attention_backward, (*call, out, stats, torch.randn_like(out), None, [True] * 5),
                          test_utils=tests)


def test_vmap():
    """A function asks for the number in the batch, so that calls run one by one."""
    tensors = [torch.stack([x.detach().float(), x.detach().float().flip(0)]) for x in given("own")]

    def attend(*args):
        return ours("own", *args)[0]
    found = torch.vmap(attend)(*tensors)
    for i in range(2):
        torch.testing.assert_close(found[i], attend(*(x[i] for x in tensors)))


def test_second_derivatives_and_forward_mode():
    tensors = given("own")
    tangents, dout = [torch.randn_like(x) for x in tensors], torch.randn(Q, dtype=torch.float64)
    results = []
    for function in (ours, truth):
        attend = lambda *args, function=function: function("own", *args)[0]
        grads = torch.autograd.grad(attend(*tensors), tensors, dout, create_graph=True)
        results.append([*torch.autograd.grad(grads, tensors, tangents),
                        torch.func.jvp(attend, tuple(x.detach() for x in tensors), tuple(tangents))[1]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_drops_the_same_weights():
    q, k, v = (x.float() for x in given("plain"))
    results = []
    for score in (None, times(1.0)):
        torch.manual_seed(5)
        results.append(flash_attention(q, k, v, score=score, dropout_p=0.4))
    torch.testing.assert_close(*results)


# --- which way, and errors -------------------------------------------------------------------------------------------


def test_the_reason_for_dlpack():
    def looping(score, *_):
        return jax.lax.fori_loop(0, 3, lambda _, x: 0.5 * x, score)
    q, k, v = (x.to(torch.bfloat16) for x in given("plain"))
    text = explain_flash_attention(q, k, v, score=looping, is_causal=True)
    assert "score=test_the_reason_for_dlpack.<locals>.looping" in text or "score=looping" in text
    assert "path: DLPack" in text
    operands, numbers = operator_call(q, k, v)
    for taken in (None, name(leaky)):
        assert attention.why_not(operands, numbers._replace(score=taken)) is None
    assert "is not told of this score function" in attention.why_not(operands, numbers._replace(score=name(looping)))
    report(reset=True)
    flash_attention(q, k, v, score=leaky)
    assert any("score=leaky" in row.problem for row in report())


def test_distributed_tensors_are_gathered():
    """A function asks for numbers of batch and head in the whole."""
    tensors = [SimpleNamespace(shape=shape, mesh=SimpleNamespace(shape=(2,))) for shape in (Q, KV, KV)]
    operands, numbers = operator_call(*tensors)
    assert len(sharding._splits(operands, numbers)) == 3
    assert sharding._splits(operands, numbers._replace(score=name(leaky))) == [sharding._Split(None)]


X, K = torch.zeros(Q), torch.zeros(KV)
held = torch.ones(H)


@pytest.mark.parametrize("score, message", [
    (abs, "score must be a function"), (torch.zeros(L, S), "Add an array to the scores as `bias`"),
    (lambda s, *_: s * held[0], "must not hold arrays"), (lambda s: s, "must take"),
    (lambda s, b, h, i, j: s if i > j else -s, "must work on traced scalars"),
    (lambda s, *_: None, "must return one floating-point number"),
    (pf.ALiBi(torch.ones(H + 1)), "ALiBi.slopes must be of the 4 heads of query"),
    (pf.ALiBi(torch.ones(H, device="meta")), "ALiBi.slopes must be a real tensor on the device of query, cpu"),
    (Scaled((torch.ones(H), torch.ones(H))), "Give each tensor a field of its own"),
])
def test_errors(score, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(X, K, K, score=score)


def test_tensors_in_a_score_are_for_the_bridge():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match=r"ALiBi.slopes must be a JAX or NumPy array.*torch_bridge\.flash_attention"):
        pf.flash_attention(x, x, x, score=pf.ALiBi(torch.ones(2)))
    with pytest.raises(ValueError, match=r"ALiBi.slopes must be a floating-point array \(q_heads,\), got torch.int64"):
        pf.ALiBi(torch.ones(2, dtype=torch.int64))
