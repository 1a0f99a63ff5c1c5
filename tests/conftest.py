"""Every test runs with strict dtype and rank promotion, on eight virtual CPU devices where there is no GPU."""

import faulthandler
import gc
import itertools
import os
import subprocess
from pathlib import Path
from typing import Any

import jax  # reads the flags below when it starts, not when it is imported
import pytest

from tests import compilation


def driver_runs() -> bool:
    """True where nvidia-smi lists a GPU."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).stdout.startswith(b"GPU ")
    except (OSError, subprocess.TimeoutExpired):
        return False


VIRTUAL_DEVICES = 8
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if "JAX_PLATFORMS" not in os.environ and not driver_runs():
    # The CUDA plugin of JAX 0.11, where it is installed, crashes without a driver.
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={VIRTUAL_DEVICES}')

compilation.install()
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def has_hopper() -> bool:
    """True where JAX's first device is a Hopper GPU."""
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a Hopper GPU; elsewhere they are skipped.

    Those marked `interpreted` need JAX without a GPU: each warpgroup of an interpreted kernel is a thread that runs a
    program of its own on the default device, and on one GPU they would wait for each other for ever. Those marked
    `virtual` need several devices; a CPU has as many as are asked for.

    Tests that name no implementation run what this machine has: a Hopper GPU's kernels where they can, "xla" elsewhere.
    That is no error of theirs.
    """
    lacking = {} if has_hopper() else {"gpu": "needs a Hopper GPU"}
    if jax.default_backend() == "gpu":
        lacking["interpreted"] = "needs JAX_PLATFORMS=cpu"
    if jax.device_count() < VIRTUAL_DEVICES:
        lacking["virtual"] = f"needs {VIRTUAL_DEVICES} devices: JAX_PLATFORMS=cpu gives virtual ones"
    for item in items:
        if has_hopper():
            item.add_marker(pytest.mark.filterwarnings("ignore::pallas_flash.FallbackWarning"), append=False)
        for marker in lacking.keys() & item.keywords.keys():
            item.add_marker(pytest.mark.skip(reason=lacking[marker]))


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not look at it after each few calls of Python.

    It took 7 % of the time of tracing and compiling a problem.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """On a CPU nearly all the time goes into compiling, and the machine code need not be fast: most optimisations are
    off, but in tests marked `optimised`.
    """
    optimise(jax.default_backend() != "cpu" or item.get_closest_marker("optimised") is not None)


def optimise(on: bool) -> None:
    """Whether XLA optimises from now on. JAX keeps programs whatever the flag was: those made without are forgotten."""
    if on and jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", not on)


MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000
"""Ranges of memory of a process: Linux allows 65,530, and each program compiled for a CPU takes a few."""


def free_programs(most: int = MOST_MAPS) -> None:
    """Frees what JAX has compiled where this process has more ranges of memory than `most`.

    At Linux's limit the next compilation ends the process with a segmentation fault.
    """
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > most:
        jax.clear_caches()
        gc.collect()


_finished = itertools.count(1)


def pytest_runtest_logfinish() -> None:
    """Looks after every tenth test: an interpreted kernel takes up to 1,000 ranges."""
    if next(_finished) % 10 == 0:
        free_programs()


_STDERR = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keeps stderr as it is before pytest captures it, for what a worker says of its end."""
    config.stash[_STDERR] = os.dup(2)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Any:
    """A worker of pytest-xdist that runs out of time ends without a word: pytest-timeout writes to a stream that
    nothing reads there. So where its threads are goes to stderr half a second before.
    """
    if hasattr(item.config, "workerinput") and settings.timeout > 0:
        faulthandler.dump_traceback_later(max(settings.timeout - 0.5, 0.1), file=item.config.stash[_STDERR])
    return (yield)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> Any:
    """The test has ended in time."""
    if hasattr(item.config, "workerinput"):
        faulthandler.cancel_dump_traceback_later()
    return (yield)


@pytest.fixture(scope="session")
def offline_tools(tmp_path_factory):
    """The processes that compile kernels without a GPU."""
    from tests.hopper.offline.tools import Tools
    tools = Tools(tmp_path_factory.mktemp("offline"))
    yield tools
    tools.close()


@pytest.fixture
def x64():
    """float64 arrays for the time of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def full_precision():
    """What is compared with ours multiplies float32 in float32, also on a GPU."""
    with jax.default_matmul_precision("float32"):
        yield


@pytest.fixture(scope="module")
def small_tiles():
    """The XLA kernels loop over tiles of 8 positions: theirs are larger than the problems of these tests."""
    from pallas_flash import autodiff
    from pallas_flash.kernels.xla import schedule

    def forget():  # programs are kept by spec, and the size of a tile is not in it
        autodiff.forward.clear_cache()
        autodiff.backward.clear_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "TARGET_BLOCK", 8)
        forget()
        yield
        forget()
