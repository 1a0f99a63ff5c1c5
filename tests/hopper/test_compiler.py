"""Whether the compiler of this JAX moves registers between warpgroups: asked where a GPU is, and what follows."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_flash import AttentionSpec, Causal, device, dispatch
from pallas_flash.kernels.hopper import compiler, compiler_probe
from tests.hopper.offline import places

Q = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)
SPEC = AttentionSpec.of(Q, Q, Q, mask=Causal())
IGNORED = "ptxas info : (C7504) 'setmaxnreg' ignored"


@pytest.fixture
def newer(monkeypatch):
    """JAX 0.12 on a machine with a driver: a function that says what the process that compiles writes."""
    monkeypatch.setattr(jax, "__version__", "0.12.9")
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 9))
    monkeypatch.setattr(compiler, "_has_driver", lambda: True)

    def answers(program):
        monkeypatch.setattr(compiler, "COMMAND", (sys.executable, "-c", program))
        compiler._answer.cache_clear()
        dispatch._decide.cache_clear()
    yield answers
    compiler._answer.cache_clear()
    dispatch._decide.cache_clear()


def says(**line):
    return f"print('loading'); print({json.dumps(json.dumps(line))})"


def test_older_releases_and_machines_without_a_driver_are_not_asked(monkeypatch):
    monkeypatch.setattr(compiler, "_answer", None)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 9))
    monkeypatch.setattr(compiler, "_has_driver", lambda: True)
    assert compiler.why_not() is None
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(compiler, "_has_driver", lambda: False)
    assert compiler.why_not() is None


@pytest.mark.parametrize("line", [dict(has_gpu=True, moves_registers=True, report=""), dict(has_gpu=False)])
def test_a_compiler_that_does_is_used(newer, line):
    newer(says(**line))
    assert dispatch.decide(SPEC, device.H200).implementation.name == "hopper"


def test_one_that_does_not_leaves_the_kernels_with_mma(newer):
    newer(says(has_gpu=True, moves_registers=False, report=IGNORED))
    decision = dispatch.decide(SPEC, device.H200)
    assert decision.implementation.name == "ampere" and [row.name for row in decision.left] == ["hopper"]
    assert ("not 'hopper': needs a compiler that moves registers between warpgroups, that of jax 0.12.9 does not "
            f"({IGNORED}; install jax<0.12)") in str(decision)
    reasons = dispatch.get("hopper").why_not(SPEC, device.A100)
    assert reasons == ["needs compute capability 9.0, device has 8.0"], "the compiler is no reason on other GPUs"


@pytest.mark.parametrize(("program", "what"), [
    ("import sys; sys.exit('no plugin')", "ended with code 1, it wrote: no plugin"), ("", "ended with code 0"),
    ("print('{nonsense')", "could not ask that of jax 0.12.9")])
def test_one_of_which_nobody_knows_does_not_run(newer, program, what):
    newer(program)
    assert dispatch.decide(SPEC, device.H200).implementation.name == "ampere"
    assert what in compiler.why_not()


def test_it_is_asked_once(newer, tmp_path):
    newer(f"open({str(tmp_path / 'asked')!r}, 'a').write('x'); " + says(has_gpu=False))
    for _ in range(3):
        assert compiler.why_not() is None
    assert (tmp_path / "asked").read_text() == "x"


class FullGpu:
    """A driver of one Hopper GPU, in whose memory, or mode, there is no room for another context."""

    def cuDeviceGetCount(self, count):
        count._obj.value = 1
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {compiler_probe._MAJOR: 9, compiler_probe._MINOR: 0}[attribute]
        return 0

    def cuInit(self, *arguments):
        return 0

    cuDeviceGet = cuCtxSetCurrent = cuInit

    def cuDevicePrimaryCtxRetain(self, *arguments):
        return 2  # CUDA_ERROR_OUT_OF_MEMORY


def test_a_gpu_that_cannot_be_entered_is_not_taken_for_none(monkeypatch):
    """Regression: with a GPU whose memory was full the probe said that there is none, and kernels that spill ran."""
    monkeypatch.setattr(compiler_probe.ctypes, "CDLL", lambda name: FullGpu())
    with pytest.raises(SystemExit, match=r"context of GPU 0 could not be entered \(CUDA error 2\)"):
        compiler_probe.enter_context()


WHY_NOT = places.why_not()
VERSION = "import jax; print(*jax.__version_info__[:2])"


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.timeout(300)
def test_the_compiler_at_hand_is_read_rightly(tmp_path):
    """By the stand-in driver. That of 0.11 moves registers; of others the report of a real kernel says the same."""
    source, made = places.ROOT / "tests/bridge/driver.c", tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", made, source, "-ldl", "-lpthread"], check=True)
    ptxas = places.compilers()["pinned" if "pinned" in places.compilers() else "found"]
    environment = os.environ | {
        "PATH": f"{ptxas.parent}:{os.environ.get('PATH', '')}", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu",
        "LD_LIBRARY_PATH": f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}", "PYTHONPATH": str(places.ROOT),
        "MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTXAS": "1",
        "CUDA_ROOT": str(places.cuda_root() or ptxas.parent.parent)}
    run = lambda *what: subprocess.run([places.interpreter(), *what], env=environment, text=True, capture_output=True)
    done = run("-m", "pallas_flash.kernels.hopper.compiler_probe")
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["has_gpu"] and said["moves_registers"] == ("C7504" not in said["report"])
    if run("-c", VERSION).stdout.split() == ["0", "11"]:
        assert said["moves_registers"], said
    other = run("-c", "import os, runpy; os.environ['STAND_IN_CAPABILITY'] = '80'; "
                "runpy.run_module('pallas_flash.kernels.hopper.compiler_probe', run_name='__main__')")
    assert json.loads(other.stdout.splitlines()[-1]) == {"has_gpu": False}, other.stderr[-4000:]
