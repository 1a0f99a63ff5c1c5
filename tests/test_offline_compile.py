"""Every shipped schedule of the Hopper kernels compiles for sm_90a, without a GPU: no spills, nothing serialised, the
descriptors of wgmma in uniform registers.

ptxas says so itself: C7504, C7507 (register reallocation ignored), C7510 to C7515 and C7520 (wgmma serialised). Such a
kernel would still be right, at half the speed; one that moves descriptors in each step is 5 to 14 % slower
(docs/notes/hopper_forward.md, 2026-11-25).
"""

import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_flash.testing import problems
from tests.offline import compile_kernels

ROOT = Path(__file__).parent.parent
REJECTED = {"C7504", "C7507", *(f"C75{n}" for n in range(10, 16)), "C7520"}
MOVED_DESCRIPTORS = 15  # up to 11 where uniform registers run out, behind the products; gone wrong, 27 and more
HAS_COMPILER = bool(importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13"))

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64",
                       reason="jax[cuda13] is for Linux on x86-64"),
    pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="JAX 0.12 ignores setmaxnreg (C7504)"),
    pytest.mark.skipif(not HAS_COMPILER, reason="needs the compiler of jax[cuda13]"),
]

NAMES = [*(f"{problem.name}+gradients" for problem in problems.BENCHMARKS
           if "gpu" in problem.tags and (problem.q_len == 2048 or problem.q_len % 128)),
         "causal-d128-s512+gradients", *(f"causal-d{d}-s2048+gradients+deterministic" for d in (64, 128)),
         *(f"causal-d{d}-s2048+gradients+softcap" for d in (64, 128, 256)),
         *(f"causal-d{d}-s2048+gradients+softcap+deterministic" for d in (64, 128)),
         *(f"causal-d{d}-s2048+gradients+ragged" for d in (96, 256)), "causal-d256-s2048+gradients+softcap+ragged"]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_schedule_compiles_clean(tmp_path, name):
    """In a process and a folder for each name, so that test processes share the work."""
    done = subprocess.run([sys.executable, "-m", "tests.offline.compile_kernels", name], cwd=ROOT, text=True,
                          env=compile_kernels.environment(tmp_path), capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    mine = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert mine, "no kernel was lowered"
    assert any(report["multiplies"] for report in mine), "the machine code is missing"
    for report in mine:
        assert report["compiled"], report
        assert report["registers"], "ptxas' report is missing"
        assert report["spill_bytes"] == 0, report
        assert not REJECTED & set(report["advice"]), report
        assert not report["multiplies"] or report["moved_descriptors"] is not None, "no innermost loop multiplies"
        assert (report["moved_descriptors"] or 0) <= MOVED_DESCRIPTORS, report
