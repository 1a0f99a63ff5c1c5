"""`flash_attention`: what SDPA's arguments cannot say, against a textbook in float64; and `combine`."""

import re
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_bridge
from bridge import textbook
from bridge.problems import UNIT, assert_within_budget, heads_inside, operator_call, qkv
from torch_bridge import (
    combine,
    explain_flash_attention,
    flash,
    flash_attention,
    flash_attn,
    kv_cache,
    ops,
    programs,
    scaled_dot_product_attention,
)

B, H, G, L, S, E = 2, 4, 2, 5, 7, 8
Q, KV = (B, H, L, E), (B, G, S, E)
LENGTHS, OFFSETS = torch.tensor([4, 7]), torch.tensor([2, -1], dtype=torch.int32)
IDS = (torch.tensor([[0, 0, 1, 1, -1], [3, 3, 3, 7, 7]]), torch.tensor([[0, 1, 1, 1, -1, 0, 0], [3, 7, 7, 7, 7, 7, 9]]))
SPOTS = torch.rand(B, 1, L, S, generator=torch.Generator().manual_seed(0)) > 0.3

CASES = {
    "aligned at the ends": dict(is_causal=True, causal_offset=S - L, softcap=0.7, scale=1.5),
    "window": dict(window=(-1, 3), causal_offset=1),
    "lengths": dict(q_lengths=torch.tensor([5, 3], dtype=torch.int32), kv_lengths=LENGTHS),
    "no keys": dict(kv_lengths=torch.tensor([0, 3])), "segments": dict(segment_ids=IDS),
    "mask": dict(attn_mask=SPOTS, softcap=2.0, is_causal=True),
    "all": dict(attn_mask=SPOTS, is_causal=True, causal_offset=OFFSETS, window=(3, 0), kv_lengths=LENGTHS,
                segment_ids=IDS, softcap=1.1),
}


def leaves(tensors, dtype):
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def step(function, tensors, douts, **keywords):
    """out, lse and the gradients of query, key, value and, if there are, sinks and attn_mask, of both results."""
    query, key, value, *others = tensors
    named = dict(zip(("sinks", "attn_mask"), others, strict=False))
    out, lse = function(query, key, value, **named, **keywords)
    dout, dlse = (x.to(y.dtype) for x, y in zip(douts, (out, lse), strict=True))
    dlse = torch.where(lse == -torch.inf, 0, dlse)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), tensors, (dout, dlse))]


def ours(query, key, value, **keywords):
    return flash_attention(query, key, value, return_lse=True, **keywords)


def moved(x, device):
    if isinstance(x, tuple):
        return tuple(moved(part, device) for part in x)
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x


