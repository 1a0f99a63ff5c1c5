"""What a type checker tells users: their code under `mypy --strict`, and README's snippets."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("mypy")
ROOT = pathlib.Path(__file__).parents[1]

PRELUDE = """
import torch
query = key = value = torch.zeros(1, 2, 8, 16)
"""  # what a snippet of README takes as given

GOOD = """
import dataclasses
import functools
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import pallas_flash as pf
from pallas_flash import cache
from pallas_flash.flax import attention_fn


def bent(score: jax.Array, batch: jax.Array, head: jax.Array, q_pos: jax.Array, kv_pos: jax.Array) -> jax.Array:
    return jnp.where(q_pos < kv_pos, jnp.tanh(score), score)


def bent_by(by: float, score: Any, batch: ArrayLike, head: ArrayLike, q_pos: ArrayLike, kv_pos: ArrayLike) -> Any:
    return by * score


@dataclasses.dataclass(frozen=True)
class Both(pf.Score):
    inner: pf.Score
    slope: jax.Array

    def __call__(self, score: Any, batch: jax.Array, head: jax.Array, q_pos: jax.Array, kv_pos: jax.Array) -> jax.Array:
        return 2 * self.inner(score, batch, head, q_pos, kv_pos) - self.slope[head]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, shape: jax.ShapeDtypeStruct, with_lse: bool) -> None:
    assert_type(pf.flash_attention(q, k, v), jax.Array)
    assert_type(pf.flash_attention(q, k, v, mask=pf.Causal() & pf.Window(left=3), return_lse=False), jax.Array)
    assert_type(pf.flash_attention(q, k, v, return_lse=True), tuple[jax.Array, jax.Array])
    assert_type(pf.flash_attention(q, k, v, return_lse=with_lse), jax.Array | tuple[jax.Array, jax.Array])
    assert_type(pf.dot_product_attention(q, k, v, None, q > 0, is_causal=True), jax.Array)
    assert_type(pf.dot_product_attention(q, k, v, return_residual=True, sinks=q), tuple[jax.Array, jax.Array])
    assert_type(pf.flash_attention(q, k, v, sinks=np.zeros(2, "float32")), jax.Array)
    out, lse = pf.flash_attention(q, k, v, return_lse=True, implementation="xla", layout="BHLD")
    assert_type(lse, jax.Array)
    pf.flash_attention(np.zeros((1, 8, 2, 4)), k, v, kv_lengths=3, q_lengths=[3, 4], segment_ids=[[0] * 8])
    pf.flash_attention(q, k, v, kv_lengths=jnp.ones(1, int), segment_ids=(np.zeros((1, 8), int), q.astype(int)))
    pf.flash_attention(q, k, v, bias=q, dropout_rate=0.5, dropout_rng=jax.random.key(0), scale=1, softcap=30)
    pf.flash_attention(q, k, v, cu_seqlens_q=[0, 8], cu_seqlens_kv=np.array([0, 8]), max_seqlen_q=8, alignment="last")
    pf.flash_attention(q, k, v, score=lambda score, batch, head, q_pos, kv_pos: jnp.tanh(score))
    pf.flash_attention(q, k, v, score=lambda score, batch, head, q_pos, kv_pos: 0.5)
    pf.flash_attention(q, k, v, score=bent)
    pf.flash_attention(q, k, v, score=functools.partial(bent_by, 0.5))
    pf.flash_attention(q, k, v, score=Both(pf.ALiBi(q, offset=np.zeros(2, int)), q))
    pf.flash_attention(q, k, v, score=pf.RelativeBias.t5(q, bidirectional=False))
    pf.explain(q, k, v, score=pf.RelativeBias(shape, zero=3, offset=shape))
    pf.explain(shape, k, v, cu_seqlens_q=shape, score=pf.ALiBi(pf.alibi_slopes(2)))
    assert_type(pf.explain(shape, k, v, implementation=None, device=pf.device.H200), str)
    assert_type(pf.dot_product_attention(q, k, v, implementation=("hopper", "reference")), jax.Array)
    pf.check_mask(pf.PrefixLM(3), 8, 8)
    attention_fn(mask=pf.Causal(), implementation="reference")
    attention_fn(implementation=("xla",))
    attention_fn(context_parallel=pf.ContextParallel("sequence", "ring", load_balance=None))
    assert_type(pf.context_parallel_attention(q, k, v, axis_name="sequence"), jax.Array)
    assert_type(pf.context_parallel_attention(q, k, v, axis_name="i", return_lse=True), tuple[jax.Array, jax.Array])
    assert_type(pf.reorder(q, 4), jax.Array)
    batch: np.ndarray[Any, Any] = pf.reorder(np.zeros((1, 8)), 4, load_balance="zigzag_documents", cu_seqlens=[0, 8])
    pf.reorder(batch, 4, axis=0, inverse=True, load_balance=None)
    assert_type(pf.positions("sequence", 8), jax.Array)
    pf.positions("sequence", 8, load_balance="zigzag_documents", cu_seqlens=jnp.array([0, 8]))
    kv = cache.empty_paged([[0, 1], [2, 3]], pages=(4, 16), kv_heads=2, d=8)
    kv = cache.append(cache.Cache(k, v, [1, 1], kv.page_table), k, np.asarray(v))
    assert_type(cache.attend(q, kv, mask=pf.Causal(), softcap=2), jax.Array)
    mean = lambda q: pf.flash_attention(q, k, v).mean()
    jax.grad(mean)(q)
"""

BAD = (
    'implementation="cudnn"', 'implementation=("cudnn",)', 'layout="LBHD"', "mask=q > 0", "bias=[[0.0]]", "causal=True",
    'deterministic="no"', "segment_ids=0.5", "kv_lengths=[0.5]", "scale=q",
    "score=lambda score: score", 'score=lambda score, batch, head, q_pos, kv_pos: "score"', "score=pf.ALiBi([0.5])",
)


def check(tmp_path, files):
    """mypy's findings for files of user code, by file."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = ["--strict", "--config-file=", "--no-error-summary", "--follow-imports=silent",
               "--untyped-calls-exclude=jax"]  # PartitionSpec has no types
    command = [sys.executable, "-m", "mypy", *options, f"--cache-dir={tmp_path / 'cache'}", *files]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    return {name: [line for line in lines if line.startswith(f"{name}:")] for name in files}, lines


def snippets():
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_user_code_under_strict(tmp_path):
    """Regression: flash_attention returned Any and took anything."""
    call = "import jax\nimport pallas_flash as pf\nq = jax.numpy.zeros((1, 8, 2, 4))\npf.flash_attention(q, q, q, {})\n"
    bad = {f"bad{i}.py": call.format(argument) for i, argument in enumerate(BAD)}
    in_torch = [snippet for snippet in snippets() if "torch_bridge" in snippet]
    in_jax = [snippet for snippet in snippets() if "torch_bridge" not in snippet]  # each goes on from the one before
    good = {"good.py": GOOD, "jax_readme.py": "\n".join(in_jax)} | {
        f"torch_readme{i}.py": PRELUDE + snippet for i, snippet in enumerate(in_torch)}
    found, lines = check(tmp_path, good | bad)
    assert "import pallas_flash as pf" in good["jax_readme.py"] and in_torch
    assert {name: found[name] for name in good} == {name: [] for name in good}
    for name, argument in zip(bad, BAD, strict=True):
        assert any(line.startswith(f"{name}:4: error:") for line in found[name]), f"{argument}: {found[name]}"
    assert all(line.startswith("bad") for line in lines), lines
