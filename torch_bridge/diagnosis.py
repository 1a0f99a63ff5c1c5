"""What a problem report needs: versions, devices, settings, loaded CUDA libraries, and what a typical call runs."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from torch_bridge import explanation, memory

__all__ = ["report"]

PACKAGES = ("pallas_flash", "torch", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "numpy")
SETTINGS = (*memory.CHOICES, "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "XLA_FLAGS", "PYTORCH_CUDA_ALLOC_CONF")
LIBRARIES = ("libcudart", "libcublas", "libcudnn", "libcuda.so", "libnccl", "libcupti", "xla_cuda_plugin")


def report() -> str:
    """The whole diagnosis as text; runs nothing but starts both runtimes."""
    sections = {"versions": _versions(), "devices": _devices(), "settings": _settings(),
                "loaded CUDA libraries": _libraries(), "a causal call in bfloat16": _decision()}
    return "\n".join(line for title, lines in sections.items() for line in (f"{title}:", *(f"  {x}" for x in lines)))


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{package} is not installed"
    yield f"torch was built for CUDA {torch.version.cuda}"


def _devices() -> Iterator[str]:
    from torch_bridge import exchange

    yield f"torch: {torch.cuda.device_count()} CUDA devices"
    for index in range(torch.cuda.device_count()):
        free, total = (x / 2**30 for x in torch.cuda.mem_get_info(index))
        major, minor = torch.cuda.get_device_capability(index)
        yield f"  cuda:{index} {torch.cuda.get_device_name(index)}, {major}.{minor}, {free:.1f} of {total:.1f} GiB free"
    for place in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        try:
            yield f"JAX, for tensors on {place}: {exchange.jax_device(torch.device(place))}"
        except RuntimeError as error:
            yield f"JAX, for tensors on {place}: {error}"


def _settings() -> Iterator[str]:
    for name in SETTINGS:
        yield f"{name}={os.environ[name]}" if name in os.environ else f"{name} is not set"


def _libraries() -> Iterator[str]:
    """The CUDA libraries that this process has mapped: two versions of one library are a common cause of trouble."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        yield "not known on this system"
        return
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "/" in line}
    found = sorted(path for path in paths if any(name in path for name in LIBRARIES))
    yield from found or ["none"]


def _decision() -> Iterator[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.empty((1, 2048, 16, 128), dtype=torch.bfloat16, device=device).transpose(1, 2)
    try:
        yield from explanation.explain(x, x, x, is_causal=True).splitlines()
    except RuntimeError as error:
        yield f"RuntimeError: {error}"
