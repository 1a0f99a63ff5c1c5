"""What runs where, asked of dispatch, for the tables of the README: kernels by GPU, and calls by kind of GPU."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from pallas_flash import ALiBi, Causal, Dense, InBounds, Mask, PrefixLM, Window, cache, device, explain
from pallas_flash.device import Device

__all__ = ["calls", "gpus"]

GPUS = (device.H100, device.H200, device.A100, device.L4, device.RTX_4090, device.B200, device.RTX_5090)
HOPPER = tuple(gpu for gpu in GPUS if gpu.capability == (9, 0))
OTHERS = tuple(gpu for gpu in GPUS if gpu not in HOPPER)
ELSEWHERE = {"NVIDIA GPUs before Ampere": dataclasses.replace(device.L4, capability=(7, 5)),
             "every other device of JAX": device.CPU}
NAMES = {"NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H100 80GB HBM3": "H100"}
"""Of those that are called after one model."""

Ask = Callable[..., str]
"""(device=, implementation=None) -> what explain says."""


def _array(d: int, dtype: str = "bfloat16", heads: int = 8) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((2, 256, heads, d), dtype)


def _call(d: int = 128, dtype: str = "bfloat16", **options: Any) -> Ask:
    """A call of `flash_attention`, 8 query heads to 2 key heads."""
    q, k = _array(d, dtype), _array(d, dtype, 2)
    return lambda **where: explain(q, k, k, **{"mask": Causal()} | options, **where)


def _packed() -> Ask:
    q, k = (jax.ShapeDtypeStruct((256, heads, 128), "bfloat16") for heads in (8, 2))
    starts = jax.ShapeDtypeStruct((4,), "int32")
    return lambda **where: explain(q, k, k, mask=Causal(), cu_seqlens_q=starts, **where)


def _step(q_len: int = 1, pages: bool = False, dtype: str = "bfloat16") -> Ask:
    """Attention of q_len queries to a cache, 8 query heads to 2 key heads."""
    query = jax.ShapeDtypeStruct((2, q_len, 8, 128), "bfloat16")
    scales = {} if dtype == "bfloat16" else {"key_scale": np.ones(2, "float32"), "value_scale": np.ones(2, "float32")}
    kind: dict[str, Any] = dict(kv_heads=2, d=128, dtype=dtype, **scales)
    table = np.arange(32).reshape(2, 16)
    empty = jax.eval_shape(lambda: cache.empty_paged(table, (32, 16), **kind) if pages else cache.empty(2, 256, **kind))
    return lambda **where: cache.explain(query, empty, **where)


@dataclasses.dataclass(frozen=True)
class _Parity(Mask):
    """A class of a user's own: positions that are equal modulo `n`."""

    n: Any

    def keep(self, q_pos: Any, kv_pos: Any) -> Any:
        return q_pos % self.n == kv_pos % self.n


_BIAS = jax.ShapeDtypeStruct((1, 8, 256, 256), "bfloat16")
_KEYS = jax.ShapeDtypeStruct((2, 1, 1, 256), "float32")
_SLOPES = ALiBi(np.ones(8, np.float32))
_IDS = jax.ShapeDtypeStruct((2, 256), "int32")
_SEEN = jax.ShapeDtypeStruct((2, 1, 1, 256), "bool")
_SINKS = jax.ShapeDtypeStruct((8,), "float32")
_KEY = jax.random.key(0)

