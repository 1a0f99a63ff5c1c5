"""What a problem report needs: versions, compilers, settings, devices of both sides, loaded CUDA libraries, and what a
typical call runs. Questions that may crash the process are asked in a child process (pallas_flash/diagnosis.py)."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from pallas_flash import diagnosis
from torch_bridge import explanation, memory
from torch_bridge.direct import attention, cache

__all__ = ["report"]

PACKAGES = ("torch", *diagnosis.PACKAGES)
SETTINGS = tuple(dict.fromkeys((*diagnosis.SETTINGS, *memory.CHOICES, "PYTORCH_CUDA_ALLOC_CONF",
                                attention.VARIABLE, cache.VARIABLE)))


def report() -> str:
    """The whole diagnosis as text; runs nothing but starts both runtimes, in a child process."""
    versions = (*diagnosis.versions(PACKAGES), f"torch was built for CUDA {torch.version.cuda}")
    lines = (*diagnosis.section("versions", versions),
             *diagnosis.section("ptxas, which compiles the kernels", diagnosis.ptxas()),
             *diagnosis.section("settings", diagnosis.settings(SETTINGS)),
             *diagnosis.asked("torch_bridge.diagnosis", QUESTIONS))
    return "\n".join(lines)


def _torch_devices() -> Iterator[str]:
    yield f"{torch.cuda.device_count()} CUDA devices"
    for index in range(torch.cuda.device_count()):
        free, total = (x / 2**30 for x in torch.cuda.mem_get_info(index))
        major, minor = torch.cuda.get_device_capability(index)
        yield f"cuda:{index} {torch.cuda.get_device_name(index)}, {major}.{minor}, {free:.1f} of {total:.1f} GiB free"


def _jax_devices() -> Iterator[str]:
    from torch_bridge import exchange

    for place in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        try:
            yield f"for tensors on {place}: {exchange.jax_device(torch.device(place))}"
        except RuntimeError as error:
            yield f"for tensors on {place}: {error}"


def _decision() -> Iterator[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.empty((1, 2048, 16, 128), dtype=torch.bfloat16, device=device).transpose(1, 2)
    try:
        yield from explanation.explain(x, x, x, is_causal=True).splitlines()
    except RuntimeError as error:
        yield f"RuntimeError: {error}"


QUESTIONS: Mapping[str, Callable[[], Iterable[str]]] = {
    "torch's devices": _torch_devices, "JAX's devices": _jax_devices, "loaded CUDA libraries": diagnosis.libraries,
    "a causal call in bfloat16": _decision,
}
