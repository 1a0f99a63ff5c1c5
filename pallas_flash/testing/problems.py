"""The catalogue: named attention problems, each with the reason for it. Tests and benchmarks iterate over it.

    conformance   small; every implementation must get them right, forward and backward, in every dtype they list;
    large scores  conformance problems whose budget is what one step of float32 in each score changes: lse is as large
                  as they are, and rounding it must not reach a weight;
    defects       conformance problems on which another library was wrong, with the report;
    benchmarks    what speed is measured on; those of features beside a plain call.

Lengths of conformance problems are a few tiles of every kernel (`LEN` = 150 and the like); masks with arrays hold them.
"""

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import packed, scores
from pallas_flash.arrays import Array
from pallas_flash.masks import Causal, Dense, Full, InBounds, Mask, PrefixLM, SegmentIds, Window
from pallas_flash.relative_scores import ALiBi, RelativeBias, alibi_slopes
from pallas_flash.scores import Score
from pallas_flash.spec import AttentionSpec, Layout, Operands
from pallas_flash.testing import inputs

__all__ = ["BENCHMARKS", "CONFORMANCE", "DEFECTS", "DTYPES", "Keywords", "LARGE_SCORES", "Plain", "Problem", "features",
           "find", "select"]

DTYPES = ("float64", "float32", "bfloat16", "float16")
HALF = ("bfloat16", "float16")
LEN = 150
FULL = Full()



class _Options(TypedDict):
    """The arguments of `AttentionSpec.of` that are not arrays."""

    layout: Layout
    mask: Mask
    score: Score | None
    softcap: float | None
    scale: float | None
    dropout_rate: float
    deterministic: bool


class Keywords(_Options):
    """The arguments of `flash_attention` that are not arrays."""

    dropout_rng: Array | None
    return_lse: Literal[True]


@dataclasses.dataclass(frozen=True)
class Plain:
    """The call that a benchmark of a feature is measured against: nothing but a mask of numbers.

    Attributes:
      mask: its mask.
      lengths: of the sequences in a row of tokens, which are the batch of that call, or of one for each length; None:
        its shapes are those of the problem.
    """

    mask: Mask
    lengths: tuple[int, ...] | None = None


class _Fields(TypedDict, total=False):
    """Fields of a `Problem`, by name."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    d: int
    d_v: int
    layout: Layout
    mask: Mask
    bias: tuple[int, int, int, int]
    score: Score
    softcap: float
    scale: float
    dropout_rate: float
    deterministic: bool
    dtypes: tuple[str, ...]
    bias_dtype: str
    bias_size: float
    bias_masks: bool
    row_lse: float
    tags: tuple[str, ...]
    sinks: bool
    learned: tuple[str, ...]
    plain: Plain


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A named problem. The fields up to `deterministic` are those of `AttentionSpec`; bias is its shape, and the score
    function has its arrays, at most one of floating-point numbers.

    Attributes:
      source: why it is in the catalogue.
      dtypes: the dtypes it runs in.
      bias_dtype: None for that of query.
      bias_size, bias_masks, row_lse: see `inputs.operands`.
      score_size: see `inputs.with_scores_of`.
      tags: words to select by.
      sinks: each head has a sink; for benchmarks, a spec knows of none.
      learned: of "bias" and "sinks", those whose gradients a benchmark computes.
      plain: what a benchmark of a feature is measured against.
    """

    name: str
    source: str
    batch: int = 2
    q_heads: int = 2
    kv_heads: int = 2
    q_len: int = LEN
    kv_len: int = LEN
    d: int = 16
    d_v: int = 16
    layout: Layout = "BLHD"
    mask: Mask = FULL
    bias: tuple[int, int, int, int] | None = None
    score: Score | None = None
    softcap: float | None = None
    scale: float | None = None
    dropout_rate: float = 0.0
    deterministic: bool = False
    dtypes: tuple[str, ...] = DTYPES
    bias_dtype: str | None = None
    bias_size: float = 1.0
    bias_masks: bool = False
    row_lse: float | None = None
    score_size: float | None = None
    tags: tuple[str, ...] = ()
    sinks: bool = False
    learned: tuple[str, ...] = ()
    plain: Plain | None = None

    def __str__(self) -> str:
        return self.name

    def spec(self, dtype: str | None = None) -> AttentionSpec:
        """Its spec in a dtype, the first of `dtypes` if None. float64 needs JAX's 64-bit mode."""
        dtype = dtype or self.dtypes[0]

        def shape(length: int, heads: int, dim: int) -> jax.ShapeDtypeStruct:
            inner = (length, heads) if self.layout == "BLHD" else (heads, length)
            return jax.ShapeDtypeStruct((self.batch, *inner, dim), dtype)
        return AttentionSpec.of(
            shape(self.q_len, self.q_heads, self.d), shape(self.kv_len, self.kv_heads, self.d),
            shape(self.kv_len, self.kv_heads, self.d_v), return_lse=True, **self._options,
            bias=None if self.bias is None else jax.ShapeDtypeStruct(self.bias, self.bias_dtype or dtype))

    @property
    def _options(self) -> _Options:
        return _Options(layout=self.layout, mask=self.mask, score=self.score, softcap=self.softcap, scale=self.scale,
                        dropout_rate=self.dropout_rate, deterministic=self.deterministic)

    def operands(self, dtype: str | None = None, *, seed: int = 0,
                 normal: inputs.Normal = inputs.host_normal) -> Operands:
        """Random operands of `spec(dtype)`."""
        operands = inputs.operands(self.spec(dtype), self.mask, seed=seed, row_lse=self.row_lse,
                                   bias_size=self.bias_size, bias_masks=self.bias_masks, normal=normal)
        operands = operands._replace(score=scores.floats(self.score), score_integers=scores.integers(self.score))
        return operands if self.score_size is None else inputs.with_scores_of(self.score_size, operands)

    def keywords(self, operands: Operands) -> Keywords:
        """The keywords of `flash_attention(q, k, v, bias=..., **keywords)` for operands of this problem."""
        score = None if self.score is None else self.score.filled(operands.score, operands.score_integers)
        return {**self._options, "mask": operands.mask, "score": score, "dropout_rng": operands.dropout_seed,
                "return_lse": True}