def check(dtype, *others, device="cpu", **keywords):
    """Ours in a dtype against the textbook in float64: out, lse and every gradient."""
    tensors = leaves([*qkv(Q, KV, KV, dtype=torch.float64, requires_grad=False), *others], dtype)
    douts = torch.randn(Q, dtype=torch.float64), torch.randn(Q[:3], dtype=torch.float64)
    truth = step(textbook.attention, leaves(tensors, torch.float64), douts, **keywords)
    theirs = step(textbook.attention, tensors, douts, **keywords)
    found = [x.cpu() for x in step(ours, *(moved(tuple(x), device) for x in (tensors, douts)),
                                   **{name: moved(x, device) for name, x in keywords.items()})]
    assert found[0].dtype == dtype and found[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for a, b in zip(found[2:], tensors, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(found[1] == -torch.inf, truth[1] == -torch.inf)
    for results in (truth, theirs, found):
        results[1] = results[1].masked_fill(results[1] == -torch.inf, 0)
    wide = [x.to(dtype) for x in found]  # lse and gradients of sinks, compared in the dtype of the rest
    assert_within_budget([wide[i] for i in (0, 2, 3, 4)], [theirs[i] for i in (0, 2, 3, 4)],
                         [truth[i] for i in (0, 2, 3, 4)], UNIT[dtype])
    for i in (1, *range(5, len(found))):
        assert_within_budget([wide[i]], [theirs[i]], [truth[i]], UNIT[dtype], size=8.0)


@pytest.mark.parametrize("case", CASES)
def test_every_rule(case):
    check(torch.float64, **CASES[case])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    check(dtype, torch.randn(H), **CASES["all"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_every_rule_on_a_gpu(asked, case):
    check(torch.bfloat16, torch.randn(H), device="cuda", **CASES[case])


def test_sinks_and_a_bias():
    """lse of the statistics leaves out what a bias far from 0 was anchored at: `row_anchor` adds it."""
    bias = torch.randn(B, 1, L, S, dtype=torch.float64)
    bias[0] -= 4e3
    bias[1, :, 2] = -torch.inf
    check(torch.float64, torch.tensor([0.3, -2.0, 1.0, 5.0]), bias, is_causal=True, causal_offset=1)
    check(torch.float32, torch.tensor([-torch.inf, -2.0, 1.0, 5.0]), bias[:1].clamp(min=-2.0))


def test_a_row_that_sees_nothing_but_its_sink():
    q, k, v = qkv(Q, KV, KV)
    sinks = torch.tensor([1.0, 2.0, 3.0, -torch.inf], requires_grad=True)
    out, lse = flash_attention(q, k, v, sinks=sinks, kv_lengths=torch.tensor([0, 0]), return_lse=True)
    assert (out == 0).all() and torch.equal(lse, sinks.detach()[None, :, None].expand(B, H, L))
    grads = torch.autograd.grad(out.sum() + lse[:, :3].sum(), (q, k, v, sinks))
    assert all((x == 0).all() for x in grads[:3]) and torch.equal(grads[3], torch.tensor([10.0, 10.0, 10.0, 0.0]))


def test_no_keys_and_no_queries():
    for q_len, kv_len in ((L, 0), (0, S)):
        q, k, v = qkv((B, H, q_len, E), (B, G, kv_len, E), (B, G, kv_len, E))
        out, lse = flash_attention(q, k, v, is_causal=True, return_lse=True, kv_lengths=LENGTHS)
        assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all() and lse.shape == q.shape[:3]
        assert all((x == 0).all() for x in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)))


def test_nan_in_padding_stays_there():
    q, k, v = qkv(Q, KV, KV, requires_grad=False)
    poisoned = [x.clone() for x in (k, v)]
    for x in poisoned:
        x[0, :, 4:] = torch.nan
    clean, found = (flash_attention(q, *x, kv_lengths=LENGTHS, window=(4, None)) for x in ((k, v), poisoned))
    assert torch.equal(clean, found)


def test_other_values_compile_nothing(monkeypatch):
    """Lengths, offsets and ids are data: another step of a decoder finds its program."""
    traced = []
    rule_mask = programs.Rule.mask
    monkeypatch.setattr(programs.Rule, "mask", lambda *args: traced.append(1) or rule_mask(*args))
    q, k, v = qkv((B, H, 1, E), KV, KV, requires_grad=False)
    for length in range(1, S):
        lengths = torch.tensor([length, S])
        out = flash_attention(q, k, v, is_causal=True, causal_offset=lengths - 1, kv_lengths=lengths)
        expected, _ = textbook.attention(q, k, v, is_causal=True, causal_offset=lengths - 1, kv_lengths=lengths)
        torch.testing.assert_close(out, expected)
        if length == 1:
            after_first = len(traced)
    assert len(traced) == after_first > 0


def test_dropout_is_that_of_the_mask():
    """A window drops what the same pairs as a boolean mask drop, with lse untouched."""
    q, k, v = qkv(Q, KV, KV)
    keep = textbook.kept((B, L, S), "cpu", window=(2, 1))
    results = []
    for rule in (dict(window=(2, 1)), dict(attn_mask=keep)):
        torch.manual_seed(3)
        results.append(flash_attention(q, k, v, dropout_p=0.4, return_lse=True, **rule))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(results[0][1], flash_attention(q, k, v, window=(2, 1), return_lse=True)[1])


# --- contracts -------------------------------------------------------------------------------------------------------


def everything(q, k, v, sinks, bias, lengths):
    return flash_attention(q, k, v, sinks=sinks, attn_mask=bias, kv_lengths=lengths, is_causal=True, window=(4, None),
                           causal_offset=lengths - 5, softcap=2.0, return_lse=True)


def given(dtype=torch.float32):
    return [*qkv(Q, KV, KV, (H,), (1, H, L, S), dtype=dtype), LENGTHS]


def test_compile_without_a_break(quiet):
    args = given()
    run = torch.compile(everything, backend="aot_eager", fullgraph=True)
    found, expected = run(*args), everything(*args)
    douts = [torch.randn_like(x) for x in expected]
    for a, b in zip(*((*x, *torch.autograd.grad(x, args[:5], douts)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck(quiet):
    tests = ("test_schema", "test_faketensor")
    q, k, v, _, bias, lengths = (x.detach() for x in given())
    operands, numbers = operator_call(q, k, v, bias=bias)
    operands = operands._replace(kv_lengths=lengths.int(), offsets=OFFSETS, q_ids=IDS[0].int(), kv_ids=IDS[1].int())
    call = (*operands, *numbers._replace(left=3, right=0, softcap=1.5))
    torch.library.opcheck(ops.attention, (*call, True), test_utils=tests)
    torch.library.opcheck(ops.row_anchor, call, test_utils=tests)
    out, stats = ops.attention(*call, True)
    torch.library.opcheck(ops.attention_backward, (*call, out, stats, torch.randn_like(out), None, [True] * 5),
                          test_utils=tests)


def test_fake_results_are_like_the_real_ones():
    args = [heads_inside(x).detach() if x.dim() == 4 else x.detach() for x in given(torch.bfloat16)]
    with FakeTensorMode() as mode:
        fake = everything(*map(mode.from_tensor, args))
    for a, b in zip(fake, everything(*args), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_vmap():
    """Over an axis of everything that has one, run-time values among it."""
    args = [torch.stack([x.detach(), x.detach().flip(0)]) for x in given()]
    found = torch.vmap(everything)(*args)
    for i in range(2):
        for a, b in zip(found, everything(*(x[i] for x in args)), strict=True):
            torch.testing.assert_close(a[i], b)


def test_explain():
    q, k, v, sinks, *_ = given()
    text = explain_flash_attention(q, k, v, window=(2, 0), kv_lengths=LENGTHS, sinks=sinks, return_lse=True)
    assert "Window(left=2, right=0) & InBounds(kv_len=int32[2x1])" in text and "implementation='xla'" in text
    assert "key: shared, not copied" in text and text.endswith("sinks: one more pass over out, by PyTorch")
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        explain_flash_attention(q, k, v, causal=True)
    meta = torch.empty(2, 4, 5, 8, device="meta")
    for call in (explain_flash_attention, torch_bridge.explain, torch_bridge.explain_flash_attn_with_kvcache):
        with pytest.raises(RuntimeError, match=r"a CPU or a CUDA device.*got tensors on meta"):
            call(meta, meta, meta)


def test_the_python_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "torch_bridge.md").read_text()
    part = text[text.index("## What SDPA's arguments cannot say"):text.index("## Two ways to the kernels")]
    names = {"torch_bridge": torch_bridge}
    for block in re.findall(r"^```python\n(.*?)^```", part, re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert "k_cache" in names and "sequences" in names


def test_autocast_casts_as_it_does_for_sdpa():
    q, k, v = qkv(Q, KV, KV, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = flash_attention(q, k, v, window=(2, 0), sinks=torch.zeros(H), return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


# --- combine ---------------------------------------------------------------------------------------------------------


def test_combined_parts_are_the_whole():
    q, k, v = qkv(Q, (B, H, 6, E), (B, H, 6, E), dtype=torch.float64)

    def by_parts(q, k, v):
        parts = [flash_attention(q, k[:, :, at:at + 2], v[:, :, at:at + 2], is_causal=True,
                                 causal_offset=torch.full((B,), -at), return_lse=True) for at in range(0, 6, 2)]
        return combine(*zip(*parts, strict=True))
    whole = flash_attention(q, k, v, is_causal=True, return_lse=True)
    douts = [torch.randn_like(x) for x in whole]
    ours, expected = ([*x, *torch.autograd.grad(x, (q, k, v), douts)] for x in (by_parts(q, k, v), whole))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_combined_rows_that_see_nothing():
    out, lse = torch.zeros(1, 2, 3, 4, requires_grad=True), torch.full((1, 2, 3), -torch.inf, requires_grad=True)
    found = combine([out, out], [lse, lse])
    assert (found[0] == 0).all() and (found[1] == -torch.inf).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(found[0].sum(), (out, lse)))


# --- errors ----------------------------------------------------------------------------------------------------------

X, K = torch.zeros(Q), torch.zeros(KV)


@pytest.mark.parametrize("keywords, error, message", [
    (dict(causal_offset=1), ValueError, "causal_offset needs is_causal=True or a window"),
    (dict(is_causal=True, causal_offset=1.0), TypeError, "causal_offset must be int, a Tensor or None"),
    (dict(window=3), TypeError, r"window must be \(left, right\)"),
    (dict(window=(1.5, None)), TypeError, "each an int or None"),
    (dict(window=(-3, 2)), ValueError, "needs -left <= right"),
    (dict(window=(-1, 2), is_causal=True), ValueError, "needs -left <= right, which is at most 0 with is_causal"),
    (dict(softcap=0.0), ValueError, "softcap must be a number .* Pass None"),
    (dict(sinks=torch.zeros(3)), RuntimeError, r"sinks must be floats of shape \(heads,\) = \(4,\)"),
    (dict(sinks=[0.0] * 4), TypeError, "sinks must be a Tensor"),
    (dict(kv_lengths=[1, 2]), TypeError, "kv_lengths must be a Tensor of integers, not list"),
    (dict(kv_lengths=torch.zeros(B)), RuntimeError, r"kv_lengths must hold integers of shape \(batch,\) = \(2,\)"),
    (dict(q_lengths=torch.zeros(3, dtype=torch.int32)), RuntimeError, "q_lengths must hold integers of shape"),
    (dict(segment_ids=torch.zeros(B, L, dtype=torch.int32)), RuntimeError, r"a tuple \(q_ids, kv_ids\)"),
    (dict(segment_ids=(IDS[0], IDS[0])), RuntimeError, r"segment_ids\[1\] must hold integers .*\(2, 7\)"),
    (dict(segment_ids=(IDS[0], IDS[1] + 2**31)), ValueError, r"segment_ids\[1\] must be below 2\^31"),
    *(({name: value}, TypeError, f"^{name} must be bool, got {name}={value!r}. Pass True or False")
      for name in ("is_causal", "return_lse", "deterministic") for value in ("no", 1, None)),
    *(({name: np.ones(3)}, error, rf"{name}'? must be .*, got {name}=array\(\[1., 1., 1.\]\). Pass")
      for name, error in (("scale", TypeError), ("dropout_p", TypeError), ("softcap", ValueError))),
    (dict(window=(-1, 0)), ValueError, "None, not -1, is no limit"),
    (dict(causal=True), TypeError, r"flash_attention\(\) got an unexpected .*'causal'. Use is_causal=True. It takes"),
    (dict(window_size=(3, 0)), TypeError, r"Use window=\(left, right\)\. It takes query, .* and deterministic"),
    (dict(score_mod=abs), TypeError, r"Use score=\.\.\.\. It takes"),
    (dict(attn_mask=np.ones((L, S), bool)), TypeError, r"attn_mask must be a Tensor or None, got .*ndarray\. Pass"),
])
def test_errors(keywords, error, message):
    with pytest.raises(error, match=message):
        flash_attention(X, K, K, **keywords)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "length"), [("q_lengths", L), ("kv_lengths", S)])
def test_a_mask_given_as_lengths(name, length, dtype):
    """What is written in the message means what was meant; "Cast, reshape or move it" did not."""
    marked = torch.arange(length) < torch.tensor([[2], [4]])
    given, tensors = marked.to(dtype), qkv(Q, KV, KV, requires_grad=False)
    with pytest.raises(RuntimeError, match=rf"{name} must hold integers of shape .* is a mask: pass") as error:
        flash_attention(*tensors, **{name: given})
    said = re.search(r"pass attn_mask=(.*), or segment_ids .*, (\(.*\)) counts them", str(error.value))
    attn_mask, counted = said.groups()
    wanted = flash_attention(*tensors, **{name: marked.sum(1)})
    for found in (dict(attn_mask=eval(attn_mask, {"x": given})), {name: eval(counted, {"x": given})}):
        torch.testing.assert_close(flash_attention(*tensors, **found), wanted)


@pytest.mark.parametrize(("function", "keywords", "others"), [
    (flash_attention, flash.Keywords, ("query", "key", "value", "return_lse", "unknown", "return")),
    (flash_attn.flash_attn_with_kvcache, kv_cache.Keywords, ("q", "k_cache", "v_cache", "unknown", "return"))])
def test_keywords_that_are_handed_on_are_those_of_the_function(function, keywords, others):
    """A type checker says what `Keywords` has too much, not what it lacks."""
    hints = get_type_hints(function)
    for name in others:
        del hints[name]
    assert get_type_hints(keywords) == hints


@pytest.mark.parametrize("function", [flash_attention, explain_flash_attention, scaled_dot_product_attention])
def test_arrays_of_other_libraries(function):
    """The message named scaled_dot_product_attention, whichever was called, and said nothing of what to do."""
    found = r"query, key, value must be Tensors, got type\(query\)=ndarray, .*torch.from_dlpack\(array\)"
    with pytest.raises(TypeError, match=found):
        function(*[np.ones((B, H, L, E))] * 3)
    with pytest.raises(TypeError, match=r"type\(query\)=list, .*=Tensor\. torch.tensor"):
        function([[1.0]], K, K)


def test_errors_of_shapes():
    with pytest.raises(RuntimeError, match=r"must be \(batch, heads, length, dim\), got query.shape=\(4, 5, 8\)"):
        flash_attention(X[0], K[0], K[0])
    with pytest.raises(RuntimeError, match="must divide the number of heads"):
        flash_attention(X, torch.zeros(B, 3, S, E), torch.zeros(B, 3, S, E))
    with pytest.raises(ValueError, match="of the same parts, at least one, got 0 and 0"):
        combine([], [])
    with pytest.raises(ValueError, match="each lse must have the shape of its out"):
        combine([X.transpose(1, 2)], [X[..., 0]])
