"""The Hopper kernel of decoding against a cache: in Pallas' interpreter on small shapes, and on a GPU.

The oracle is the formula in float64 on the keys of each sequence alone; whatever else the cache holds is NaN. In the
interpreter blocks run one after the other, which its race detector does not know: it is asked about one block, whose
rings are those of all.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sanitizer
from agreement import assert_agree, normal
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # where the interpreter says whether it saw a race
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bench.decode import Problem
from pallas_flash import Causal, Full, Mask, PrefixLM, Window, autodiff, cache, device, paging, softmax
from pallas_flash.dispatch import get
from pallas_flash.filled import Filled
from pallas_flash.kernels.hopper import calls, defaults, launches, rules
from pallas_flash.kernels.hopper.schedule import DecodeSchedule
from pallas_flash.kernels.mosaic import batching, lanes
from pallas_flash.kernels.mosaic.call import partitioned
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.masks import ArrayField
from pallas_flash.sinks import with_sinks
from pallas_flash.spec import AttentionSpec, Operands, Results

EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-20}
REPETITIONS = 1000
CAUSAL = Causal()


@dataclasses.dataclass(frozen=True)
class Chunks(Mask):
    """A class of a user, without bounds."""

    size: int

    def keep(self, q_pos, kv_pos):
        return q_pos // self.size == kv_pos // self.size


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of sequences in a cache, and the queries at their ends."""

    lengths: tuple[int, ...]
    q_len: int = 1
    heads: tuple[int, int] = (4, 2)
    d: tuple[int, int] = (128, 128)
    capacity: int = 128
    page: int = 0  # positions of a page; 0: contiguous
    layout: str = "BLHD"
    dtype: str = "bfloat16"
    rule: Mask = CAUSAL
    mask: Mask | None = None  # the rule as a call gives it, if it holds arrays
    scale: float | None = None
    softcap: float | None = None
    bias: tuple[int, int] = (0, 0)  # its batch and heads; 0: there is none
    bias_dtype: str = "float32"
    least: float = -np.inf  # the bias of some keys, -inf or finfo.min; of a sequence or head, in turn, of all
    sinks: bool = False
    bad: tuple[int, ...] = ()  # how far before the last key of each sequence values are NaN, or infinite
    schedule: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # how it differs from the default

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def options(self) -> dict[str, Any]:
        return dict(mask=self.mask or self.rule, scale=self.scale, softcap=self.softcap)


def rows(case: Case) -> tuple[np.ndarray, ...]:
    """query, key and value of all positions, (batch, length, heads, dim)."""
    (q_heads, kv_heads), (d, d_v) = case.heads, case.d
    shapes = ((case.q_len, q_heads, d), (case.capacity, kv_heads, d), (case.capacity, kv_heads, d_v))
    return tuple(normal(seed, case.batch, *shape).astype(case.dtype) for seed, shape in enumerate(shapes))


def bias_of(case: Case) -> np.ndarray | None:
    """The bias of each key, (batch or 1, heads or 1, 1, capacity), `case.least` for a fifth of them."""
    if not case.bias[0]:
        return None
    shape = *case.bias, 1, case.capacity
    found = np.where(np.random.default_rng(9).random(shape) < 0.2, case.least, 2 * normal(9, *shape))
    if case.bias[1] > 1:
        found[-1, 1] = case.least
    return np.maximum(found, float(jnp.finfo(case.bias_dtype).min) if np.isfinite(case.least) else -np.inf
                      ).astype(case.bias_dtype)


def sinks_of(case: Case) -> np.ndarray | None:
    """A sink of each query head, (q_heads,), -inf for the last."""
    if not case.sinks:
        return None
    return np.append(3 * normal(11, case.heads[0] - 1), -np.inf).astype(np.float32)


def in_layout(case: Case, x: np.ndarray) -> np.ndarray:
    return x if case.layout == "BLHD" else x.swapaxes(1, 2)


def is_bad(case: Case) -> np.ndarray:
    """(batch, capacity): which values are not finite, of those that the sequences have."""
    back = np.array(case.lengths)[:, None] - 1 - np.arange(case.capacity)
    return np.isin(back, case.bad)


def stored(case: Case, k: np.ndarray, v: np.ndarray) -> cache.Cache:
    """The cache of these keys, with NaN past each length, and in pages of no sequence; missing pages have no entry."""
    past = np.arange(case.capacity) >= np.array(case.lengths)[:, None]
    if (bias := bias_of(case)) is not None:  # keys that no head sees
        k = np.where((bias == -np.inf).all(axis=(1, 2))[..., None, None], np.asarray(np.nan, k.dtype), k)
    v = np.where(is_bad(case)[..., None, None], np.asarray(np.inf if case.q_len % 2 else np.nan, v.dtype), v)
    k, v = (np.where(past[..., None, None], np.asarray(np.nan, x.dtype), x) for x in (k, v))
    if not case.page:
        return cache.Cache(in_layout(case, k), in_layout(case, v), case.lengths, None, case.layout)
    count = case.capacity // case.page
    number = case.batch * count
    table = np.random.default_rng(0).permutation(number + 3)[:number].reshape(case.batch, count)
    pages = []
    for x in (k, v):
        held = np.full((number + 3, case.page, *x.shape[2:]), np.nan, x.dtype)
        held[table] = x.reshape(case.batch, count, case.page, *x.shape[2:])
        pages.append(in_layout(case, held))
    missing = np.arange(count) * case.page >= np.array(case.lengths)[:, None]
    table = np.where(missing, np.where(np.arange(count) % 2, -1, number + 9), table)
    return cache.Cache(*pages, case.lengths, table, case.layout)