def _packed(*lengths: int) -> np.ndarray:
    """Segment ids 0, 1, ... of the given lengths; a negative length is padding."""
    return np.concatenate([np.full(abs(n), i if n > 0 else -1, np.int32) for i, n in enumerate(lengths)])


def _sequences(rule: Mask, q_starts: Sequence[Sequence[int]], kv_starts: Sequence[Sequence[int]]) -> packed.Packed:
    """Packed sequences, aligned at their ends, whose boundaries are given for each entry of the batch."""
    def sequence(rows: Sequence[Sequence[int]]) -> np.ndarray:
        return np.stack([np.searchsorted(row[1:], np.arange(LEN), side="right") for row in rows])
    return packed.Packed(rule, np.array(q_starts), np.array(kv_starts), sequence(q_starts), sequence(kv_starts), "last")


def _coin(*shape: int, chance: float = 0.6) -> np.ndarray:
    return np.random.default_rng(sum(shape)).random(shape) < chance


_IDS = np.stack([_packed(40, 70, 40), _packed(90, 10, 30, -20)])
_PADDED = np.stack([_packed(60, 50, -40), _packed(-30, 120)])
_LENGTHS = np.array([150, 61], np.int32)

_MASKS = {
    "full": Full(),
    "causal": Causal(),
    "causal-empty-rows": Causal(offset=-40),
    "causal-per-batch-offset": Causal(offset=np.array([-3, 20], np.int32)),
    "window": Window(left=30, right=20),
    "window-causal": Window(left=25, right=0),
    "window-diagonal": Window(left=0, right=0),
    "window-beside": Window(left=-3, right=9),
    "window-per-batch": Window(left=np.array([0, 70], np.int32), right=np.array([5, 0], np.int32)),
    "prefix": PrefixLM(65),
    "prefix-per-batch": PrefixLM(np.array([0, 100], np.int32)),
    "lengths": InBounds(_LENGTHS[::-1], _LENGTHS),
    "length-zero": InBounds(kv_len=np.array([0, 33], np.int32)),
    "segments": SegmentIds(_IDS, _IDS),
    "segments-unordered": SegmentIds(np.roll(_IDS, 17, axis=1), _IDS[:, ::-1].copy()),
    "dense": Dense(_coin(2, 2, LEN, LEN)),
    "dense-keys": Dense(_coin(2, 1, 1, LEN)),
    "dense-rows": Dense(_coin(2, LEN, 1)),
    "packed": _sequences(Causal(), [[0, 40, 40, 110, 150], [0, 90, 100, 101, 140]],
                         [[0, 70, 90, 110, 150], [0, 60, 80, 80, 135]]),
    "causal-segments": Causal() & SegmentIds(_IDS, _IDS),
    "causal-lengths": Causal() & InBounds(kv_len=_LENGTHS),
    "causal-dense": Causal() & Dense(_coin(2, 1, LEN, LEN, chance=0.1)),
    "window-prefix": Window(left=60) & PrefixLM(40) & InBounds(140, 130),
    "everywhere-masked": Window(left=5, right=5) & Window(left=-20, right=40),
}

