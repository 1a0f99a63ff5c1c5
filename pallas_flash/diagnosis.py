"""What a problem report needs: versions, compilers, settings, devices, and what a typical call runs.

Questions that may crash the process (starting a runtime on a machine with another driver, or none) are asked in a child
process: if it dies, the report says so in a line.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

__all__ = ["answer", "asked", "ends_with_its_reader", "libraries", "ptxas", "ptxas_places", "ptxas_version", "report",
           "section", "settings", "versions"]

PACKAGES = ("pallas_flash", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "numpy",
            "flax")
SETTINGS = ("JAX_PLATFORMS", "XLA_FLAGS", "CUDA_VISIBLE_DEVICES", "CUDA_ROOT", "LD_LIBRARY_PATH", "JAX_ENABLE_X64",
            "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION")
LIBRARIES = ("libcudart", "libcublas", "libcudnn", "libcuda.so", "libnccl", "libcupti", "xla_cuda_plugin")
SECONDS = 300


def report() -> str:
    """The diagnosis of the JAX side as text; runs nothing but starts JAX, in a child process."""
    lines = (*section("versions", versions(PACKAGES)), *section("ptxas, which compiles the kernels", ptxas()),
             *section("settings", settings(SETTINGS)), *asked("pallas_flash.diagnosis", QUESTIONS))
    return "\n".join(lines)


@contextlib.contextmanager
def ends_with_its_reader() -> Iterator[None]:
    """Of a command: if nobody reads its output any more, as behind `| head`, it ends without a traceback, status 1."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed when Python ends
        sys.exit(1)


def section(title: str, lines: Iterable[str]) -> Iterator[str]:
    """A title and the indented lines below it."""
    yield f"{title}:"
    yield from (f"  {line}" for line in lines)


def versions(packages: Sequence[str]) -> Iterator[str]:
    """Python, the system, and the installed version of each package."""
    yield f"python {platform.python_version()} on {platform.platform()}"
    for package in packages:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{package} is not installed"


def settings(names: Sequence[str]) -> Iterator[str]:
    """The value of each environment variable."""
    for name in names:
        yield f"{name}={os.environ[name]}" if name in os.environ else f"{name} is not set"


def libraries() -> Iterator[str]:
    """The CUDA libraries that this process has mapped: two versions of one library are a common cause of trouble."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        yield "not known on this system"
        return
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "/" in line}
    found = sorted(path for path in paths if any(name in path for name in LIBRARIES))
    yield from found or ["none"]


# --- ptxas -----------------------------------------------------------------------------------------------------------


def ptxas_places() -> list[Path]:
    """The existing files among those that JAX 0.11 tries for ptxas, in its order (read from its system calls): it calls
    the first. The wheel nvidia-cuda-nvcc comes last, behind PATH and the usual places of a CUDA toolkit.
    """
    roots = [Path("cuda_sdk_lib/bin"), *(Path(p) for p in os.environ.get("PATH", "").split(os.pathsep) if p),
             Path("/usr/local/cuda/bin"), Path("/opt/cuda/bin")]
    wheels = find_spec("nvidia")
    roots += [Path(place, "cu13", "bin") for place in (wheels and wheels.submodule_search_locations) or ()]
    return [path for root in dict.fromkeys(roots) if (path := root.absolute() / "ptxas").exists()]


def ptxas_version(path: Path) -> str | None:
    """The version that a ptxas says it has, e.g. "13.5.37"; None if it does not run."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"V(\d[\d.]*)", done.stdout)
    return found[1] if found else None


def ptxas() -> Iterator[str]:
    """The ptxas that JAX calls for the kernels, then those that it would call if that one were not there."""
    places = ptxas_places()
    for i, path in enumerate(places):
        yield f"{ptxas_version(path) or 'of no known version'}, {path}{', not used: another comes first' if i else ''}"
    if not places:
        yield "none is found: only needed on a GPU, where jax[cuda13] brings one"


# --- questions to a child process ------------------------------------------------------------------------------------


def asked(module: str, titles: Iterable[str]) -> Iterator[str]:
    """The sections `titles` of `module.QUESTIONS`, answered in a child process.

    Where the child dies, that is said, and what is left is asked once more with JAX on the CPU alone.
    """
    titles = list(titles)
    lines, death = _ask(module, titles, {})
    yield from lines
    if death is None:
        return
    yield from (f"  {line}" for line in death)
    reached = next((line[:-1] for line in reversed(lines) if line.endswith(":") and line[:-1] in titles), titles[0])
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        yield f"not asked after that: {', '.join(titles[titles.index(reached) + 1:]) or 'nothing'}"
        return
    lines, death = _ask(module, titles[titles.index(reached):], {"JAX_PLATFORMS": "cpu"})
    yield from (f"{line[:-1]}, with JAX_PLATFORMS=cpu:" if line[:-1] in titles else line for line in lines)
    yield from (f"  {line}" for line in death or ())


def answer(module: str, titles: Sequence[str]) -> None:
    """Prints sections of `module.QUESTIONS`, line by line: what is printed stays if the next line ends the process."""
    questions: Mapping[str, Callable[[], Iterable[str]]] = import_module(module).QUESTIONS
    for title in titles:
        print(f"{title}:", flush=True)
        try:
            for line in questions[title]():
                print(f"  {line}", flush=True)
        except Exception as error:
            print(f"  {type(error).__name__}: {error}", flush=True)


def _ask(module: str, titles: Sequence[str], changes: Mapping[str, str]) -> tuple[list[str], list[str] | None]:
    """The lines that a child printed, and how it died; None for that if it did not."""
    program = f"from pallas_flash.diagnosis import answer; answer({module!r}, {list(titles)!r})"
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **changes,
                   "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment) as child:
        try:
            out, err = child.communicate(timeout=SECONDS)
            how = _death(child.returncode)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            how = f"it did not answer in {SECONDS} s"
    if how is None:
        return out.splitlines(), None
    last = [line for line in err.splitlines() if line.strip()][-3:]
    return out.splitlines(), [f"the process that was asked died: {how}", *last, *_advice()]


def _death(code: int) -> str | None:
    """How a process ended, from its exit code: None for a good end, else the name of its signal."""
    if code == 0:
        return None
    try:
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    except ValueError:
        return f"signal {-code}"


def _advice() -> Iterator[str]:
    if find_spec("jax_plugins") is None or os.environ.get("JAX_PLATFORMS") == "cpu":
        return
    if shutil.which("nvidia-smi") is None:
        yield ("JAX's CUDA plugin is installed and crashes where there is no NVIDIA driver: set JAX_PLATFORMS=cpu, or "
               "run `pip uninstall jax-cuda13-plugin jax-cuda13-pjrt`.")
    else:
        yield ("JAX's CUDA plugin needs an NVIDIA driver >= 580 (`nvidia-smi` prints it) and a GPU; JAX_PLATFORMS=cpu "
               "leaves it out.")


def _devices() -> Iterator[str]:
    import jax

    from pallas_flash import device

    for found in jax.devices():
        seen = device.of(found)
        capability = f", compute capability {'.'.join(map(str, seen.capability))}" if seen.capability else ""
        yield f"{found}: {found.device_kind}{capability}"


def _decision() -> Iterator[str]:
    import jax

    from pallas_flash import attention, masks

    x = jax.ShapeDtypeStruct((1, 2048, 16, 128), "bfloat16")
    yield from attention.explain(x, x, x, mask=masks.Causal()).splitlines()


QUESTIONS: Mapping[str, Callable[[], Iterable[str]]] = {
    "devices": _devices, "loaded CUDA libraries": libraries, "a causal call in bfloat16": _decision,
}
