"""`python -m pallas_flash check`: do the kernels compute the right numbers on this card, and how fast are they?

A handful of calls, each with its gradients, against the reference in float32; then a few times beside `xla`. Progress
goes to stderr, a block to paste into an issue to stdout. What fails is a line of the block, never its end.
"""

import argparse
import dataclasses
import functools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import attention, device, diagnosis, dispatch, masks
from pallas_flash.spec import AttentionSpec

__all__ = ["BENCHMARKS", "CALLS", "Call", "main"]

KERNELS: tuple[dispatch.Name, ...] = ("hopper", "ampere")
PACKAGES = ("pallas_flash", "jax", "jaxlib", "jax-cuda13-plugin")
ROUNDINGS = 1.0
"""Of the input's type: the largest error of a result, relative to its norm. That of right kernels is below a half."""
BURST = 0.2
"""Seconds for which a function runs without a pause to be timed."""


class _Options(TypedDict, total=False):
    """Arguments of `flash_attention`."""

    mask: masks.Mask
    softcap: float
    segment_ids: np.ndarray
    dropout_rate: float
    dropout_rng: np.ndarray
    deterministic: bool


@dataclasses.dataclass(frozen=True)
class Call:
    """A call: a batch of two, (batch, length, heads, d), with 4 query heads."""

    name: str
    d: int = 64
    length: int = 600
    kv_heads: int = 4
    dtype: str = "bfloat16"
    options: _Options = dataclasses.field(default_factory=_Options)

    def arrays(self) -> tuple[jax.Array, ...]:
        """Query, key, value and the cotangent of out, random."""
        keys = jax.random.split(jax.random.key(self.d + self.length), 4)
        heads = (4, self.kv_heads, self.kv_heads, 4)
        return tuple(jax.random.normal(key, (2, self.length, h, self.d), jnp.float32).astype(self.dtype)
                     for key, h in zip(keys, heads, strict=True))


_LENGTHS = np.array([523, 77], np.int32)
CALLS = (
    Call("causal", options=dict(mask=masks.Causal())),
    Call("causal, d 128, grouped heads, ragged", 128, 473, 2, options=dict(mask=masks.Causal())),
    Call("full, d 96, float16, soft cap", 96, dtype="float16", options=dict(softcap=20.0)),
    Call("window", 128, options=dict(mask=masks.Window(100, 20))),
    Call("lengths of each sequence", 128, options=dict(mask=masks.Causal() & masks.InBounds(_LENGTHS, _LENGTHS))),
    Call("documents", options=dict(mask=masks.Causal(), segment_ids=np.tile(np.arange(600) // 130, (2, 1)))),
    Call("dense mask", options=dict(mask=masks.Dense(np.random.default_rng(0).random((600, 600)) < 0.7))),
    Call("dropout", options=dict(mask=masks.Causal(), dropout_rate=0.1, dropout_rng=np.array([1, 2], np.uint32))),
    Call("causal, deterministic", 128, options=dict(mask=masks.Causal(), deterministic=True)),
)
BENCHMARKS = tuple(Call("causal", d, length) for length in (2048, 8192) for d in (64, 128))
"""What is timed: so many tokens and columns of heads of bfloat16."""
TOKENS, COLUMNS = 16384, 2048


def main(arguments: Sequence[str]) -> int:
    """Runs the check and prints its block; returns the exit status, 0 if all is right."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if (missing := _missing()) is not None:
        print(f"There is nothing to check: {missing}. `python -m pallas_flash` says what JAX sees, and why.")
        return 1
    here = device.default()
    names, reasons = _kernels(here)
    if options.implementation:
        names = [options.implementation]
    lines, failed = [*_about(here)], not names
    lines += [] if names else ["no kernel runs on this card:", *(f"  {reason}" for reason in reasons)]
    for name in names:
        _say(f"{name}: {len(CALLS)} calls{'' if options.quick else f', then {len(BENCHMARKS)} times'}")
        found = [_checked(name, call) for call in CALLS]
        failed |= any(wrong for _, wrong in found)
        lines += [f"{name}: errors of {', '.join(RESULTS)} in roundings of the input's type (at most {ROUNDINGS:g})",
                  *(f"  {line}" for line, _ in found)]
        if not options.quick:
            lines += [f"{name}: TFLOP/s (and times the speed of xla), causal, bfloat16, forward | backward",
                      *(f"  {_timed(name, call)}" for call in BENCHMARKS)]
    verdict = "nothing was checked" if not names else "FAILED" if failed else "all right"
    print("\n".join(["```text", *lines, verdict, "```"]))
    _say("Please paste the block above into an issue.")
    return int(failed)


def _missing() -> str | None:
    """Why there is nothing to check; None: there is. JAX is started in a child process first: where its plugin finds no
    driver it ends the process.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        done = subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], capture_output=True, text=True)
        if done.returncode:
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it says nothing")
            return f"JAX does not start (exit code {done.returncode}: {last.strip()})"
    here = device.default()
    if here.platform == "gpu" and here.capability is not None:
        return None
    return f"there is no NVIDIA GPU that JAX can use here, its default device is {here.name!r}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m pallas_flash check", description="Checks the kernels on this card, and "
                                     "prints a block to paste into an issue.")
    parser.add_argument("--implementation", choices=KERNELS, help="check these kernels alone, and not all that can run")
    parser.add_argument("--quick", action="store_true", help="no times")
    return parser