_SHAPES: dict[str, _Fields] = {
    "heads-first": dict(layout="BHLD"),
    "heads-first-gqa": dict(layout="BHLD", q_heads=4, kv_heads=2, d_v=24),
    "gqa": dict(q_heads=6, kv_heads=2),
    "mqa": dict(q_heads=4, kv_heads=1, batch=1),
    "d-above-d_v": dict(d=24, d_v=8),
    "d-below-d_v": dict(d=8, d_v=24),
    "odd-d": dict(d=13, d_v=7),
    "d-1": dict(d=1, d_v=1),
    "wide": dict(d=96, d_v=128, batch=1),
    "more-queries": dict(q_len=170, kv_len=83),
    "more-keys": dict(q_len=83, kv_len=170),
    "more-keys-bottom-right": dict(q_len=83, kv_len=170, mask=Causal(offset=87)),
    "more-queries-bottom-right": dict(q_len=170, kv_len=83, mask=Causal(offset=-87)),
    "one-query": dict(q_len=1, mask=Causal(offset=LEN - 1)),
    "one-query-first": dict(q_len=1, mask=Causal()),
    "one-key": dict(kv_len=1, mask=Full()),
    "one-pair": dict(q_len=1, kv_len=1),
    "ragged": dict(q_len=67, kv_len=129),
    "aligned": dict(q_len=128, kv_len=128),
    "three-tiles": dict(q_len=1100, kv_len=1100, batch=1, q_heads=1, kv_heads=1, d=8, d_v=8,
                        mask=Window(left=600, right=0)),
}

_EMPTY: dict[str, _Fields] = {
    "no-queries": dict(q_len=0), "no-keys": dict(kv_len=0), "no-batch": dict(batch=0), "no-value-dim": dict(d_v=0),
    "no-dim": dict(d=0),
}

_BIASES = [(b, h, q, kv) for b in (1, 2) for h in (1, 2) for q in (1, LEN) for kv in (1, LEN)]

@dataclasses.dataclass(frozen=True)
class _Bent(Score):
    """Falls and rises with the score, by a curve of each head; hides keys at some distances."""

    curves: Array | np.ndarray

    def __call__(self, score: Array, batch: Array, head: Array, q_pos: Array, kv_pos: Array) -> Array:
        near = jnp.exp(-abs(kv_pos - q_pos).astype(score.dtype) / 30)
        bent = score - near * jnp.asarray(self.curves)[head, batch % 2] * jnp.sin(2 * score)
        return jnp.where((q_pos + 3 * kv_pos) % 11 == 5, -jnp.inf, bent)


def _table(heads: int, columns: int) -> np.ndarray:
    return np.random.default_rng(columns).standard_normal((heads, columns)).astype(np.float32)


