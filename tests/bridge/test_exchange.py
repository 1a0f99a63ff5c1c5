"""How each kind of tensor crosses: shared (asserted by pointer), copied, or refused; and the docs' table of that."""

import re
import types
from pathlib import Path

import jax
import pytest
import torch

import torch_bridge
from bridge.problems import OURS, TORCH, heads_inside, operator_call
from torch_bridge import exchange, programs, views
from torch_bridge.arguments import PerArray
from torch_bridge.rules import Rule

B, H, L, E = 2, 4, 16, 32
SHAPE = (B, H, L, E)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def contiguous(device):
    return torch.randn(SHAPE, device=device)


def packed(device):
    return torch.randn(B, L, 3, H, E, device=device)[:, :, 1].transpose(1, 2)


def misaligned(device):
    return torch.randn(B * H * L * E + 1, device=device)[1:].view(SHAPE)


def negative(device):
    return torch._neg_view(contiguous(device))


# What stands for key and value, and for query unless it is the second of a pair.
ROWS = {
    "(B, H, L, E) contiguous": (contiguous, "shared"),
    "(B, H, L, E) view of (B, L, H, E) storage": (lambda d: heads_inside(contiguous(d)), "shared"),
    "part of a batch, `x[1:]`": (lambda d: torch.randn(B + 1, H, L, E, device=d)[1:], "shared"),
    "one head or one position, any storage order": (
        lambda d: torch.randn(B, L, 1, E, device=d).transpose(1, 2), "shared"),
    "a tensor that requires grad": (lambda d: contiguous(d).requires_grad_(), "shared"),
    "slice of packed QKV": (packed, "copied"),
    "expanded, stride 0": (lambda d: torch.randn(B, 1, L, E, device=d).expand(SHAPE), "copied"),
    "(L, B, H, E) storage, B > 1": (lambda d: torch.randn(L, B, H, E, device=d).permute(1, 2, 0, 3), "copied"),
    "(B, H, E, L) storage": (lambda d: torch.randn(B, H, E, L, device=d).mT, "copied"),
    "misaligned: not a multiple of 256 bytes (64 on a CPU)": (misaligned, "copied"),
    "negative bit set": (negative, "copied"),
    "key and value in another storage order than query": (
        lambda d: (heads_inside(contiguous(d)), contiguous(d)), "copied"),
    "sparse, or nested and not jagged": (lambda d: contiguous(d).to_sparse(), "RuntimeError"),
    "on another device": (lambda d: contiguous("meta"), "RuntimeError"),
}


@pytest.fixture
def crossings(monkeypatch):
    """The addresses at which JAX saw tensors, in order, and those of the arrays that came back."""
    seen, returned = [], []
    importer, exporter = exchange._arrays, exchange._tensors

    def spy(tensors, where):
        arrays = importer(tensors, where)
        seen.extend(array.unsafe_buffer_pointer() for array in arrays)
        return arrays

    def spy_back(arrays, *others):
        returned.extend(array.unsafe_buffer_pointer() for array in arrays)
        return exporter(arrays, *others)
    monkeypatch.setattr(exchange, "_arrays", spy)
    monkeypatch.setattr(exchange, "_tensors", spy_back)
    return seen, returned


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("row", ROWS)
def test_how_a_tensor_crosses(row, device, crossings):
    make, how = ROWS[row]
    x = make(device)
    others, query = x if isinstance(x, tuple) else (x, x)
    if how == "RuntimeError":
        key = torch.randn(SHAPE, device=device)
        with pytest.raises(RuntimeError):
            OURS(query, key, key)
        return
    out = OURS(query, others, others)
    seen, returned = crossings
    assert [pointer == others.data_ptr() for pointer in seen[1:]] == [how == "shared"] * 2
    assert all(pointer % exchange.ALIGNMENT[device] == 0 for pointer in seen)
    assert returned[0] == out.data_ptr()
    assert f"key: {'shared' if how == 'shared' else 'copied: '}" in torch_bridge.explain(query, others, others)
    theirs = TORCH(query.clone(), others.clone(), others.clone())  # torch's kernels for GPUs need aligned tensors
    torch.testing.assert_close(out, theirs, rtol=1e-4, atol=1e-4)