def _kernels(here: device.Device) -> tuple[list[dispatch.Name], list[str]]:
    """The kernels that can run on a device, and why others cannot."""
    x = jax.ShapeDtypeStruct((1, 2048, 4, 64), jnp.bfloat16)
    spec = AttentionSpec.of(x, x, x, mask=masks.Causal())
    why_not = {name: dispatch.get(name).why_not(spec, here) for name in KERNELS}
    return ([name for name, reasons in why_not.items() if not reasons],
            [f"{name} {reason}" for name, reasons in why_not.items() for reason in reasons])


# -- the card ----------------------------------------------------------------------------------------------------------

def _about(here: device.Device) -> Iterator[str]:
    """Card, driver, compiler and versions."""
    assert here.capability is not None
    yield f"{here.name}, compute capability {'.'.join(map(str, here.capability))}, {here.num_sms} SMs"
    yield f"driver {_driver()}"
    yield f"ptxas {next(diagnosis.ptxas())}"
    yield from diagnosis.versions(PACKAGES)


def _driver() -> str:
    """The driver's version, and the memory and power limit of each card, as nvidia-smi says."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "not known: there is no nvidia-smi"
    query = [program, "--query-gpu=driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not known: {error}"
    return "; ".join(done.stdout.split("\n")).strip("; ") or f"not known: nvidia-smi ended with {done.returncode}"


# -- numbers -----------------------------------------------------------------------------------------------------------

RESULTS = ("out", "lse", "dq", "dk", "dv")


def _results(implementation: dispatch.Name, call: Call, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """out, lse and the gradients of a call, by an implementation."""
    attend = functools.partial(attention.flash_attention, return_lse=True, implementation=implementation,
                               **call.options)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
        (out, lse), pull = jax.vjp(attend, q, k, v)
        return out, lse, *pull((dout, jnp.full_like(lse, 0.5)))

    found: tuple[jax.Array, ...] = run(*arrays)
    return found


def _errors(found: Sequence[jax.Array], wanted: Sequence[jax.Array], dtype: str) -> list[float]:
    """The norm of each difference over that of the right result, in roundings; infinite where not finite. lse is kept
    in float32, but is a sum of products of that type.
    """
    def error(x: jax.Array, right: jax.Array) -> float:
        a, b = np.asarray(x, np.float64), np.asarray(right, np.float64)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)) or not np.array_equal(np.isnan(a), np.isnan(b)):
            return float("inf")
        finite = np.isfinite(b)
        difference = np.linalg.norm(a[finite] - b[finite])
        return float(difference / max(float(np.linalg.norm(b[finite])), 1e-30) / float(jnp.finfo(dtype).eps))

    return [error(x, right) for x, right in zip(found, wanted, strict=True)]


def _checked(implementation: dispatch.Name, call: Call) -> tuple[str, bool]:
    """A line about a call, and whether something is wrong with it."""
    start = time.monotonic()
    try:
        arrays = call.arrays()
        found = jax.block_until_ready(_results(implementation, call, arrays))
        repeats = not call.options.get("deterministic") or _same_bits(found, _results(implementation, call, arrays))
        exact = _results("reference", call, tuple(x.astype(jnp.float32) for x in arrays))
        errors = _errors(found, exact, call.dtype)
    except Exception as error:
        return _end(f"{call.name}: {_first_line(error)}", start), True
    wrong = not all(x <= ROUNDINGS for x in errors)
    words = " WRONG" * wrong + " DOES NOT REPEAT" * (not repeats)
    return _end(f"{call.name}: {' '.join(f'{x:.2f}' for x in errors)}{words}", start), bool(words)


def _same_bits(found: Sequence[jax.Array], again: Sequence[jax.Array]) -> bool:
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(found, again, strict=True))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end(line: str, start: float) -> str:
    """Reports a line; returns it."""
    _say(f"  {line} ({time.monotonic() - start:.0f} s)")
    return line


# -- times -------------------------------------------------------------------------------------------------------------

def _timed(implementation: dispatch.Name, call: Call) -> str:
    """A line with the times of a causal call."""
    name = f"d {call.d}, length {call.length}"
    start = time.monotonic()
    try:
        ours, theirs = _times(implementation, call), _times("xla", call)
    except Exception as error:
        return _end(f"{name}: {_first_line(error)}", start)
    flops = [2.0 * TOKENS * call.length * COLUMNS * part for part in (1, 2.5)]  # half of the pairs; products: 2, 5
    parts = (f"{work / mine / 1e12:.1f} ({other / mine:.1f})" for work, mine, other in zip(flops, ours, theirs))
    return _end(f"{name}: {' | '.join(parts)}", start)


def _times(implementation: dispatch.Name, call: Call) -> tuple[float, float]:
    """Seconds of the forward, and of the backward alone: of both passes less those of the forward."""
    shape = TOKENS // call.length, call.length, COLUMNS // call.d, call.d
    q, k, v, dout = (jax.random.normal(key, shape, jnp.float32).astype(jnp.bfloat16)
                     for key in jax.random.split(jax.random.key(0), 4))
    attend = lambda q, k, v: attention.flash_attention(q, k, v, mask=masks.Causal(), implementation=implementation)
    both = jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout))
    forward = _seconds(jax.jit(attend), q, k, v)
    return forward, max(_seconds(both, q, k, v, dout) - forward, 1e-9)


def _seconds(function: Callable[..., object], *arrays: jax.Array) -> float:
    """The median time of a call, of three bursts."""
    def burst(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            result = function(*arrays)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / count

    burst(1)
    count = max(1, min(1000, int(BURST / max(burst(1), 1e-6))))
    return statistics.median(burst(count) for _ in range(3))