_FEATURES: dict[str, _Fields] = {
    "bias": dict(bias=(2, 2, LEN, LEN), mask=Causal()),
    "bias-gqa": dict(bias=(1, 4, LEN, LEN), q_heads=4, layout="BHLD", mask=Causal()),
    "bias-masks": dict(bias=(2, 1, LEN, LEN), bias_masks=True),
    "bias-masks-keys": dict(bias=(2, 1, 1, LEN), bias_masks=True, mask=Causal()),
    "softcap": dict(softcap=1.5, mask=Causal()),
    "softcap-saturated": dict(softcap=0.5, scale=2.0),
    "softcap-bias": dict(softcap=2.0, bias=(1, 2, LEN, LEN)),
    "dropout": dict(dropout_rate=0.1, mask=Causal()),
    "dropout-half-gqa": dict(dropout_rate=0.5, q_heads=4, layout="BHLD"),
    "dropout-all": dict(dropout_rate=1.0),
    "everything": dict(bias=(2, 4, LEN, LEN), softcap=3.0, dropout_rate=0.2, q_heads=4, d=24, scale=0.3,
                       deterministic=True,
                       mask=Causal(offset=5) & SegmentIds(_IDS, _IDS) & InBounds(kv_len=_LENGTHS)),
    "deterministic": dict(mask=Causal(), q_heads=4, deterministic=True),
    "scale-zero": dict(scale=0.0, mask=Causal()),
    "scale-negative": dict(scale=-0.7, mask=Causal()),
    "scale-large": dict(scale=3.0),
    "score-alibi": dict(score=ALiBi(alibi_slopes(4), offset=3), q_heads=4, mask=Causal(offset=3), layout="BHLD",
                        dtypes=("float16",)),
    "score-relative": dict(score=RelativeBias(_table(2, 41)), mask=Window(left=70, right=50), dtypes=("float32",)),
    "score-everything": dict(score=_Bent(_table(4, 2)), bias=(1, 4, LEN, LEN), softcap=3.0, dropout_rate=0.2, q_heads=4,
                             mask=Causal(offset=-20) & InBounds(kv_len=_LENGTHS), dtypes=("float16",)),
    "large-rows": dict(row_lse=200.0, mask=Causal()),
    "large-rows-full": dict(row_lse=200.0, d=64, d_v=64, batch=1),
}


def _conformance() -> list[Problem]:
    found = [Problem(f"mask-{name}", "every kind of mask, and intersections", mask=mask)
             for name, mask in _MASKS.items()]
    found += [Problem(f"shape-{name}", "shapes that loops and tiles get wrong", **(_Fields(mask=Causal()) | options))
              for name, options in _SHAPES.items()]
    found += [Problem(f"empty-{name}", "SEMANTICS: empty axes give empty or zero results", **options)
              for name, options in _EMPTY.items()]
    found += [Problem(f"bias-{b}x{h}x{q}x{kv}", "the gradient of a bias is summed over each set of broadcast axes",
                      bias=(b, h, q, kv), dtypes=("float32",)) for b, h, q, kv in _BIASES]
    return found + [Problem(name, "every other field of the spec", **options) for name, options in _FEATURES.items()]


_DEFECTS: dict[str, tuple[str, _Fields]] = {
    "cudnn-nan-dq": (
        "pytorch #196678: NaN dq with a mask when S % 128 == 64 and a row's lse < -88.7",
        dict(batch=1, q_len=192, kv_len=192, d=64, d_v=64, bias=(1, 1, 192, 192), bias_masks=True, row_lse=120.0)),
    "bias-precision": (
        "pytorch #191612: an fp32 mask read as bf16",
        dict(bias=(1, 2, LEN, LEN), bias_size=100.0, bias_dtype="float32")),
    "few-kv-heads": (
        "pytorch #193893: corruption with fewer than 8 key heads",
        dict(q_heads=16, kv_heads=4, q_len=70, kv_len=70, d=32, d_v=32, layout="BHLD", mask=Causal())),
    "one-query-gradient": (
        "cudnn-frontend #1072: all dk and dv NaN at q_len = 1 with a negative lse",
        dict(q_len=1, row_lse=50.0, d=64, d_v=64)),
    "ragged-first-run": (
        "jax #23819: NaN on first runs when S % block != 0",
        dict(q_len=200, kv_len=200, d=32, d_v=32, mask=Causal())),
    "grid-limit": (
        "pytorch #142228: more than 65,535 batch x heads",
        dict(batch=32_769, q_len=3, kv_len=3, d=2, d_v=2, mask=Causal())),
    "deterministic": (
        "flash-attention #2244: deterministic gradients that differ from run to run",
        dict(q_heads=4, q_len=260, kv_len=260, d=64, d_v=64, mask=Causal(), deterministic=True)),
    "packed-padding": (
        "maxtext #4476: padding ignored by packed inputs",
        dict(mask=Causal() & SegmentIds(_PADDED, _PADDED))),
}
DEFECTS: tuple[Problem, ...] = tuple(
    Problem(f"defect-{name}", source, **(_Fields(dtypes=HALF) | options))
    for name, (source, options) in _DEFECTS.items())
"""Problems on which another library was wrong, with the report."""

CONFORMANCE: tuple[Problem, ...] = (*_conformance(), *DEFECTS)

