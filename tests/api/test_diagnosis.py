"""`python -m pallas_flash` and `python -m torch_bridge` say what runs, and whatever dies is a line of theirs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bench import environment
from pallas_flash import diagnosis

ROOT = Path(__file__).parents[2]
MODULE = """\
import os, signal, time

def fine():
    yield "all is well"

def deadly():
    yield "about to start"
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        {death}
    yield "started"

def wrong():
    yield from ()
    raise RuntimeError("no such device")

QUESTIONS = {{"fine": fine, "deadly": deadly, "wrong": wrong, "last": fine}}
"""


@pytest.mark.parametrize("command", [["pallas_flash"], ["pallas_flash", "--help"], ["pallas_flash", "check"],
                                     ["torch_bridge"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(command):
    """Regression: `python -m pallas_flash | head` ended in a traceback of a BrokenPipeError."""
    read, write = os.pipe()
    os.close(read)
    try:
        found = subprocess.run([sys.executable, "-m", *command], stdout=write, stderr=subprocess.PIPE, text=True,
                               cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=300)
    finally:
        os.close(write)
    assert "Traceback" not in found.stderr and "BrokenPipe" not in found.stderr and found.returncode == 1


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """A module whose second question ends the process in the way given."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    def write(death):
        (tmp_path / "some_questions.py").write_text(MODULE.format(death=death))
        return list(diagnosis.asked("some_questions", ["fine", "deadly", "wrong", "last"]))
    return write


@pytest.mark.parametrize(("death", "name"), [
    ("os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV"), ("os.abort()", "signal SIGABRT"),
    ("os._exit(3)", "exit code 3"), ("time.sleep(100)", "did not answer in 20 s")])
def test_a_death_is_a_line(questions, monkeypatch, death, name):
    """Regression: the diagnosis ended without a word where starting JAX ends the process."""
    if "sleep" in death:  # not less: on a busy machine, a process takes seconds to start
        monkeypatch.setattr(diagnosis, "SECONDS", 20)
    lines = questions(death)
    assert lines[:4] == ["fine:", "  all is well", "deadly:", "  about to start"]
    assert name in lines[4]
    again = lines.index("deadly, with JAX_PLATFORMS=cpu:")
    assert lines[again:] == ["deadly, with JAX_PLATFORMS=cpu:", "  about to start", "  started",
                             "wrong, with JAX_PLATFORMS=cpu:", "  RuntimeError: no such device",
                             "last, with JAX_PLATFORMS=cpu:", "  all is well"]


def test_what_dies_on_the_cpu_too_is_not_asked_again(questions, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    lines = questions("pass\n    os.abort()")
    assert "SIGABRT" in lines[4] and lines[-1] == "not asked after that: wrong, last"


def test_without_a_death_every_section_is_there_once(questions):
    assert [line for line in questions("pass") if not line.startswith(" ")] == ["fine:", "deadly:", "wrong:", "last:"]


def program(path, version):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version[:4]}, V{version}'\n")
    path.chmod(0o755)


def test_ptxas_is_the_one_that_jax_calls(tmp_path, monkeypatch):
    """Regression: records named the wheel's ptxas while the one on PATH compiled the kernels."""
    monkeypatch.chdir(tmp_path)
    program(tmp_path / "first" / "ptxas", "13.1.2")
    program(tmp_path / "second" / "ptxas", "13.0.88")
    monkeypatch.setenv("PATH", f"{tmp_path}/none:{tmp_path}/first:{tmp_path}/second:{os.environ['PATH']}")
    lines = list(diagnosis.ptxas())
    assert lines[0] == f"13.1.2, {tmp_path}/first/ptxas"
    assert lines[1] == f"13.0.88, {tmp_path}/second/ptxas, not used: another comes first"
    assert environment._ptxas() == ("13.1.2", f"{tmp_path}/first/ptxas")
    program(tmp_path / "cuda_sdk_lib" / "bin" / "ptxas", "12.9.1")
    assert environment._ptxas()[0] == "12.9.1"


def test_a_ptxas_that_does_not_run_has_no_version(tmp_path):
    (tmp_path / "ptxas").write_text("not a program")
    assert diagnosis.ptxas_version(tmp_path / "ptxas") is None


def by_hand(*arguments, cwd=ROOT):
    """A Python process as a user starts it: none of the variables that make and pytest set."""
    hidden = ("JAX_", "XLA_FLAGS", "PYTEST_", "PYTHON")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    clean |= {"PYTHONPATH": str(ROOT), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("package", ["pallas_flash", "torch_bridge"])
def test_the_diagnosis_by_hand(package):
    if package == "torch_bridge":
        pytest.importorskip("torch")
    text = by_hand("-m", package)
    for expected in (f"jax {jax.__version__}", "ptxas", "JAX_PLATFORMS is not set", "devices:", "implementation="):
        assert expected in text
    assert "died" not in text


def snippets():
    """README's Python code: each block goes on where the one before it ended."""
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    return "\n".join(block.split("```")[0] for block in blocks)


def test_the_snippets_of_readme_by_hand(tmp_path):
    """Regression: on a machine without a GPU they ended in a segmentation fault, in the environment that make makes."""
    for package in ("flax", "torch"):
        pytest.importorskip(package)
    by_hand("-W", "error", "-c", snippets(), cwd=tmp_path)


def test_the_quickstart_by_hand(tmp_path):
    assert "implementation=" in by_hand(ROOT / "examples" / "quickstart.py", cwd=tmp_path)


def test_the_bridge_without_torch_says_what_to_install():
    hide = "import sys; sys.modules['torch'] = None; import torch_bridge"
    done = subprocess.run([sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'ModuleNotFoundError: torch_bridge needs PyTorch: pip install "pallas_flash[torch]"' in done.stderr
