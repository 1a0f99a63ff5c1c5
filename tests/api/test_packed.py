"""Packed sequences against one sequence at a time, in float64; the bounds of their mask against brute force."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import (
    Causal,
    Dense,
    Full,
    Mask,
    PrefixLM,
    UnsupportedError,
    Window,
    autodiff,
    check_mask,
    device,
    dropout,
    explain,
    flash_attention,
)
from pallas_flash.masks import InBounds
from pallas_flash.packed import Packed, Packing
from pallas_flash.spec import AttentionSpec
from tests.agreement import normal
from tests.api.test_masks import DIRECTIONS, Grid, HostDense, classified_all, is_sound

pytestmark = pytest.mark.usefixtures("small_tiles")

Q_STARTS, KV_STARTS = (0, 10, 10, 22, 25, 37), (0, 14, 20, 26, 26, 41)  # one has no queries, one has no keys
TOKENS = 40, 43  # and the last of each are padding
HEADS, KV_HEADS, DIM = 4, 2, 8


def packed_keep(rule: Mask, alignment: str, boundaries: tuple, tokens: tuple) -> np.ndarray:
    """(queries, keys): which pairs attend, one sequence at a time."""
    keep = np.zeros(tokens, bool)
    for (q_start, q_stop), (kv_start, kv_stop) in zip(*map(itertools.pairwise, boundaries)):
        q_len, kv_len = q_stop - q_start, kv_stop - kv_start
        q_pos = np.arange(q_len)[:, None] + (kv_len - q_len if alignment == "last" else 0)
        keep[q_start:q_stop, kv_start:kv_stop] = rule.keep(q_pos, np.arange(kv_len)[None, :])
    return keep


# The mask -------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Chunks(Mask):
    """A class of a user: a query attends to the keys of its own chunk, `offset` positions further on."""

    size: int
    offset: Any = 0

    def keep(self, q_pos, kv_pos):
        return (q_pos + self.offset) // self.size == kv_pos // self.size

    def moved(self, q_lo, kv_lo):
        assert isinstance(kv_lo, int) and kv_lo % self.size == 0
        return Chunks(self.size, self.offset + q_lo)


RULES = [(Full(), "first"), (Causal(), "first"), (Causal(), "last"), (Causal(1) & Window(left=2), "last"),
         (Window(1, 2, -1), "first"), (PrefixLM(2), "last"), (Chunks(3), "last")]
SQUARE, WIDE = Grid(9, 9, 2, 3), Grid(7, 11, 3, 2)


def random_boundaries(rng: np.random.Generator, count: int, tokens: int) -> np.ndarray:
    """(count, 5): of four sequences, some of them empty, with padding or without."""
    end = np.where(rng.random(count) < 0.5, tokens, rng.integers(0, tokens + 1, count))
    inner = np.sort(rng.integers(0, tokens + 1, (count, 3)), axis=1)
    return np.concatenate([np.zeros((count, 1), int), np.minimum(inner, end[:, None]), end[:, None]], axis=1)


def masks_of(rule: Mask, alignment: str, q_starts: np.ndarray, kv_starts: np.ndarray, grid: Grid) -> Packed:
    """A stack of canonical masks, made as calls make them."""
    row = lambda tokens: jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32)
    spec = AttentionSpec.of(row(grid.q_len), row(grid.kv_len), row(grid.kv_len))
    return jax.jit(jax.vmap(lambda *starts: Packing(*starts, None, None, alignment).mask(
        rule, spec, batched=False).canonical()))(q_starts, kv_starts)


@pytest.mark.parametrize(("grid", "equal"), [(SQUARE, True), (WIDE, False)], ids=["equal", "different"])
@pytest.mark.parametrize(("rule", "alignment"), RULES, ids=str)
def test_tiles_are_classified_soundly(rule, alignment, grid, equal):
    """And exactly, where sequences have as many queries as keys and the tiles that they need form one interval."""
    rng = np.random.default_rng(0)
    q_starts = random_boundaries(rng, 200, grid.q_len)
    kv_starts = q_starts if equal else random_boundaries(rng, 200, grid.kv_len)
    stack, inside = masks_of(rule, alignment, q_starts, kv_starts, grid), InBounds(grid.q_len, grid.kv_len)
    for direction in DIRECTIONS:
        found = classified_all(stack & inside, grid, direction)
        for classes, *starts in zip(found, q_starts.tolist(), kv_starts.tolist(), strict=True):
            keep = packed_keep(rule, alignment, starts, (grid.q_len, grid.kv_len))
            truth = grid.brute_force(HostDense(keep) & inside, direction)
            assert is_sound(classes, truth), f"{starts} from {direction} tiles:\n{classes}\n{truth}"
            if equal and rule in (Full(), Causal()):
                assert np.array_equal(classes, truth), f"{starts} from {direction} tiles:\n{classes}\n{truth}"


@pytest.mark.parametrize(("rule", "alignment"), [(Causal(), "first"), (Window(3, 0), "last")], ids=str)
def test_the_checker_passes(rule, alignment):
    starts = np.array([[0, 5, 5, 9, 18]]), np.array([[0, 8, 9, 9, 22]])
    stack = masks_of(rule, alignment, *starts, Grid(20, 23, 1, 1))
    check_mask(jax.tree.map(lambda x: x[0], stack), 20, 23)


# Attention ------------------------------------------------------------------------------------------------------------

class Case(NamedTuple):
    rule: Mask = Causal()
    alignment: str = "first"
    softcap: float | None = None
    dropout_rate: float = 0.0
    deterministic: bool = False
    boundaries: tuple = (Q_STARTS, KV_STARTS)
    tokens: tuple = TOKENS


SAME = (0, 13, 13, 30, 38)
CASES = {
    "causal": Case(boundaries=(SAME, SAME), tokens=(40, 40), deterministic=True),
    "last": Case(alignment="last"),
    "window": Case(Window(5, 2), softcap=2.0, dropout_rate=0.4),
}
KEY = np.array([7, 9], np.uint32)


def arrays(case: Case) -> list[np.ndarray]:
    """query, key, value and the cotangents of out and lse, float64."""
    (q, k), dim = case.tokens, (HEADS, DIM)
    return [normal(0, q, *dim, dtype=float), *(normal(i, k, KV_HEADS, DIM, dtype=float) for i in (1, 2)),
            normal(3, q, *dim, dtype=float), normal(4, HEADS, q, dtype=float)]


def one_by_one(case: Case, q, k, v, dout, dlse):
    """out, lse, dq, dk, dv from the formulas, head by head, one sequence after the other."""
    out, lse, dq, dk, dv = np.zeros_like(q), np.full_like(dlse, -np.inf), *map(np.zeros_like, (q, k, v))
    keep = packed_keep(case.rule, case.alignment, case.boundaries, case.tokens)
    ends = zip(*map(itertools.pairwise, case.boundaries))
    for h, (rows, columns) in ((h, tuple(slice(*end) for end in pair)) for pair in ends for h in range(HEADS)):
        attend, qh, kh, vh = keep[rows, columns], q[rows, h], k[columns, h // 2], v[columns, h // 2]
        s, slope = qh @ kh.T / np.sqrt(DIM), 1.0
        if case.softcap is not None:
            s = np.tanh(s / case.softcap)
            s, slope = s * case.softcap, 1 - s * s
        p = np.where(attend, np.exp(s), 0)
        total = p.sum(1)
        p = p / np.where(total, total, 1)[:, None]
        place = np.arange(rows.start, rows.stop)[:, None], np.arange(columns.start, columns.stop)[None, :]
        kept = dropout.factor(case.dropout_rate) * np.asarray(
            dropout.keep(jnp.asarray(KEY), 0, h, *place, case.dropout_rate))
        out[rows, h], lse[h, rows] = (p * kept) @ vh, np.log(total, where=total > 0, out=np.full_like(total, -np.inf))
        dp = dout[rows, h] @ vh.T * kept
        ds = p * (dp - (out[rows, h] * dout[rows, h]).sum(1)[:, None] + dlse[h, rows][:, None]) * slope / np.sqrt(DIM)
        dq[rows, h] = ds @ kh
        dk[columns, h // 2] += ds.T @ qh
        dv[columns, h // 2] += (p * kept).T @ dout[rows, h]
    return out, lse, dq, dk, dv


def run(case: Case, implementation: str, starts, q, k, v, dout, dlse):
    """What `one_by_one` gives, from one packed call; `starts` are cu_seqlens_q and cu_seqlens_kv."""
    call = functools.partial(
        flash_attention, mask=case.rule, alignment=case.alignment, softcap=case.softcap, return_lse=True,
        dropout_rate=case.dropout_rate, dropout_rng=jnp.asarray(KEY) if case.dropout_rate else None,
        deterministic=case.deterministic, implementation=implementation, cu_seqlens_q=starts[0],
        cu_seqlens_kv=starts[1])
    (out, lse), vjp = jax.vjp(call, *map(jnp.asarray, (q, k, v)))
    return out, lse, *vjp((jnp.asarray(dout), jnp.asarray(dlse, lse.dtype)))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_as_one_call_per_sequence(name, implementation, x64):
    case = CASES[name]
    starts = (SAME, None) if case.boundaries[0] is SAME else case.boundaries
    found, wanted = run(case, implementation, starts, *arrays(case)), one_by_one(case, *arrays(case))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-10, atol=1e-10, err_msg=name)


def test_nan_stays_in_its_document(x64):
    """NaN in one document and in the padding, cotangents too, changes no bit of the others."""
    case = CASES["causal"]
    clean = arrays(case)
    poisoned = [np.array(x) for x in clean]
    for x in poisoned:
        axis = x.shape.index(40)
        np.moveaxis(x, axis, 0)[np.r_[13:30, 38:40]] = np.nan
    others = np.r_[0:13, 30:38]
    for a, b in zip(*(run(case, "xla", (SAME, None), *given) for given in (clean, poisoned)), strict=True):
        axis = a.shape.index(40)
        a, b = (np.moveaxis(np.asarray(x), axis, 0) for x in (a, b))
        assert np.isfinite(a[others]).all()
        assert np.array_equal(a[others], b[others])
        assert np.array_equal(a[38:], b[38:])  # padding: 0, or -inf


Q, K = normal(0, 40, HEADS, DIM), normal(1, 40, KV_HEADS, DIM)


def test_other_boundaries_compile_nothing():
    """Neither inside jit, where they are traced, nor outside, from lists, NumPy or JAX arrays; nor do other maxima."""
    traces = []

    @jax.jit
    def call(starts):
        traces.append(starts)
        return flash_attention(Q, K, K, mask=Causal(), cu_seqlens_q=starts, implementation="xla")

    first = call(np.array([0, 13, 30, 38]))
    again = call(np.array([0, 0, 40, 40]))
    assert len(traces) == 1
    before = autodiff.forward._cache_size()
    for starts in ([0, 13, 30, 38], np.array([0, 0, 40, 40]), jnp.array([0, 13, 30, 38])):
        longest = int(np.diff(np.asarray(starts)).max())
        found = flash_attention(Q, K, K, mask=Causal(), cu_seqlens_q=starts, max_seqlen_q=longest,
                                max_seqlen_kv=longest + 1, implementation="xla")
        wanted = again if starts[1] == 0 else first
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert autodiff.forward._cache_size() <= before + 1


def test_traced_boundaries_that_fall_or_exceed_count_as_the_nearest_that_do_not():
    call = jax.jit(lambda starts: flash_attention(Q, K, K, cu_seqlens_q=starts, implementation="xla"))
    found, wanted = call(jnp.array([3, 9, 5, 99])), call(jnp.array([0, 9, 9, 40]))
    assert np.array_equal(found, wanted)
    small = flash_attention(Q, K, K, cu_seqlens_q=jnp.array([0, 9, 9, 40], "uint8"), implementation="xla")
    np.testing.assert_allclose(small, wanted, atol=1e-6)


def test_no_sequences_are_padding_alone():
    out, lse = flash_attention(Q, K, K, cu_seqlens_q=[0], return_lse=True, implementation="xla")
    assert not np.asarray(out).any()
    assert (np.asarray(lse) == -np.inf).all()


@pytest.mark.virtual
def test_rows_of_several_devices():
    """Each device packs documents of its own; under `vmap`, each row."""
    starts = np.array([[0, 13, 30, 38], [0, 0, 21, 40]], np.int32)
    q, k = np.stack([Q, Q[::-1]]), np.stack([K, K[::-1]])
    call = lambda q, k, starts: flash_attention(q, k, k, mask=Causal(), cu_seqlens_q=starts, implementation="xla")
    mesh = jax.make_mesh((2,), ("row",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    row = jax.sharding.PartitionSpec("row")
    sharded = jax.jit(jax.shard_map(lambda *x: call(*(one[0] for one in x))[None], mesh=mesh, in_specs=row,
                                    out_specs=row))(q, k, starts)
    mapped = jax.jit(jax.vmap(call))(q, k, starts)
    for i in range(2):
        alone = call(q[i], k[i], jnp.asarray(starts[i]))
        np.testing.assert_allclose(sharded[i], alone, atol=1e-6)
        np.testing.assert_allclose(mapped[i], alone, atol=1e-6)


def test_explain():
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    with device.assume(device.H100):
        said = explain(shape(40, 4, 64), shape(44, 2, 64), shape(44, 2, 64), mask=Causal(), alignment="last",
                       cu_seqlens_q=shape(6, dtype=jnp.int32), cu_seqlens_kv=shape(6, dtype=jnp.int32))
    assert "mask=Packed(Causal(), sequences=5, alignment=last)" in said
    assert "implementation='hopper'" in said


@dataclasses.dataclass(frozen=True)
class Lower(Mask):
    """A class without `moved`."""

    def keep(self, q_pos, kv_pos):
        return q_pos >= kv_pos


WRONG = {
    "not from 0": (dict(cu_seqlens_q=[1, 40]), "must start at 0, never fall, and end at the number of tokens"),
    "falls": (dict(cu_seqlens_q=np.array([0, 30, 20, 40])), r"cu_seqlens_q=\[0, 30, 20, 40\], tokens=40"),
    "too long": (dict(cu_seqlens_q=[0, 41]), "cumulative sum"),
    "one of many": (dict(cu_seqlens_q=[0] * 20 + [3, 2]), r"\[\.\.\., 3, 2, \.\.\.\] at index 21"),
    "keys too long": (dict(cu_seqlens_q=[0, 40], cu_seqlens_kv=[0, 50]), r"cu_seqlens_kv=\[0, 50\], tokens=40"),
    "axes": (dict(cu_seqlens_q=[[0, 40]]), r"must have shape \(sequences \+ 1,\), got cu_seqlens_q.shape=\(1, 2\)"),
    "floats": (dict(cu_seqlens_q=np.array([0.0, 40.0])), "cu_seqlens_q must hold integers"),
    "other sequences": (dict(cu_seqlens_q=[0, 40], cu_seqlens_kv=[0, 3, 40]), "of the same sequences"),
    "maximum": (dict(cu_seqlens_q=[0, 25, 40], max_seqlen_q=24), "at least the length of the longest sequence, 25"),
    "maximum of keys": (dict(cu_seqlens_q=[0, 25, 40], max_seqlen_kv=24), "max_seqlen_kv must be at least"),
    "maximum's type": (dict(cu_seqlens_q=[0, 40], max_seqlen_q=40.0), "max_seqlen_q must be a Python integer"),
    "alone": (dict(max_seqlen_kv=3), "max_seqlen_kv goes with cu_seqlens_q"),
    "alignment alone": (dict(alignment="last"), "alignment goes with cu_seqlens_q"),
    "alignment": (dict(cu_seqlens_q=[0, 40], alignment="bottom"), "alignment must be one of"),
    "ids": (dict(cu_seqlens_q=[0, 40], segment_ids=[[0] * 40]), "segment_ids must be None with cu_seqlens_q"),
    "lengths": (dict(cu_seqlens_q=[0, 40], kv_lengths=3), "kv_lengths must be None"),
    "batch": (dict(query=Q[None], key=K[None], value=K[None], cu_seqlens_q=[0, 40]), "without the batch axis"),
    "only queries": (dict(key=K[:30], value=K[:30], cu_seqlens_q=[0, 30]), "cu_seqlens_kv must be given"),
    "arrays": (dict(cu_seqlens_q=[0, 40], mask=Dense(np.ones((40, 40), bool))), "mask must hold numbers, no arrays"),
    "moved": (dict(cu_seqlens_q=[0, 40], alignment="last", mask=Lower()), r"must define moved\(q_lo, kv_lo\)"),
    "placeholder": (dict(cu_seqlens_q=jax.ShapeDtypeStruct((3,), jnp.int32)), "Packed.cu_seqlens_q must hold values"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        flash_attention(**(dict(query=Q, key=K, value=K) | given))
    assert not isinstance(error.value, UnsupportedError)


def test_names_of_flash_attn_lead_to_ours():
    with pytest.raises(TypeError, match="Pass cu_seqlens_kv="):
        flash_attention(Q, K, K, cu_seqlens_k=[0, 40])