CALLS: dict[str, list[Ask]] = {
    "bfloat16 and float16, head dimensions up to 256; `Causal`, `Window`, `PrefixLM`, mask classes of your own without "
    "arrays": [
        *(_call(d, dtype) for d in (64, 80, 128, 192, 256) for dtype in ("bfloat16", "float16")),
        _call(mask=Window(left=64)), _call(mask=PrefixLM(64)), _call(mask=_Parity(2)), _call(mask=None)],
    "lengths, `segment_ids`, packed sequences, `Dense` masks": [
        _call(mask=Causal() & InBounds(kv_len=np.array([256, 100]))), _call(segment_ids=_IDS), _packed(),
        _call(mask=Dense(_SEEN))],
    "grouped heads, soft cap, sinks, dropout, lse, `deterministic=True`": [
        _call(softcap=30.0), _call(sinks=_SINKS), _call(dropout_rate=0.1, dropout_rng=_KEY), _call(return_lse=True),
        _call(deterministic=True)],
    "a bias of keys or of pairs, and its gradient": [_call(bias=_BIAS), _call(64, bias=_KEYS)],
    "a score function, and its gradients": [_call(score=_SLOPES), _call(256, score=_SLOPES)],
    "a bias and a score function": [_call(bias=_BIAS, score=_SLOPES)],
    "mask classes of your own with arrays, or beside arrays": [
        _call(mask=_Parity(np.array([2, 3]))), _call(mask=_Parity(2), segment_ids=_IDS)],
    "head dimensions that are not multiples of 8": [_call(100), _call(50)],
    "head dimensions from 257 to 512, without a score function": [
        _call(320), _call(512), _call(320, segment_ids=_IDS), _call(512, bias=_BIAS),
        _call(320, dropout_rate=0.1, dropout_rng=_KEY)],
    "float32, head dimensions up to 128": [
        _call(64, "float32"), _call(128, "float32"), _call(64, "float32", segment_ids=_IDS)],
    "float32 with larger head dimensions, dropout, a bias or a score function": [
        _call(192, "float32"), _call(64, "float32", bias=_BIAS), _call(64, "float32", score=_SLOPES),
        _call(64, "float32", dropout_rate=0.1, dropout_rng=_KEY)],
    "a cache, contiguous or in pages, up to 64 queries that share a key head": [_step(), _step(16), _step(pages=True)],
    "a contiguous cache, more queries than that, at least 16 of each head": [_step(64)],
    "a cache in pages, more queries than that, at least 16 of each head": [_step(64, pages=True)],
    "a cache in eight bits, one query of each head": [_step(dtype="float8_e4m3fn")],
    "a cache in eight bits, more queries": [_step(2, dtype="float8_e4m3fn"), _step(64, dtype="float8_e4m3fn")],
}
"""By row, calls of that kind: all of a row run alike."""


def _chosen(text: str) -> str:
    return re.findall(r"implementation='(\w+)'", text)[0]


def _runs(ask: Ask, gpus: Iterable[Device], native: str) -> set[str]:
    """What an automatic choice runs on GPUs for which `native` was written, and whether that one runs when named."""
    found = set()
    for gpu in gpus:
        text = ask(device=gpu)
        chosen = f"`{_chosen(text)}`" + (", on padded copies" if "filled with zeros" in text else "")
        by_name = _chosen(text) != native and not ask(device=gpu, implementation=native).startswith("UnsupportedError")
        backward = "; gradient by `xla`" if "backward: that of 'xla'" in text else ""
        found.add(chosen + (f"; `{native}` by name" if by_name else "") + backward)
    return found


def _only(found: set[str], what: str) -> str:
    assert len(found) == 1, f"calls of one row run as {sorted(found)}: {what}; give them rows of their own"
    return found.pop()


def calls() -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table of calls: what runs on Hopper GPUs, and on the others since Ampere."""
    made = []
    for name, asks in CALLS.items():
        cells = [_only({text for ask in asks for text in _runs(ask, gpus, native)}, name)
                 for gpus, native in ((HOPPER, "hopper"), (OTHERS, "ampere"))]
        made.append([name, *cells])
    return ["call", "on Hopper GPUs", "on other GPUs since Ampere"], made


def gpus(measured: set[str]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the table of devices: which kernels an ordinary call runs there.

    Args:
      measured: the names of the devices that there are records of.
    """
    ordinary, by_kernels = next(iter(CALLS.values())), dict[str, list[Device]]()
    for gpu in GPUS:
        chosen = _only({_chosen(ask(device=gpu)) for ask in ordinary}, gpu.name)
        by_kernels.setdefault(chosen, []).append(gpu)
    made = [[", ".join(map(_name, of)), f"`{kernels}`",
             ", ".join(_name(gpu) for gpu in of if gpu.name in measured) or "none of them"]
            for kernels, of in by_kernels.items()]
    made += [[name, f"`{_only({_chosen(ask(device=where)) for ask in ordinary}, name)}`", ""]
             for name, where in ELSEWHERE.items()]
    return ["device (compute capability)", "kernels", "measured"], made


def _name(gpu: Device) -> str:
    short = NAMES.get(gpu.name, gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce "))
    return f"{short} ({'.'.join(map(str, gpu.capability or ()))})"