def exact(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """out (batch, q_len, q_heads, d_v), NaN where it is not finite, and lse (batch, q_heads, q_len) in float64."""
    q_heads, group, bias, sinks = case.heads[0], case.heads[0] // case.heads[1], bias_of(case), sinks_of(case)
    out = np.zeros((case.batch, case.q_len, q_heads, case.d[1]))
    lse = np.full((case.batch, q_heads, case.q_len), -np.inf)
    scale = case.d[0] ** -0.5 if case.scale is None else case.scale
    for b, length in enumerate(case.lengths):
        pos = length - case.q_len + np.arange(case.q_len)
        of_rule = (pos >= 0)[:, None] & case.rule.keep(np.maximum(pos, 0)[:, None], np.arange(length)[None])
        for head in range(q_heads) if length or case.sinks else ():
            keep, added = of_rule, 0.0
            if bias is not None:
                added = bias[b % len(bias), head % bias.shape[1], 0, :length].astype(np.float64)
                keep = keep & (added > -np.inf)
            query, key, value = (x.astype(np.float64) for x in (
                q[b, :, head], k[b, :length, head // group], v[b, :length, head // group]))
            s = scale * query @ key.T
            s = s if case.softcap is None else case.softcap * np.tanh(s / case.softcap)
            # A score added to finfo.min rounds to it, in float32 as in any implementation.
            s = np.where(np.broadcast_to(added < -1e30, keep.shape), added, s + added)
            s = np.where(keep, s, -np.inf)
            s = s if sinks is None else np.append(s, np.full((case.q_len, 1), sinks[head]), axis=1)
            m = s.max(axis=1, initial=-np.inf)
            m = np.where(np.isfinite(m), m, 0)
            p = np.exp(s - m[:, None])
            total = p.sum(axis=1)
            out[b, :, head] = p[:, :length] @ value / np.where(total > 0, total, 1)[:, None]
            with np.errstate(divide="ignore"):
                lse[b, head] = m + np.log(total)
            out[b, (keep & is_bad(case)[b, :length]).any(axis=1), head] = np.nan
    return out, lse


def assert_right(case: Case, out: Any, lse: Any, wanted: tuple[np.ndarray, np.ndarray]) -> None:
    """Each row within a unit in the last place of its type, relative to its norm; lse to five digits."""
    assert (out.dtype, lse.dtype) == (case.dtype, jnp.float32)
    found, want = in_layout(case, np.asarray(out, np.float64)), wanted[0]
    bad = np.isnan(want).any(axis=-1)
    assert not np.isfinite(found[bad]).any()
    found, want = found[~bad], want[~bad]
    errors = np.linalg.norm(found - want, axis=-1)
    limits = EPS[case.dtype] * np.linalg.norm(want, axis=-1)
    assert (errors <= limits).all(), (np.argwhere(~(errors <= limits))[:9].tolist(), np.nanmax(errors / limits))
    np.testing.assert_allclose(np.asarray(lse, np.float64), wanted[1], rtol=1e-5, atol=1e-5)


# -- in the interpreter ------------------------------------------------------------------------------------------------

INTERPRETED = {
    "a head over several blocks": Case((0, 130, 77), 3, d=(64, 40), capacity=140, layout="BHLD", dtype="float16",
                                       softcap=5.0, bad=(0,), schedule=dict(num_blocks=4, num_stages=2)),
    "pages and a window": Case((144, 16), 2, (2, 1), (72, 64), 144, 48, rule=Causal() & Window(left=40), scale=-0.2,
                               mask=Causal() & Window(left=np.array([40, 40])), bad=(0, 40, 41),
                               schedule=dict(num_blocks=1, num_stages=1)),
    "many sequences": Case((3, 0, 32, 9, 1), heads=(1, 1), d=(16, 8), capacity=32,
                           schedule=dict(num_blocks=2, block_kv=16)),
    # Outputs were 0 and lse -inf: the rounding of m_i unit was larger than any exponent that has a weight.
    "huge scores": Case((17, 48), 2, (2, 1), (16, 16), 48, scale=-1e25, schedule=dict(num_blocks=2, block_kv=16)),
    # No head has so many workers that two of them are of one block: in the interpreter these count at the same time.
    "two workers a block": Case((0, 130, 77), 2, d=(64, 32), capacity=144, page=48, layout="BHLD",
                                schedule=dict(num_blocks=4, num_stages=2, workers=2)),
    "sinks": Case((0, 130, 77), 3, d=(64, 40), capacity=140, layout="BHLD", dtype="float16", softcap=5.0, sinks=True,
                  schedule=dict(num_blocks=4, num_stages=2)),
    "a bias of each head, sinks, pages": Case((90, 144, 0), 2, (4, 2), (16, 16), 144, 16, scale=-0.2, bias=(3, 4),
                                              bias_dtype="bfloat16", sinks=True, bad=(3, 40, 41, 42, 43),
                                              schedule=dict(num_blocks=3, block_kv=48)),
    "a bias of all heads": Case((77, 20), heads=(6, 2), d=(64, 64), capacity=77, layout="BHLD", bias=(2, 1),
                                softcap=9.0, bad=tuple(range(9)), schedule=dict(num_blocks=1, num_stages=2)),
    "a bias of finfo.min": Case((70, 33), 2, (4, 1), (16, 16), 70, bias=(1, 4), least=float(np.finfo("float32").min),
                                schedule=dict(num_blocks=2, block_kv=32)),
    "four bands": Case((0, 130, 77), 3, d=(64, 40), capacity=140, layout="BHLD", dtype="float16", softcap=5.0,
                       sinks=True, bad=(0,), schedule=dict(num_blocks=4, num_stages=2, bands=4)),
    "two bands, pages, a bias": Case((90, 144, 0), 9, (4, 2), (16, 16), 144, 16, scale=-0.2, bias=(3, 4), sinks=True,
                                     bad=(3, 40, 41, 42, 43), schedule=dict(num_blocks=1, block_kv=96, bands=2)),
    "queries come ahead": Case((3, 0, 32, 9, 1), 2, (6, 2), (64, 8), capacity=32, layout="BHLD",
                               schedule=dict(num_blocks=2, block_kv=16, query_slots=2)),
    "queries come ahead, one block": Case((77, 60), 4, d=(72, 64), capacity=77, schedule=dict(
        num_blocks=1, num_stages=2, query_slots=1)),
    "a cluster for a head": Case((0, 130, 77), 3, (2, 1), d=(64, 40), capacity=140, layout="BHLD", dtype="float16",
                                 sinks=True, bad=(0,), schedule=dict(num_stages=2, cluster=2)),
    "more blocks of a cluster than tiles": Case((16, 40), 1, (4, 2), d=(64, 64), capacity=48, page=16,
                                                schedule=dict(block_kv=16, num_stages=2, cluster=4)),
    "combined late": Case((0, 130, 77), 2, (6, 2), d=(64, 64), capacity=144, page=48, sinks=True, schedule=dict(
        num_blocks=5, num_stages=2, combines_late=True, query_slots=2)),
    "two workers a block, in long runs": Case((0, 130, 77), 2, d=(64, 64), capacity=144, page=48, layout="BHLD",
                                              schedule=dict(num_blocks=4, num_stages=2, workers=2, bands=4,
                                                            query_slots=2, combines_late=True)),
    "pieces of partial results at once": Case((0, 130, 77), 4, (6, 2), d=(64, 64), capacity=140, schedule=dict(
        num_blocks=5, num_stages=2, parts_at_once=2, pieces_at_once=4)),
    "wide heads": Case((60,), d=(256, 136), capacity=64, page=16, layout="BHLD", rule=Full(),
                       schedule=dict(num_blocks=2, block_kv=32)),
}


def call_of(case: Case, q: np.ndarray, cached: cache.Cache) -> Any:
    """What `cache.attend` makes of its arguments: a spec and operands."""
    options = case.options | dict(return_lse=True)
    call = cache._Call.of(in_layout(case, q), cached, options.pop("mask"), bias_of(case), options)
    if not case.sinks:
        return call
    return call._replace(spec=dataclasses.replace(call.spec, sinks=ArrayField((1, case.heads[0], 1, 1), "float32")))


@pytest.mark.interpreted
@pytest.mark.parametrize("name", INTERPRETED)
def test_the_kernel_agrees_with_the_oracle(name, monkeypatch):
    monkeypatch.setattr(lanes, "LANES", 2)  # of a warp that looks at 32 sequences at a time
    case = INTERPRETED[name]
    q, k, v = rows(case)
    cached = stored(case, k, v)
    call = call_of(case, q, cached)
    spec, operands = call.spec, call.operands()
    schedule = dataclasses.replace(defaults.default_forward(spec, device.H100), **case.schedule)
    assert rules.reasons_against(spec, schedule, device.H100.smem_bytes) == []
    one_block = schedule.num_blocks == 1
    sinks = sinks_of(case)
    sinks = None if sinks is None else sinks[None, :, None, None]
    arrays = *operands[:3], *jax.tree.leaves(operands.mask), operands.bias, sinks, operands.page_table
    with interpreted(detect_races=one_block):
        out, stats = jax.jit(launches.forward(spec, schedule))(*(x for x in arrays if x is not None))
        assert_right(case, out, stats[:, :, 0], exact(case, q, k, v))
    assert not (one_block and gpu_callbacks.get_races().races_found)


# -- who gets it -------------------------------------------------------------------------------------------------------

def shapes(batch=2, q_len=1, q_heads=8, d=64, capacity=256, pages=None, layout="BLHD", dtype="bfloat16"):
    """A query and a cache of two key heads, of shapes alone."""
    array = lambda n, length, heads: jax.ShapeDtypeStruct(
        (n, length, heads, d) if layout == "BLHD" else (n, heads, length, d), dtype)
    lengths, table = jax.ShapeDtypeStruct((batch,), "int32"), None
    if pages is not None:
        table = jax.ShapeDtypeStruct((batch, capacity // pages[1]), "int32")
    number, size = pages or (batch, capacity)
    keys = array(number, size, 2)
    return array(batch, q_len, q_heads), cache.Cache(keys, keys, lengths, table, layout)


def test_an_automatic_choice_takes_it():
    q, cached = shapes(pages=(9, 16))
    text = cache.explain(q, cached, device=device.H200)
    assert "implementation='hopper'" in text and "not 'hopper'" not in text
    assert "forward: attention_decode, DecodeSchedule(block_kv=64" in text
    assert "backward: that of 'xla', Schedule(" in text
    text = cache.explain(*shapes(q_len=16), device=device.H200)
    assert "forward: attention_decode, DecodeSchedule(" in text and "ordinary" not in text  # of more: test_prefill


@pytest.mark.parametrize(("problem", "fields"), [
    (Problem(1, 16_384), dict(num_stages=6)),  # short runs
    (Problem(16, 32_768), dict(num_stages=3, workers=2, bands=4, query_slots=2, combines_late=True)),
    (Problem(16, 32_768, page=16), dict(num_stages=3, workers=2, bands=4, query_slots=2, combines_late=True)),
    (Problem(1, 131_072), dict(num_stages=6, bands=4, query_slots=2, combines_late=True)),  # 17 parts, not 34
    (Problem(16, 32_768, d=64), dict(num_stages=6, bands=4, query_slots=2, combines_late=True)),
    (Problem(16, 16_384, d=256), dict(num_stages=2, q_registers=False, query_slots=2, combines_late=True,
                                      pieces_at_once=4, parts_at_once=2)),
    (Problem(64, 32_768, (32, 1)), dict(num_stages=6, query_slots=2, combines_late=True, pieces_at_once=4,
                                        parts_at_once=2)),
    (Problem(16, 32_768, (8, 8), d=96), dict(num_stages=3, workers=2, bands=4, combines_late=True)),  # no TMA
    (Problem(16, 32_768, (16, 8), d=96), dict(num_stages=3, workers=2, bands=4, query_slots=2, combines_late=True)),
    (Problem(128, 2048), dict(num_stages=3, workers=2, query_slots=2)),  # 1,024 heads are found once
    (Problem(16, 32_768, bias=(16, 1)), dict(num_stages=6, query_slots=2, combines_late=True)),
    (Problem(16, 32_768, eight=True), dict(num_stages=4, workers=2, bands=4, query_slots=2, combines_late=True)),
    (Problem(16, 32_768, d=64, eight=True), dict(num_stages=6, workers=3, bands=4, query_slots=2, combines_late=True)),
], ids=str)
def test_long_runs_wait_for_nothing(problem, fields):
    """What was measured: docs/notes/hopper_decode.md, 2026-11-30."""
    size = problem.batch, problem.heads[1], problem.capacity, problem.d
    table, stored = None, size
    if problem.page:
        table = jax.ShapeDtypeStruct((size[0], size[2] // problem.page), "int32")
        stored = size[0] * table.shape[1], size[1], problem.page, size[3]
    key = jax.ShapeDtypeStruct(stored, "float8_e4m3fn" if problem.eight else "bfloat16")
    scales = [jax.ShapeDtypeStruct((1, problem.heads[1]), "float32")] * 2 if problem.eight else []
    q = jax.ShapeDtypeStruct((problem.batch, problem.heads[0], problem.q_len, problem.d), "bfloat16")
    held = cache.Cache(key, key, jax.ShapeDtypeStruct((problem.batch,), "int32"), table, "BHLD", *scales)
    bias = None if problem.bias is None else jax.ShapeDtypeStruct((*problem.bias, 1, size[2]), "float32")
    spec = cache._Call.of(q, held, Causal(), bias, {}).spec
    assert defaults.default_forward(spec, device.H200) == DecodeSchedule(**fields)


@pytest.mark.parametrize(("options", "keywords", "reason"), [
    (dict(dtype="float32"), {}, "needs bfloat16 or float16"),
    (dict(d=20), {}, r"multiples of 8 .* against a cache, which is not copied in each step, .* to d=24, d_v=24"),
    (dict(), dict(mask=Causal() & Window(left=np.full((2, 8), 3))), "a number for each sequence .*, mask has Window"),
    (dict(q_len=2), dict(bias=np.zeros((1, 1, 2, 256), "float32")), "takes a bias of each key against a cache only"),
])
def test_what_it_does_not_take_has_a_reason(options, keywords, reason):
    q, cached = shapes(**options)
    text = cache.explain(q, cached, device=device.H200, implementation="hopper", **keywords)
    assert text.startswith("UnsupportedError")
    assert re.search(reason, text), text


@pytest.mark.parametrize("d", [(8, 8), (64, 64), (128, 128), (192, 128), (256, 256), (128, 256), (136, 256), (192, 256),
                               (256, 64)])
def test_defaults_fit(d):
    """With (192, 256) queries in registers were too many: ptxas spilled in the hot loop."""
    q, cached = shapes(d=d[0])
    cached = dataclasses.replace(cached, value=jax.ShapeDtypeStruct((*cached.value.shape[:3], d[1]), "bfloat16"))
    spec = AttentionSpec.of(q, cached.key, cached.value).masked(Filled(Causal(), cached.lengths, 1).canonical(), None)
    schedule = defaults.default_forward(spec, device.H100)
    assert rules.reasons_against(spec, schedule, device.H100.smem_bytes) == []


def test_its_gradients_are_those_of_xla():
    q, cached = shapes(pages=(9, 16))
    spec = AttentionSpec.of(q, *(jax.ShapeDtypeStruct((2, 256, 2, 64), "bfloat16"),) * 2).paged(cached.pages)
    mask = Filled(CAUSAL, cached.lengths, 1).canonical()
    spec = spec.masked(mask, None)
    operands = Operands(q, cached.key, cached.value, None, (), mask, (), None, None, cached.page_table)
    results = Results(q, jax.ShapeDtypeStruct(spec.stats_shape, jnp.float32))
    programs = [str(jax.make_jaxpr(functools.partial(autodiff.backward, spec, name))(operands, results, results))
                for name in ("hopper", "xla")]
    assert programs[0] == programs[1]
    assert "dot_general" in programs[0] and "pallas_flash_kernel" not in programs[0]


def forward_with_sinks(spec, operands):
    """What the kernel computes, in plain JAX."""
    given = dataclasses.replace(spec, sinks=None), operands._replace(sinks=None)
    out, stats = get("xla").forward(*given)
    out, lse = with_sinks(spec.layout, out, autodiff.natural_lse(*given, stats), operands.sinks[0, :, 0, 0])
    start = lse - spec.anchor(operands)[..., 0] if spec.bias is not None else lse
    unit = 1.0 if spec.bias is not None else softmax.unit(spec.scale, spec.softcap)
    return Results(out, jnp.stack(softmax.from_lse(start, unit), axis=2))


@pytest.mark.parametrize("layout", ["BLHD", "BHLD"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_sinks_of_the_kernel_have_the_gradients_of_the_pass_over_out(layout, with_bias, monkeypatch):
    """Also of a sequence without keys, and of one that has lost some, of which nothing is differentiated."""
    monkeypatch.setattr(calls, "forward", forward_with_sinks)
    case = Case((9, 0, 16, 5), 2, (4, 2), (8, 16), 16, layout=layout, bias=(1, 4) if with_bias else (0, 0), sinks=True)
    q, k, v = rows(case)
    k, v = (jnp.asarray(in_layout(case, x)) for x in (k, v))
    bias, sinks = bias_of(case), sinks_of(case)
    weights = normal(5, 4, 2, 4, 16), normal(6, 4, 4, 2)

    def total(name, q, k, v, bias, sinks):
        cached = cache.Cache(k, v, jnp.asarray([9, 0, 16, 17], jnp.int32), None, layout)
        out, lse = cache.attend(q, cached, bias=bias, sinks=sinks, return_lse=True, implementation=name)
        return sum(jnp.where(jnp.isfinite(x), x * w, 0).sum() for x, w in zip((
            out.astype(jnp.float32), lse), (in_layout(case, weights[0]), weights[1])))

    with device.assume(device.H100):
        found, wanted = (jax.jit(jax.grad(functools.partial(total, name), (0, 1, 2, 4)))(
            jnp.asarray(in_layout(case, q)), k, v, bias, jnp.asarray(sinks)) for name in ("hopper", "xla"))
    assert np.abs(np.asarray(wanted[-1])[:-1]).min() > 0.01
    assert_agree(found[:-1], wanted[:-1])
    np.testing.assert_allclose(found[-1], wanted[-1], atol=2.0**-8)  # of out, which is rounded to bfloat16


def test_explain_says_where_sinks_are_computed():
    q, cached = shapes()
    sinks = jax.ShapeDtypeStruct((8,), "float32")
    for name, where in (("hopper", "in the kernel"), ("xla", "one more pass over out, in plain JAX")):
        text = cache.explain(q, cached, sinks=sinks, device=device.H200, implementation=name)
        assert text.endswith(f"sinks: {where}")


def decoding(q, cached):
    """A step of a decoding loop, lowered for a GPU."""
    return cache.attend(q, cached, return_lse=True, implementation="hopper")


@pytest.mark.parametrize("name", ["scan", "pages-vmapped", "pages-shared"])
def test_under_transformations(name):
    """Traced and lowered for an H100: the kernel is there once, with the batch of all elements."""
    pages = (9, 32) if "pages" in name else None
    q, cached = shapes(pages=pages)
    stack = lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    if name == "scan":
        function = lambda q, cached: lax.scan(lambda x, _: (decoding(x, cached)[0], None), q, None, length=3)
    elif name == "pages-vmapped":
        function, q, cached = jax.vmap(decoding), stack(q), jax.tree.map(stack, cached)
    else:
        function, q = jax.vmap(decoding, in_axes=(0, None)), stack(q)
    with device.assume(device.H100):
        text = jax.jit(function).trace(q, cached).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    number = {"scan": "2x256", "pages-vmapped": "27x32", "pages-shared": "9x32"}[name]
    assert f"tensor<{number}x2x64xbf16>" in text


def test_vmap_folds_sinks_and_a_bias():
    """Of each element: they have a batch then, which is that of the kernel."""
    q, cached = shapes()
    sinks, bias = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((3, 8), (3, 1, 8, 1, 256)))
    call = lambda q, sinks, bias, cached: cache.attend(q, cached, sinks=sinks, bias=bias, implementation="hopper")
    with device.assume(device.H100):
        lowered = jax.jit(jax.vmap(call, (None, 0, 0, None))).trace(q, sinks, bias, cached).lower(
            lowering_platforms=("cuda",))
    kernel, = (line for line in lowered.as_text().splitlines() if "@mosaic_gpu" in line)
    assert "tensor<6x8x1x1xf32>" in kernel and "tensor<6x8x1x256xf32>" in kernel


@pytest.mark.parametrize("mapped", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
def test_vmap_folds_pages_into_one_table(mapped):
    """Which of k, v and the table are mapped: in the folded problem each sequence reads what it read before."""
    q, cached = shapes(pages=(9, 16), capacity=48, d=8)
    spec = AttentionSpec.of(q, *(jax.ShapeDtypeStruct((2, 48, 2, 8), "bfloat16"),) * 2).paged(cached.pages)
    k, v = (normal(seed, 3, 9, 16, 2, 8) for seed in (0, 1))
    table = np.random.default_rng(2).integers(0, 9, (3, 2, 3)).astype(np.int32)
    given = [x if is_mapped else x[0] for x, is_mapped in zip((k, v, table), mapped)]
    fields = dict(q=None, bias=None, score=(), mask=Full(), score_integers=(), dropout_seed=None, dropout_origin=None)
    operands, flags = (Operands(k=a, v=b, page_table=c, **fields) for a, b, c in (map(jnp.asarray, given), mapped))
    found = batching._folded_pages(3, spec, operands, flags)
    read = lambda x, table: paging.rows(jnp.asarray(x), jnp.asarray(table), jnp.arange(48), 1)
    of = lambda i, j: given[i][j] if mapped[i] else given[i]
    for i, name in enumerate("kv"):
        wanted = jnp.concatenate([read(of(i, j), of(2, j)) for j in range(3)])
        np.testing.assert_array_equal(read(found[name], found["page_table"]), wanted)


@dataclasses.dataclass(frozen=True)
class StandIn:
    """The forward of `xla` in the place of the kernel."""

    spec: AttentionSpec

    @property
    def result_types(self):
        return (jax.ShapeDtypeStruct(self.spec.out_shape, self.spec.dtype),
                jax.ShapeDtypeStruct(self.spec.stats_shape, jnp.float32))

    def __call__(self, q, k, v, lengths, table):
        mask = jax.tree.map(lambda _: lengths, self.spec.mask)
        return tuple(autodiff.forward(self.spec, "xla", Operands(q, k, v, None, (), mask, (), None, None, table)))


def test_devices_share_batch_and_heads_of_pages():
    """Each has all pages of its heads, and the table of its sequences; nothing is exchanged."""
    if len(jax.devices()) < 4 or jax.default_backend() != "cpu":
        pytest.skip("needs four virtual CPU devices: JAX_PLATFORMS=cpu")
    case = Case((0, 20, 32, 5), d=(16, 16), capacity=32, page=16)
    q, k, v = rows(case)
    cached = stored(case, k, v)
    spec = call_of(case, q, cached).spec
    run = functools.partial(partitioned, StandIn, "query pages pages field table -> query row", spec,
                            device=device.CPU)
    arrays = jnp.asarray(q), cached.key, cached.value, cached.lengths[:, None], cached.page_table
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    places = P("batch", None, "heads"), *[P(None, None, "heads")] * 2, P("batch"), P("batch")
    split = [jax.device_put(x, NamedSharding(mesh, place)) for x, place in zip(arrays, places, strict=True)]
    program = jax.jit(run).lower(*split).compile()
    assert not re.search("all-gather|all-reduce|all-to-all|collective", program.as_text())
    found = program(*split)
    assert found[0].sharding.is_equivalent_to(NamedSharding(mesh, places[0]), 4)
    assert_agree(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, jax.jit(run)(*arrays)))
    assert_right(case, found[0], found[1][:, :, 0], exact(case, q, k, v))


# -- on a GPU ----------------------------------------------------------------------------------------------------------

LENGTHS = (0, 1, 700, 3000, 1535, 2048)
LONG = functools.partial(Case, LENGTHS, capacity=3000)
PAGED = functools.partial(Case, LENGTHS, capacity=3072)
ON_A_GPU = {
    **{f"d{d}": LONG(d=(d, d)) for d in (8, 64, 72, 96, 128, 192, 256)},
    "d192-v128": LONG(d=(192, 128), heads=(8, 1)), "d128-v256": LONG(d=(128, 256)), "d40-v136": LONG(d=(40, 136)),
    "heads-first": LONG(layout="BHLD", heads=(8, 8)), "fp16": LONG(dtype="float16"),
    "fp16-d64-v96-heads-first": LONG(d=(64, 96), layout="BHLD", dtype="float16", q_len=5),
    "64-rows": LONG(q_len=16, heads=(8, 2)), "64-rows-d256": LONG(q_len=16, heads=(4, 1), d=(256, 256)),
    "63-rows-heads-first": LONG(q_len=9, heads=(14, 2), layout="BHLD"), "mqa": LONG(heads=(32, 1)),
    "all-keys": LONG(q_len=3, rule=Full()), "window": LONG(q_len=4, rule=Causal() & Window(left=300)),
    "window-of-arrays": LONG(rule=Causal() & Window(left=300), mask=Causal() & Window(left=np.full(6, 300))),
    "window-d64-fp16": LONG(rule=Causal() & Window(left=1), d=(64, 64), dtype="float16"),
    "prefix": LONG(q_len=4, rule=PrefixLM(1000)), "softcap": LONG(softcap=3.0), "negative-scale": LONG(scale=-0.3),
    "window-softcap-d256": LONG(q_len=2, rule=Causal() & Window(left=77), softcap=5.0, d=(256, 256)),
    "large-scores": LONG(scale=4.0), "huge-scores": LONG(q_len=2, scale=-1e25),
    "a-class-of-a-user": LONG(q_len=2, rule=Chunks(300), bad=(0, 250, 310)),
    "bad-values": LONG(q_len=4, bad=(1, 2)), "bad-values-d256-heads-first-fp16": LONG(
        q_len=5, d=(256, 256), layout="BHLD", dtype="float16", bad=(2,)),
    "bad-values-in-pages": PAGED(q_len=3, page=16, d=(64, 96), rule=Causal() & Window(left=100), bad=(0, 101, 102)),
    "one-query-bad-values": LONG(rule=Causal() & Window(left=100), bad=(101, 102)),
    **{f"pages-of-{page}": PAGED(page=page) for page in (16, 64, 128, 1024)},
    "pages-of-48-d64": Case((0, 1, 700, 2976), page=48, capacity=2976, d=(64, 64), q_len=2),
    "pages-heads-first-d256": PAGED(page=32, layout="BHLD", d=(256, 256), q_len=3),
    "pages-window-fp16": PAGED(page=16, dtype="float16", rule=Causal() & Window(left=100), d=(192, 128)),
    "many-sequences": Case(tuple(int(n) for n in np.random.default_rng(0).integers(0, 257, 700)), capacity=256),
    "one-long-sequence": Case((131_072,), capacity=131_072, heads=(4, 1)),
    "one-short-sequence": Case((100,), capacity=131_072, heads=(4, 1)),
    "one-tile": Case((5,), capacity=20, heads=(1, 1)),
    "sinks": LONG(sinks=True, q_len=3), "sinks-d256-pages-heads-first": PAGED(
        sinks=True, page=16, d=(256, 256), layout="BHLD", heads=(8, 1)),
    "bias": LONG(bias=(6, 1), bad=(1, 2)), "bias-heads-odd-capacity": Case(
        LENGTHS, capacity=3001, bias=(1, 4), q_len=4, dtype="float16", d=(64, 64), bad=(1, 2)),
    "bias-bf16-sinks-pages": PAGED(bias=(6, 4), bias_dtype="bfloat16", sinks=True, page=64, softcap=5.0),
    "bias-d256": LONG(bias=(1, 4), d=(256, 256), q_len=2, bad=(1, 2, 3), sinks=True),
    "bias-of-the-least-number": LONG(bias=(6, 4), least=float(np.finfo("float32").min), q_len=2),
}


def ours(case: Case) -> Any:
    """A jitted function of queries and a cache to out and lse."""
    bias, sinks = (None if x is None else jnp.asarray(x) for x in (bias_of(case), sinks_of(case)))
    return jax.jit(functools.partial(cache.attend, return_lse=True, implementation="hopper", bias=bias, sinks=sinks,
                                     **case.options))


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ON_A_GPU)
def test_right_on_a_gpu(name):
    case = ON_A_GPU[name]
    q, k, v = rows(case)
    found = ours(case)(in_layout(case, q), stored(case, k, v))
    assert_right(case, *found, exact(case, q, k, v))


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("schedule", [
    dict(num_blocks=1), dict(num_blocks=3, num_stages=1), dict(num_blocks=1000), dict(block_kv=32, parts_at_once=1),
    dict(block_kv=128, num_stages=2), dict(block_kv=80, num_stages=4), dict(q_registers=False),
    dict(workers=2, num_stages=3), dict(workers=2, num_stages=2, num_blocks=1, q_registers=False),
    dict(workers=3, num_stages=2, block_kv=32), dict(query_slots=2), dict(pieces_at_once=4, parts_at_once=2)], ids=str)
def test_every_schedule_is_right_on_a_gpu(schedule):
    assert_right_as_scheduled(dataclasses.replace(ON_A_GPU["64-rows"], layout="BHLD", schedule=schedule))


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("schedule", [
    dict(bands=4), dict(bands=2), dict(bands=4, workers=2, num_stages=2), dict(bands=4, block_kv=128, num_stages=2),
    dict(bands=4, query_slots=1, num_blocks=3), dict(query_slots=2, workers=2, num_stages=2),
    dict(bands=4, workers=2, num_stages=3, combines_late=True, query_slots=2),
    dict(combines_late=True, query_slots=2), dict(cluster=8), dict(cluster=2, bands=4)], ids=str)
def test_every_schedule_of_few_queries_is_right_on_a_gpu(schedule):
    assert_right_as_scheduled(Case((300, 0, 77, 640, 1), 2, (8, 2), capacity=640, bias=(5, 8), sinks=True,
                                   bad=(0, 1, 70), schedule=schedule))


def assert_right_as_scheduled(case: Case) -> None:
    q, k, v = rows(case)
    default = defaults.default_forward(call_of(case, q, stored(case, k, v)).spec, device.current())
    jax.clear_caches()
    with defaults.assume(dataclasses.replace(default, **case.schedule)):
        found = ours(case)(in_layout(case, q), stored(case, k, v))
    jax.clear_caches()
    assert_right(case, *map(np.asarray, found), exact(case, q, k, v))


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["64-rows", "pages-of-16", "mqa", "many-sequences"])
def test_repeated_runs_are_equal_bit_by_bit(name):
    case = ON_A_GPU[name]
    q, k, v = rows(case)
    bits = lambda x: lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    attend = lambda *args: tuple(map(bits, ours(case)(*args)))

    @jax.jit
    def count(q, cached):
        first = attend(q, cached)

        def once(_, differing):
            arrays, differing = lax.optimization_barrier(((q, cached), differing))  # no run is moved out of the loop
            again = attend(*arrays)
            return differing + sum(jnp.any(a != b).astype(jnp.int32) for a, b in zip(first, again))
        return lax.fori_loop(0, REPETITIONS, once, jnp.int32(0))

    assert int(count(in_layout(case, q), stored(case, k, v))) == 0


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_a_decoding_loop_is_right_on_a_gpu():
    assert_a_loop_is_right("hopper")


def assert_a_loop_is_right(implementation: str) -> None:
    """Appended in place and read in the next step, under one `jit`; and gradients of it are those of `xla`."""
    case = Case((0, 40, 100), capacity=160, heads=(4, 2))
    q, k, v = rows(dataclasses.replace(case, q_len=20))
    start = jax.tree.map(jnp.asarray, stored(case, k, v))
    new = tuple(jnp.asarray(normal(seed, case.batch, 20, 2, 128), case.dtype) for seed in (7, 8))

    def loop(name, q, new, start):
        def one(at, rows):
            at = cache.append(at, *(x[:, None] for x in rows[1:]))
            return at, cache.attend(rows[0][:, None], at, implementation=name)[:, 0]
        by_step = tuple(x.swapaxes(0, 1) for x in (q, *new))
        return lax.scan(one, start, by_step)[1].astype(jnp.float32)

    found, wanted = (jax.jit(functools.partial(loop, name))(q, new, start) for name in (implementation, "xla"))
    np.testing.assert_allclose(found, wanted, atol=2.0**-6)
    gradient = lambda name: jax.jit(jax.grad(lambda q, new: loop(name, q, new, start).sum(), (0, 1)))(q, new)
    assert_agree(gradient(implementation), gradient("xla"))


SANITIZED = """
from tests.hopper import test_decode
test_decode.assert_right_as_scheduled(test_decode.{case})
"""


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("tool", ("memcheck", "racecheck"))
@pytest.mark.parametrize("case", [
    "Case((300, 0, 77), 2, capacity=320, page=32, bias=(3, 4), sinks=True, bad=(1, 2))",
    "Case((300, 5), 3, d=(256, 72), capacity=301, layout='BHLD')",
    "Case((300, 0, 77), 2, capacity=301, schedule=dict(bands=4, query_slots=2, num_blocks=5, num_stages=2, "
    "combines_late=True))", "Case((300, 0, 77), 2, capacity=301, schedule=dict(cluster=4))",
    "Case((300, 0, 77), 2, capacity=301, d=(64, 64), schedule=dict(workers=2, num_blocks=5))"])
def test_compute_sanitizer_finds_nothing(tool, case):
    sanitizer.check(tool, SANITIZED.format(case=case), "attention_decode")
