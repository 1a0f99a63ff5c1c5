"""What an automatic choice runs on which GPU: asked of dispatch, for the table of the README."""

import dataclasses
import re
from collections.abc import Callable

import jax
import numpy as np

from pallas_flash import ALiBi, Causal, InBounds, cache, device, explain
from pallas_flash.device import Device

__all__ = ["rows"]

OTHERS = dataclasses.replace(device.L4, name="NVIDIA GPUs before Ampere", capability=(7, 5)), device.CPU
NAMES = {"NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H100 80GB HBM3": "H100", "CPU": "every other device of JAX"}
"""Of those that are called after one model."""


def _array(d: int, dtype: str = "bfloat16", heads: int = 8) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, 256, heads, d), dtype)


def _call(d: int, dtype: str = "bfloat16", **options: object) -> Callable[[Device], str]:
    """A call of `flash_attention`, 8 query heads to 2 key heads."""
    q, k = _array(d, dtype), _array(d, dtype, 2)
    return lambda gpu: explain(q, k, k, **{"mask": Causal()} | options, device=gpu)  # type: ignore[arg-type]


def _step(gpu: Device) -> str:
    """A step of decoding."""
    keys, lengths = _array(128, heads=2), jax.ShapeDtypeStruct((2,), "int32")
    return cache.explain(jax.ShapeDtypeStruct((2, 1, 8, 128), "bfloat16"), cache.Cache(keys, keys, lengths, None),
                         device=gpu)


_LENGTHS = Causal() & InBounds(kv_len=np.array([256, 100]))
CALLS: dict[str, list[Callable[[Device], str]]] = {
    "bfloat16 and float16, heads up to 256": [
        *(_call(d, dtype) for d in (64, 80, 128, 256) for dtype in ("bfloat16", "float16")),
        _call(128, mask=_LENGTHS, deterministic=True), _call(128, dropout_rate=0.1),
        _call(64, bias=jax.ShapeDtypeStruct((1, 8, 256, 256), "float32")),
        _call(64, score=ALiBi(np.ones(8, np.float32)))],
    "heads up to 512": [_call(512)],
    "a cache": [_step],
    "float32": [_call(64, "float32")],
}
"""By column, calls of that kind: all of a column run alike."""


def _chosen(calls: list[Callable[[Device], str]], gpu: Device) -> str:
    found = {re.findall(r"implementation='(\w+)'", call(gpu))[0] for call in calls}
    assert len(found) == 1, f"calls of one column run as {found} on {gpu.name}: give them columns of their own"
    return f"`{found.pop()}`"


def rows(measured: set[str]) -> tuple[list[str], list[list[str]]]:
    """The header of the table and its rows, one for each device that is given.

    Args:
      measured: the names of the devices that there are records of.
    """
    gpus = (device.A100, device.L4, device.RTX_4090, device.H100, device.H200, device.B200, device.RTX_5090)
    made = []
    for gpu in (*gpus, *OTHERS):
        capability = "" if gpu.capability is None or gpu in OTHERS else ".".join(map(str, gpu.capability))
        short = gpu.name if gpu in OTHERS else gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce ")
        name = NAMES.get(gpu.name, short)
        is_measured = "" if gpu in OTHERS else "yes" if gpu.name in measured else "no"
        made.append([name, capability, *(_chosen(calls, gpu) for calls in CALLS.values()), is_measured])
    return ["device", "compute capability", *CALLS, "measured"], made
