"""Every example runs to its end, small."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import compilation

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--steps=3", "--context=24", "--batch=2", "--dim=32", "--layers=1", "--heads=2", "--kv-heads=1"]


MESH = ["--steps=3", "--context=32", "--batch=4", "--dim=32", "--layers=1", "--heads=4", "--kv-heads=2"]


def start(script, *arguments, **variables):
    """Starts a script with these options and environment variables. On a CPU all but the first compile fast, instead of
    being fast.
    """
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    if script != "quickstart.py" and environment.get("JAX_PLATFORMS") == "cpu":
        environment |= compilation.variables(environment.get("XLA_FLAGS", ""))
    # on a Hopper GPU: heads of some small models are narrower than its kernels take, or float32
    strict = ["-W", "error", "-W", "ignore:implementation='xla' runs"]
    command = [sys.executable, *strict, str(EXAMPLES / script), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """What it printed."""
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return out


def run(script, *arguments, **variables):
    return finish(start(script, *arguments, **variables))


def virtual_devices(number):
    """The environment of a process with so many of them."""
    return dict(JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={number}")


def losses(records):
    """Those of each run, by the name of its attention."""
    return {run["attention"]: run["losses"] for run in map(json.loads, records.read_text().splitlines())}


def test_quickstart():
    assert "gradients (2, 512, 8, 64) (2, 512, 2, 64) (2, 512, 2, 64)" in run("quickstart.py")


def test_write_a_mask():
    assert "dv: relative difference from the reference" in run("write_a_mask.py")


def test_write_a_score():
    assert "dgains: relative difference from the reference" in run("write_a_score.py")


def test_train_gpt_compares_two_runs(tmp_path):
    pytest.importorskip("flax.nnx")
    plot, records = tmp_path / "images" / "loss.png", tmp_path / "runs.jsonl"
    out = run("train_gpt.py", *SMALL, "--dtype=bfloat16", "--remat", f"--save-plot={plot}", f"--json={records}")
    assert "largest difference of losses" in out and "implementation=" in out
    assert plot.exists() and len(records.read_text().splitlines()) == 2


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What a run on a mesh of eight devices and one on a single device printed, and their losses."""
    pytest.importorskip("flax.nnx")
    folder = tmp_path_factory.mktemp("mesh")
    records = folder / "runs.jsonl"
    out = run("train_gpt.py", *MESH, "--mesh=data=2,sequence=2,tensor=2", f"--save-plot={folder / 'loss.png'}",
              f"--json={records}", **virtual_devices(8))
    return out, losses(records)


def test_train_gpt_on_a_mesh_learns_as_on_one_device(one_process):
    """Positions or labels in another order than the tokens would train, too, to other losses."""
    out, of_runs = one_process
    assert "mesh and flash: largest difference of losses" in out and "float32" in out, "bfloat16 is for GPUs"
    np.testing.assert_allclose(of_runs["mesh"], of_runs["flash"], rtol=1e-5)


def test_train_gpt_in_two_processes_learns_as_in_one(one_process, tmp_path):
    """The sequence's two devices belong to different processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    records = tmp_path / "runs.jsonl"
    command = functools.partial(
        start, "train_gpt.py", *MESH, "--attention=mesh", "--mesh=sequence=2,tensor=2", "--strategy=ring",
        "--distributed", f"--coordinator-address={address}", "--num-processes=2",
        f"--save-plot={tmp_path / 'loss.png'}", f"--json={records}", **virtual_devices(2))
    processes = [command(f"--process-id={i}") for i in range(2)]
    try:
        assert ["mesh:" in finish(process) for process in processes] == [True, False]  # one of them reports
    finally:
        for process in processes:
            process.kill()
    np.testing.assert_allclose(losses(records)["mesh"], one_process[1]["flash"], rtol=1e-5)


def test_train_gpt_torch_compares_two_runs(tmp_path):
    pytest.importorskip("torch")
    out = run("train_gpt_torch.py", *SMALL, f"--save-plot={tmp_path / 'loss.png'}")
    assert "largest difference of losses" in out and "implementation=" in out


def test_generate_gives_the_same_with_a_cache_and_without():
    """In pages; contiguous it runs in `make demo`."""
    pytest.importorskip("flax.nnx")
    out = run("generate.py", "--steps=2", "--tokens=20", "--dim=32", "--layers=1", "--heads=2", "--kv-heads=1",
              "--page-size=16", "--dtype=float32")
    assert "with a cache:" in out and "100% of the texts are the same" in out and "pages=24x16" in out


def test_generate_transformers_writes_what_eager_writes():
    pytest.importorskip("transformers")
    out = run("generate_transformers.py", "--tokens=3", "--dim=32", "--layers=1", **virtual_devices(1),
              CUDA_VISIBLE_DEVICES="")  # JAX is told to use the CPU, so PyTorch has to, too
    assert "eager and pallas: 100% of the tokens are the same" in out and "forward, xla" in out