_LARGE: dict[str, _Fields] = {
    "causal-gqa": dict(mask=Causal(), q_heads=4, layout="BHLD", d=64, d_v=64),
    "window": dict(mask=Window(left=40, right=20), d=64, d_v=64, batch=1),
    "bias": dict(bias=(1, 2, LEN, LEN), d=32),
}
LARGE_SCORES: tuple[Problem, ...] = tuple(
    Problem(f"large-{name}-{size:.0e}", "gradients 6 % off at scores of 3e5, and 18-fold at 3e7, all of them finite",
            score_size=size, **(_Fields(dtypes=DTYPES[1:]) | options))
    for name, options in _LARGE.items() for size in (1e3, 1e6))
"""Problems whose scores are large."""


TOKENS, HIDDEN = 16_384, 2_048


def _benchmark(name: str, source: str, length: int, d: int, /, **options: Unpack[_Fields]) -> Problem:
    heads = HIDDEN // d
    fields = _Fields(
        batch=max(1, TOKENS // length), q_heads=heads, kv_heads=heads, q_len=length, kv_len=length, d=d, d_v=d,
        mask=Causal(), dtypes=("bfloat16",), tags=("gpu",))
    return Problem(name, source, **(fields | options))


_MATRIX_SOURCE = "16,384 tokens, hidden size 2,048: what FlashAttention-2 and -3 are measured on"
_VARIANTS: dict[str, tuple[str, int, _Fields]] = {
    "full-d64": ("no mask", 64, dict(mask=Full())),
    "full-d128": ("no mask", 128, dict(mask=Full())),
    "full-d256": ("no mask", 256, dict(mask=Full())),
    "gqa-d128": ("16 query and 4 key heads", 128, dict(kv_heads=4)),
    "window-d128": ("cost must follow the window, not the length", 128, dict(mask=Window(left=1023, right=0))),
    "heads-first-d128": ("no layout costs a copy", 128, dict(layout="BHLD")),
    "fp16-d128": ("the other half precision", 128, dict(dtypes=("float16",))),
    "causal-d96": ("a head size between two tile sizes", 96, {}),
    "causal-d512": ("the head size of Gemma 4's layers without a window", 512, {}),
    "causal-d192-v128": ("the head sizes of DeepSeek-V3", 192, dict(d_v=128, q_heads=16, kv_heads=16)),
}


def _benchmarks() -> list[Problem]:
    found = [_benchmark(f"causal-d{d}-s{s}", _MATRIX_SOURCE, s, d, tags=("gpu", "matrix"))
             for d in (64, 128, 256) for s in (512, 1024, 2048, 4096, 8192, 16_384)]
    found += [_benchmark(f"{name}-s{s}", source, s, d, **options)
              for name, (source, d, options) in _VARIANTS.items() for s in (2048, 16_384)]
    for ragged, whole, batch in ((1000, 1024, 16), (4097, 4224, 3)):
        source = f"a ragged tail, S {ragged:,}, may cost 5 % over S {whole:,}"
        found += [_benchmark(f"tail-d128-s{s}", source, s, 128, batch=batch) for s in (ragged, whole)]
    found += [
        _benchmark("long-d128-s131072", "one long sequence", 131_072, 128, tags=("gpu", "long")),
        _benchmark("long-d128-s524288", "one very long sequence", 524_288, 128, q_heads=1, kv_heads=1,
                   tags=("gpu", "long")),
        _benchmark("huge-d128", "TabPFN #1184: more than 2^31 elements", 131_072, 128, batch=9, tags=("gpu", "huge"),
                   mask=Window(left=127, right=0))]
    found += [_benchmark(f"deterministic-d{d}-s{s}", "gradients that repeat bit by bit", s, d, deterministic=True)
              for d in (64, 128) for s in (2048, 16_384)]
    found.append(_benchmark("float32-d128-s4096", "inputs of float32, which tensor cores do not take", 4096, 128,
                            dtypes=("float32",), tags=("float32",)))
    cpu = _Fields(batch=1, q_heads=4, kv_heads=4, dtypes=("float32",), tags=("cpu",))
    timed = cpu | _Fields(tags=("cpu", "speed"))
    return found + [_benchmark(f"cpu-d64-s{s}", "what runs without a GPU", s, 64,
                               **(timed if s in (1024, 8192) else cpu)) for s in (1024, 2048, 4096, 8192, 16_384)]


def _scaled(length: int, *of_4096: int) -> tuple[int, ...]:
    return tuple(x * length // 4096 for x in of_4096)


def _documents(length: int, *starts: int) -> tuple[tuple[int, ...], Mask, Mask]:
    """The lengths of the documents in a row, and them in each of 4 rows: as segment ids, and packed in one row."""
    lengths = np.diff(_scaled(length, *starts, 4096))
    bounds = np.concatenate([[0], np.cumsum(np.tile(lengths, 4))]).astype(np.int32)
    ids, number = np.tile(_packed(*lengths), (4, 1)), np.repeat(np.arange(4 * len(lengths), dtype=np.int32),
                                                                np.tile(lengths, 4))
    return (tuple(lengths.tolist()), Causal() & SegmentIds(ids, ids),
            packed.Packed(Causal(), bounds, bounds, number, number))


def features(length: int = 4096, heads: int = 16, d: int = 128) -> list[Problem]:
    """Benchmarks of what models ask of attention besides a plain causal call, for 4 rows of tokens."""
    kv_lengths = np.array(_scaled(length, 4096, 3072, 2048, 3996), np.int32)
    padding = Dense((np.arange(length) < kv_lengths[:, None])[:, None, None])
    window = Window(left=length // 4 - 1, right=0)
    equal, equal_ids, equal_packed = _documents(length, 0, 1024, 2048, 3072)
    ragged, ragged_ids, ragged_packed = _documents(length, 0, 1500, 1800, 2800, 2896)
    row: _Fields = dict(batch=1, q_len=4 * length, kv_len=4 * length)
    bias: _Fields = dict(bias=(1, heads, length, length))
    table: dict[str, tuple[str, _Fields]] = {
        "ragged-ids": ("5 documents in each row, as segment ids", dict(mask=ragged_ids, plain=Plain(Causal(), ragged))),
        "ragged-packed": ("the same, packed", dict(mask=ragged_packed, plain=Plain(Causal(), ragged), **row)),
        "bias-gradient": ("a learned bias of each head", dict(**bias, learned=("bias",))),
        "bias": ("a bias of each head, without gradient", bias),
        "documents-ids": ("4 documents in each row, as segment ids",
                          dict(mask=equal_ids, plain=Plain(Causal(), equal))),
        "documents-packed": ("the same, packed", dict(mask=equal_packed, plain=Plain(Causal(), equal), **row)),
        "lengths": ("keys of different lengths, causal", dict(mask=Causal() & InBounds(kv_len=kv_lengths))),
        "lengths-full": ("keys of different lengths", dict(mask=InBounds(kv_len=kv_lengths), plain=Plain(Full()))),
        "padding": ("the same as booleans (batch, 1, 1, length), causal", dict(mask=Causal() & padding)),
        "padding-full": ("booleans (batch, 1, 1, length)", dict(mask=padding, plain=Plain(Full()))),
        "dropout": ("one weight in ten is dropped", dict(dropout_rate=0.1)),
        "sinks": ("a learned sink of each head", dict(sinks=True, learned=("sinks",))),
        "window-sinks": ("a window of a quarter of the keys, and a learned sink of each head",
                         dict(mask=window, sinks=True, learned=("sinks",))),
        "window-softcap": ("a window of a quarter of the keys, and a soft cap", dict(mask=window, softcap=2.0)),
    }
    common: _Fields = dict(batch=4, q_heads=heads, kv_heads=heads, mask=Causal(), plain=Plain(Causal()),
                           tags=("features", f"features-d{d}"))
    return [_benchmark(f"{name}-d{d}-s{length}", source, length, d, **(common | options))
            for name, (source, options) in table.items()]


BENCHMARKS: tuple[Problem, ...] = (*_benchmarks(), *features(), *features(d=64))


def find(name: str) -> Problem:
    """The problem of that name."""
    for problem in (*CONFORMANCE, *LARGE_SCORES, *BENCHMARKS):
        if problem.name == name:
            return problem
    raise KeyError(name)


def select(patterns: list[str], problems: tuple[Problem, ...] = BENCHMARKS) -> list[Problem]:
    """The problems whose name matches one of the shell patterns, or which carry it as a tag."""
    return [p for p in problems if any(fnmatch.fnmatch(p.name, pattern) or pattern in p.tags for pattern in patterns)]
