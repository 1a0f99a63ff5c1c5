"""Every example runs to its end, small."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--steps=3", "--context=24", "--batch=2", "--dim=32", "--layers=1", "--heads=2", "--kv-heads=1"]


def run(script, *arguments):
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart():
    assert "gradients (2, 512, 8, 64) (2, 512, 2, 64) (2, 512, 2, 64)" in run("quickstart.py")


def test_write_a_mask():
    assert "dv: relative difference from the reference" in run("write_a_mask.py")


def test_train_gpt_compares_two_runs(tmp_path):
    pytest.importorskip("flax.nnx")
    plot, records = tmp_path / "images" / "loss.png", tmp_path / "runs.jsonl"
    out = run("train_gpt.py", *SMALL, "--dtype=bfloat16", "--remat", f"--save-plot={plot}", f"--json={records}")
    assert "largest difference of losses" in out and "implementation=" in out
    assert plot.exists() and len(records.read_text().splitlines()) == 2


def test_train_gpt_torch_compares_two_runs(tmp_path):
    pytest.importorskip("torch")
    out = run("train_gpt_torch.py", *SMALL, f"--save-plot={tmp_path / 'loss.png'}")
    assert "largest difference of losses" in out and "implementation=" in out
