"""A sequence over two processes on a CPU (gloo): the ring that docs/torch_bridge.md shows, and torch's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed

from bridge.problems import OURS, TORCH, UNIT, assert_within_budget, results

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

SIZE, LENGTH = 2, 256
ROOT = Path(__file__).parents[2]
WORKER, DOCS = Path(__file__).with_name("ring_worker.py"), ROOT / "docs/torch_bridge.md"


@pytest.fixture(scope="module")
def case():
    """query, key, value and dout in float64, with values that bfloat16 holds."""
    torch.manual_seed(0)
    shapes = (1, 4, LENGTH, 16), (1, 2, LENGTH, 16), (1, 2, LENGTH, 8), (1, 4, LENGTH, 8)
    return [torch.randn(shape).bfloat16().double() for shape in shapes]


@pytest.fixture(scope="module")
def found(case, tmp_path_factory):
    """out, dq, dk and dv by kind of ring, put together from the processes."""
    folder = tmp_path_factory.mktemp("ring")
    (ring,) = (code for code in re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)
               if "ring_attention" in code)
    (folder / "ring.py").write_text(ring)
    torch.save(case, folder / "case.pt")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    workers = [subprocess.Popen([sys.executable, str(WORKER), str(rank), str(SIZE), str(folder)], env=environment,
                                stderr=subprocess.PIPE, text=True) for rank in range(SIZE)]
    try:
        errors = [worker.communicate(timeout=150)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * SIZE, "\n".join(errors)
    parts = [torch.load(folder / f"found{rank}.pt") for rank in range(SIZE)]
    return {kind: [in_order(x) for x in zip(*(part[kind] for part in parts), strict=True)] for kind in parts[0]}


def in_order(parts):
    """The whole of zigzag parts."""
    halves = [part.chunk(2, dim=2) for part in parts]
    return torch.cat([*(first for first, _ in halves), *(second for _, second in reversed(halves))], dim=2)


def whole(function, case, dtype):
    *tensors, dout = (x.to(dtype) for x in case)
    return results(function, [x.requires_grad_() for x in tensors], dout, is_causal=True, enable_gqa=True)


def test_the_ring_of_the_docs_is_exact(found, case):
    for ours, expected in zip(found[torch.float64], whole(TORCH, case, torch.float64), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_the_ring_of_the_docs_rounds_once(found, case):
    """In bfloat16 the error is that of one process: parts are summed in float32."""
    single, truth = whole(OURS, case, torch.bfloat16), whole(OURS, case, torch.float64)
    for name, a, b, exact in zip(("out", "dq", "dk", "dv"), found[torch.bfloat16], single, truth, strict=True):
        error, limit = ((x.double() - exact).norm() for x in (a, b))
        assert a.dtype == torch.bfloat16 and error <= 1.05 * limit, f"{name}: {error / limit:.3f}"


def test_torchs_ring_runs_what_activate_registers(found, case):
    """Regression: gradients were those of each part's own softmax."""
    heads = case[0].shape[1]
    repeated = [x.repeat_interleave(heads // x.shape[1], dim=1) for x in case]
    assert_within_budget(found["torch"], whole(TORCH, repeated, torch.float32), whole(TORCH, repeated, torch.float64),
                         UNIT[torch.float32])