def test_the_table_in_the_documentation_is_this_one():
    text = (Path(__file__).parents[2] / "docs" / "torch_bridge.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| (shared|copied|RuntimeError)\b[^|]*\|$", text, re.MULTILINE)
    assert dict(rows) == {name: how for name, (_, how) in ROWS.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("inside", [False, True], ids=["BHLE", "BLHE"])
def test_a_training_step_shares_everything(device, inside, crossings):
    q, k, v = (heads_inside(contiguous(device).requires_grad_()) if inside else contiguous(device).requires_grad_()
               for _ in range(3))
    out = OURS(q, k, v, is_causal=True)
    dout = torch.empty_like(out).normal_()
    grads = torch.autograd.grad(out, (q, k, v), dout)
    seen, returned = crossings
    pointers = [x.data_ptr() for x in (q, k, v)]
    assert seen == [*pointers, *pointers, out.data_ptr(), dout.data_ptr()]  # lse stays with JAX
    assert [returned[0], *returned[2:]] == [out.data_ptr(), *(grad.data_ptr() for grad in grads)]
    assert f"layout {'BLHD' if inside else 'BHLD'}" in torch_bridge.explain(q, k, v)


@pytest.mark.parametrize("layout, shape", [("BHLD", (2, 8, 512, 64)), ("BLHD", (2, 512, 8, 64))])
def test_nothing_is_moved_around_the_hopper_kernels(layout, shape):
    """The programs of a training step in either storage order, as XLA gets them; their profile is a GPU test."""
    import jax
    import jax.numpy as jnp

    from pallas_flash import device, masks, spec
    x, stats = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct((2, 8, 2, 512), jnp.float32)
    problem = spec.AttentionSpec.of(x, x, x, layout=layout, mask=masks.Full() & masks.Causal(0))
    where = jax.devices("cpu")[0]
    rule = Rule(left=None, right=0, offset=0, ends_aligned=False, given=())
    program = programs.Program(problem, rule, "hopper", where)
    needs = PerArray(query=True, key=True, value=True, bias=False, score_floats=False)
    given = programs.Given(needs, has_dout=True, has_dstats=False)
    functions = [(programs.forward(program)[True], (x, x, x)),
                 (programs.backward(program)[given], (x, x, x, x, x, stats))]
    for function, arguments in functions:
        with device.assume(device.H100):
            text = function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        operations = set(re.findall(r"= \"?stablehlo\.(\w+)", text))
        assert "custom_call" in operations
        assert not operations & {"transpose", "copy", "concatenate", "pad", "slice", "gather", "reverse"}, operations


def test_grouped_and_broadcast_heads_are_not_repeated(crossings):
    q, k = torch.randn(SHAPE), torch.randn(B, 1, L, E)
    OURS(q, k, k)
    OURS(q, k, k, enable_gqa=True)
    assert crossings[0] == [q.data_ptr(), k.data_ptr(), k.data_ptr()] * 2


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_are_shared_and_never_expanded(kind, crossings):
    q = torch.randn(SHAPE)
    mask = torch.rand(B, 1, L, L) > 0.3 if kind == "bool" else torch.randn(B, 1, L, L)
    OURS(q, q, q, mask)
    OURS(q, q, q, mask.expand(SHAPE[:3] + (L,)))
    assert crossings[0] == [*[q.data_ptr()] * 3, mask.data_ptr()] * 2
    assert "attn_mask: shared" in torch_bridge.explain(q, q, q, mask)


def test_an_expanded_cotangent_is_copied():
    q = torch.randn(SHAPE, requires_grad=True)
    OURS(q, q, q).sum().backward()
    reference = q.detach().requires_grad_()
    TORCH(reference, reference, reference).sum().backward()
    torch.testing.assert_close(q.grad, reference.grad, rtol=1e-4, atol=1e-4)


def test_float64_does_not_switch_jax_to_64_bits():
    import jax
    before = jax.config.jax_enable_x64
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert OURS(x, x, x).dtype == torch.float64 and jax.config.jax_enable_x64 == before
    assert jax.numpy.zeros(()).dtype == (torch.float64 if before else "float32")


def test_the_jax_device_is_the_one_with_torchs_number(monkeypatch):
    """Both runtimes number the devices that CUDA_VISIBLE_DEVICES leaves them; JAX's `id` counts those of all hosts."""
    import jax
    devices = [types.SimpleNamespace(id=8 + i, local_hardware_id=i, platform="gpu") for i in (1, 0)]
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: devices)
    of = exchange.jax_device.__wrapped__
    assert [of(torch.device("cuda", i)).id for i in (0, 1)] == [8, 9] and of(torch.device("cuda")).id == 8
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES"):
        of(torch.device("cuda", 2))


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(exchange, "_MAX_PLANS", 3)
    for length in range(1, 6):
        x = torch.randn(1, 1, 4, 4).expand(length, -1, -1, -1).contiguous()
        exchange.plan_for(*operator_call(x, x, x, scale=1.0))
    assert len(exchange._plans) <= 3


def test_the_public_import_is_the_same(monkeypatch):
    q = torch.randn(SHAPE)
    expected = OURS(q, q, q)
    monkeypatch.setattr(views.compat, "_import_capsule", None)
    assert torch.equal(OURS(q, q, q), expected)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_cpu_call_waits_for_its_results_before_it_drops_its_tensors(monkeypatch, interrupted):
    """Views own nothing: what JAX still reads must not be freed, nor kept after JAX has read it."""
    waits, wait = [], jax.block_until_ready

    def recorded(results):
        waits.append(results)
        if interrupted and len(waits) == 1:
            raise KeyboardInterrupt
        return wait(results)
    monkeypatch.setattr(jax, "block_until_ready", recorded)
    q = torch.ones(1, 1, 8, 8)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            OURS(q, q, q)
    else:
        OURS(q, q, q)
    assert len(waits) == 1 + interrupted and not exchange._interrupted


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_fallback_warns_when_a_call_is_planned(monkeypatch, needs_grad):
    """Once a reason, with the caller's line (regression: PyTorch's own, from within autograd), and not in `explain`: a
    GPU with kernels that take no float64.
    """
    from pallas_flash import FallbackWarning, device, dispatch
    monkeypatch.setattr(device, "of", lambda _: device.H100)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(exchange, "_plans", {})
    q, mask = torch.randn(SHAPE, dtype=torch.float64), torch.ones(L, L, dtype=torch.bool)
    q.requires_grad_(needs_grad)
    assert "not 'hopper': needs bfloat16, float16 or float32" in torch_bridge.explain(q, q, q, mask)
    with pytest.warns(FallbackWarning, match="dtype is float64") as found:
        OURS(q, q, q, mask)
    assert len(found) == 1 and found[0].filename == __file__
    OURS(q, q, q, mask[:1])  # another plan, the same reason
