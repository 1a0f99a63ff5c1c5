"""Partial results: merged over the keys they are those of one call, and float32 whatever the dtype."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bridge.problems import TORCH, UNIT, assert_within_budget, heads_inside, operator_call, qkv, results
from torch_bridge import ops, partial_attention, partial_attention_backward

Q, KV, SPLIT = (2, 4, 6, 8), (2, 2, 11, 8), 5
CAUSAL = torch.ones(6, 11, dtype=torch.bool).tril(5)
SPOTS = torch.rand(2, 1, 6, 11, generator=torch.Generator().manual_seed(0)) > 0.4
MASKS = {"full": None, "causal": CAUSAL, "mask": SPOTS}


def arguments(kind, keys):
    """The keywords of a call on a slice of the keys."""
    if kind == "causal":
        return dict(is_causal=True, causal_offset=5 - keys.start)
    return dict(attn_mask=None if MASKS[kind] is None else MASKS[kind][..., keys])


def merged(parts):
    """out and logsumexp of all keys, from those of parts of them."""
    total = torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)
    return sum(out * (lse - total).exp()[..., None] for out, lse in parts), total


def halves(k, v):
    return [(keys, k[:, :, keys], v[:, :, keys]) for keys in (slice(0, SPLIT), slice(SPLIT, KV[2]))]


def by_parts(q, k, v, dout, kind, **keywords):
    """out and the gradients of attention over two sets of keys."""
    parts = halves(k, v)
    out, lse = merged([partial_attention(q, k, v, **arguments(kind, keys), **keywords) for keys, k, v in parts])
    terms = [partial_attention_backward(dout, q, k, v, out, lse, **arguments(kind, keys), **keywords)
             for keys, k, v in parts]
    assert {x.dtype for x in (out, lse, *terms[0])} == {torch.float64 if q.dtype == torch.float64 else torch.float32}
    dq, dk, dv = zip(*terms, strict=True)
    return out, sum(dq), torch.cat(dk, 2), torch.cat(dv, 2)


@pytest.mark.parametrize("kind, dtype, device", [
    *((kind, torch.float64, "cpu") for kind in MASKS),
    *(("causal", dtype, "cpu") for dtype in UNIT if dtype != torch.float64),
    *(pytest.param(kind, torch.bfloat16, "cuda", marks=pytest.mark.gpu) for kind in ("full", "causal"))])
def test_merged_over_the_keys_they_are_those_of_one_call(kind, dtype, device):
    tensors = [x.to(dtype) for x in qkv(Q, KV, KV, dtype=torch.float64)]
    keywords = dict(enable_gqa=True, scale=0.7)
    dout = torch.randn(Q, dtype=torch.float64).to(dtype)
    truth = results(TORCH, [x.detach().double().requires_grad_() for x in tensors], dout, MASKS[kind], **keywords)
    theirs = results(TORCH, [x.detach().requires_grad_() for x in tensors], dout, MASKS[kind], **keywords)
    parts = by_parts(*(x.detach().to(device) for x in (*tensors, dout)), kind, **keywords)
    ours = [x.to("cpu", dtype) for x in parts]
    assert_within_budget(ours, theirs, truth, UNIT[dtype])
    if dtype == torch.float64:
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_they_are_differentiable():
    """Merged by autograd: through out and through logsumexp."""
    def attend(q, k, v):
        return merged([partial_attention(q, k, v, enable_gqa=True) for _, k, v in halves(k, v)])[0]
    tensors = qkv((1, 2, 3, 4), (1, 1, KV[2], 4), (1, 1, KV[2], 4), dtype=torch.float64)
    assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)
    half = [x.detach().bfloat16().requires_grad_() for x in tensors]
    for grad, x in zip(torch.autograd.grad(attend(*half).sum(), half), half, strict=True):
        assert grad.dtype == x.dtype == torch.bfloat16


def test_terms_of_gradients_have_no_derivative():
    q, k, v = qkv(Q, Q, Q, dtype=torch.float64)
    out, lse = partial_attention(q.detach(), k.detach(), v.detach())
    terms = partial_attention_backward(torch.ones_like(out), q, k, v, out, lse)
    with pytest.raises(RuntimeError, match="partial_attention_backward has no derivative"):
        terms[0].sum().backward()


def test_a_query_without_keys():
    q, k, v = (x.detach() for x in qkv(Q, Q, Q))
    out, lse = partial_attention(q, k, v, is_causal=True, causal_offset=-2)
    assert (out[:, :, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all() and lse[:, :, 2:].isfinite().all()
    for term in partial_attention_backward(torch.ones_like(out), q, k, v, out, lse, is_causal=True, causal_offset=-2):
        assert term.isfinite().all()
    out, lse = partial_attention(q, k[:, :, :0], v[:, :, :0])
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_weights_err_by_what_float32_loses_of_a_large_logsumexp():
    """Scores are exact products of integers; the reference point alone would be off by up to four times the limit."""
    q, k = (torch.randint(-30, 30, (1, 2, 64, 16)).double() for _ in range(2))
    v, dout, scale = torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16), 2.7
    s = q @ k.mT * scale
    lse, weights = s.logsumexp(-1), s.softmax(-1)
    assert lse.max() > 1e4
    _, _, dv = partial_attention_backward(dout, q.float(), k.float(), v, (weights @ v.double()).float(), lse.float(),
                                          scale=scale)
    lost = (lse.float().double() - lse).abs()[..., None]
    size = weights.mT @ dout.double().abs()
    error, limit = (dv.double() - weights.mT @ dout.double()).abs(), (lost * weights).mT @ dout.double().abs()
    assert (error <= limit + 2**-20 * size + 1e-30).all()
    assert (limit > 2**-18 * size).any(), "nothing is lost: the scores are too small"


# --- contracts -------------------------------------------------------------------------------------------------------


def test_opcheck(quiet):
    tests = ("test_schema", "test_faketensor")
    operands, numbers = operator_call(*(x.detach().bfloat16() for x in qkv(Q, KV, KV)), causal_offset=5)
    call = (*operands, *numbers._replace(partial=True))
    torch.library.opcheck(ops.attention, (*call, True), test_utils=tests)
    out, stats = ops.attention(*call, True)
    torch.library.opcheck(ops.attention_backward, (*call, out, stats[:, :, 0], torch.randn_like(out), None,
                                                   [True] * 3 + [False] * 2), test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_fake_results_are_like_the_real_ones(dtype):
    tensors = [heads_inside(x.to(dtype)).detach() for x in qkv(Q, KV, KV)]

    def step(q, k, v):
        out, lse = partial_attention(q, k, v, enable_gqa=True)
        return out, lse, *partial_attention_backward(out.to(dtype), q, k, v, out, lse, enable_gqa=True)
    with FakeTensorMode() as mode:
        fake = step(*map(mode.from_tensor, tensors))
    for a, b in zip(fake, step(*tensors), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_compile_without_a_break(quiet):
    q, k, v = (x.detach() for x in qkv(Q, KV, KV))

    def step(q, k, v):
        out, lse = partial_attention(q, k, v, enable_gqa=True, is_causal=True)
        return out, *partial_attention_backward(2 * out, q, k, v, out, lse, enable_gqa=True, is_causal=True)
    for a, b in zip(torch.compile(step, backend="aot_eager", fullgraph=True)(q, k, v), step(q, k, v), strict=True):
        assert torch.equal(a, b)


X, LSE = torch.zeros(Q), torch.zeros(Q[:3])


@pytest.mark.parametrize("call, error, message", [
    (lambda: partial_attention(X, X, X, torch.zeros(6, 6)), RuntimeError, "must be boolean"),
    (lambda: partial_attention(X[0], X[0], X[0]), RuntimeError, r"must be \(batch, heads, length, dim\)"),
    (lambda: partial_attention(X, X[:1], X), RuntimeError, r"one batch size.*key\.shape=\(1, 4, 6, 8\)"),
    (lambda: partial_attention(X, X[:, :2], X, enable_gqa=True), RuntimeError, "as many heads in key as in value"),
    (lambda: partial_attention(X, X[:, :2], X[:, :2]), RuntimeError, "pass enable_gqa=True"),
    (lambda: partial_attention(X, X, X, causal_offset=1), ValueError, "causal_offset needs is_causal=True"),
    (lambda: partial_attention(X, X, X, is_causal=True, causal_offset=1.0), TypeError, "causal_offset must be int"),
    (lambda: partial_attention_backward(X, X, X, X, X, LSE.bfloat16()), RuntimeError,
     r"logsumexp must have .*float32 and .*got .*bfloat16"),
    (lambda: partial_attention_backward(X, X, X, X, X[..., :4], LSE), RuntimeError,
     r"out must have shape \(2, 4, 6, 8\)"),
    (lambda: partial_attention_backward(X.half(), X, X, X, X, LSE), RuntimeError, "grad_out must have"),
    (lambda: partial_attention_backward(None, X, X, X, X, LSE), TypeError, "grad_out must be a Tensor, not NoneType"),
])
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
