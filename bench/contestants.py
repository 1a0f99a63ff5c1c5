"""Who takes part: our implementations and the peers, each as functions of the same arrays.

A contestant turns a problem into a `Call` for "forward", "backward" (alone: its residuals are arguments) or "both".
Peers that are not installed, or that cannot run a problem, say why in a sentence and are left out.
"""

import contextlib
import dataclasses
import functools
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import environment
from bench.chain import chained
from bench.timing import Call
from pallas_flash import device, dispatch, flash_attention
from pallas_flash.masks import UNBOUNDED, Full, Window
from pallas_flash.testing.problems import Problem

__all__ = ["DIRECTIONS", "SHARED", "Arrays", "Contestant", "Exclusive", "JaxContestant", "OURS", "PEERS", "Prepared",
           "compiled", "find", "inputs_of"]

DIRECTIONS = ("forward", "backward", "both")
Exclusive = contextlib.AbstractContextManager[Any]
"""Held while the device computes, where several processes use it; entered again and again."""
SHARED: Exclusive = contextlib.nullcontext()
"""Where there are no others."""


class Arrays(NamedTuple):
    """Inputs of a problem and the cotangent of out, in the layout of its spec."""

    q: Any
    k: Any
    v: Any
    dout: Any


class Prepared(NamedTuple):
    """A call ready to be timed."""

    call: Call
    results: Callable[[Any], dict[str, Any]]
    """What the call returned, by name: out, dq, dk, dv."""
    extra_bytes: int | None
    """Device memory that the call takes besides its arguments: results and temporary arrays; None if unknown."""
    chain: Callable[[int], Call]
    """Compiles a call that does the same that many times, without gaps, and returns the results of the last."""


@functools.cache
def simple_mask(problem: Problem) -> tuple[bool, tuple[int, int] | None] | None:
    """(is_causal, (left, right) or None) as most libraries say it; None for masks that they cannot say."""
    mask = problem.mask
    if isinstance(mask, Full):
        return False, None
    if not isinstance(mask, Window) or not isinstance(mask.offset, int) or mask.offset != 0:
        return None
    if mask.left == UNBOUNDED:
        return (True, None) if mask.right == 0 else None
    return mask.right == 0, (mask.left, mask.right)


class Contestant:
    """One library's way to compute attention.

    Attributes:
      name: what the command line and the records call it.
      label: what tables and plots call it.
      packages: those it needs.
      get: how to get them.
    """

    name: str
    label: str
    packages: tuple[str, ...] = ()
    get: str = ""

    def missing(self) -> str:
        """Why it cannot take part at all; empty if it can."""
        absent = [package for package in self.packages if environment.version(package) is None]
        return f"{', '.join(absent)} not installed: {self.get}" if absent else ""

    def why_not(self, problem: Problem) -> str:
        """Why it cannot run a problem; empty if it can."""
        raise NotImplementedError

    def prepare(self, problem: Problem, arrays: Arrays, direction: str, exclusive: Exclusive = SHARED) -> Prepared:
        """Compiles one direction of a problem; what runs on the device meanwhile, runs under `exclusive`."""
        raise NotImplementedError

    def row(self, problem: Problem, array: Any, batch: int, head: int) -> np.ndarray:
        """One head of a result, (length, dim) float32."""
        row = array[batch, :, head] if problem.layout == "BLHD" else array[batch, head]
        return np.asarray(row.astype(jnp.float32))

    def is_finite(self, array: Any) -> bool:
        """Whether a result has no NaN and no infinity."""
        return bool(jnp.isfinite(array).all())

    def schedule(self, problem: Problem, direction: str) -> str | None:
        """Tile sizes and the like, if known."""
        return None


@dataclasses.dataclass(frozen=True)
class JaxContestant(Contestant):
    """A JAX function: `attention(problem)` is a function of q, k, v that returns out."""

    name: str
    label: str
    attention: Callable[[Problem], Callable[..., Any]]
    refuses: Callable[[Problem], str] = lambda problem: ""
    packages: tuple[str, ...] = ()
    get: str = ""
    needs_simple_mask: bool = True
    platforms: tuple[str, ...] = ("gpu", "cpu")

    def why_not(self, problem: Problem) -> str:
        if jax.default_backend() not in self.platforms:
            return f"runs on {' and '.join(self.platforms)} only"
        if self.needs_simple_mask and simple_mask(problem) is None:
            return f"has no mask like {problem.mask}"
        return self.refuses(problem)

    def prepare(self, problem: Problem, arrays: Arrays, direction: str, exclusive: Exclusive = SHARED) -> Prepared:
        function, args = _direction(self.attention(problem), arrays, direction, exclusive)
        one = compiled(function, args, exclusive)
        memory = one.memory_analysis()
        extra = None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes

        def chain(count: int) -> Call:
            many = compiled(chained(function, count), args, exclusive)
            return Call(lambda: many(*args)[-1], jax.block_until_ready, count)
        return Prepared(Call(lambda: one(*args), jax.block_until_ready), functools.partial(_named, direction), extra,
                        chain)

    def schedule(self, problem: Problem, direction: str) -> str | None:
        return _our_schedule(self.name, problem, direction) if self in OURS else None


def compiled(function: Callable[..., Any], args: Any, exclusive: Exclusive = SHARED) -> Any:
    """The executable of a function; `args` may be shapes.

    Compiling leaves the device to others, unless there are matrix products, which XLA tries out on a GPU.
    """
    lowered = jax.jit(function).lower(*args)
    tries = jax.default_backend() == "gpu" and "stablehlo.dot_general" in lowered.as_text()
    with exclusive if tries else SHARED:
        return lowered.compile()


def _direction(attention: Callable[..., Any], arrays: Arrays, direction: str, exclusive: Exclusive = SHARED,
               ) -> tuple[Callable[..., Any], Any]:
    """A function to compile, and the tuple of its arguments."""
    q, k, v, dout = arrays
    if direction == "forward":
        return attention, (q, k, v)
    if direction == "backward":
        forward = compiled(lambda q, k, v: jax.vjp(attention, q, k, v)[1], (q, k, v), exclusive)
        with exclusive:
            vjp = jax.block_until_ready(forward(q, k, v))
        return (lambda vjp, dout: vjp(dout)), (vjp, dout)

    def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, vjp = jax.vjp(attention, q, k, v)
        return out, *vjp(dout)
    return both, (q, k, v, dout)


def _named(direction: str, results: Any) -> dict[str, Any]:
    names = {"forward": ("out",), "backward": ("dq", "dk", "dv"), "both": ("out", "dq", "dk", "dv")}[direction]
    return dict(zip(names, (results,) if direction == "forward" else results, strict=True))


def _our_schedule(name: str, problem: Problem, direction: str) -> str:
    """The schedules of the passes that run, forward first."""
    passes = dict(zip(("forward", "backward"), dispatch.get(name).schedules or (), strict=False))
    return "; ".join(str(pkgutil.resolve_name(schedules.default)(problem.spec(), device.current()))
                     for pass_, schedules in passes.items() if direction in (pass_, "both"))


def _ours(name: str) -> JaxContestant:
    def attention(problem: Problem) -> Callable[..., Any]:
        return lambda q, k, v: flash_attention(
            q, k, v, mask=problem.mask, scale=problem.scale, softcap=problem.softcap, layout=problem.layout,
            deterministic=problem.deterministic, implementation=name)

    def refuses(problem: Problem) -> str:
        return "; ".join(dispatch.get(name).why_not(problem.spec(), device.current()))
    return JaxContestant(name, f"pallas_flash ({name})", attention, refuses, needs_simple_mask=False)


def _jax_nn(implementation: str) -> Callable[[Problem], Callable[..., Any]]:
    def attention(problem: Problem) -> Callable[..., Any]:
        is_causal, window = simple_mask(problem) or (False, None)
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, scale=problem.scale, is_causal=is_causal, local_window_size=window, implementation=implementation)
    return attention


def _fa3(problem: Problem) -> Callable[..., Any]:
    import dew_flash_attn
    is_causal, window = simple_mask(problem) or (False, None)
    return lambda q, k, v: dew_flash_attn.flash_mha(
        q, k, v, softmax_scale=problem.scale, is_causal=is_causal and window is None, window_size=window or (-1, -1))


def _tokamax(problem: Problem) -> Callable[..., Any]:
    import tokamax
    is_causal, window = simple_mask(problem) or (False, None)
    return lambda q, k, v: tokamax.dot_product_attention(
        q, k, v, scale=problem.scale, is_causal=is_causal, local_window_size=window, implementation="mosaic")


def _only_heads_last(problem: Problem) -> str:
    return "" if problem.layout == "BLHD" else "takes (batch, length, heads, dim) only"


def _only_jax_nn(problem: Problem) -> str:
    return "has one head size for keys and values" if problem.d != problem.d_v else _only_heads_last(problem)


_GET_PEERS = "python -m bench peers"
OURS: tuple[JaxContestant, ...] = tuple(_ours(row.name) for row in dispatch.IMPLEMENTATIONS if row.automatic)
"""In dispatch's order of preference."""
PEERS: list[Contestant] = [
    JaxContestant("fa3", "FlashAttention-3", _fa3, _only_jax_nn, ("dew-flash-attn-cu13",), _GET_PEERS,
                  platforms=("gpu",)),
    JaxContestant("cudnn", "cuDNN (jax.nn)", _jax_nn("cudnn"), _only_jax_nn, platforms=("gpu",)),
    JaxContestant("tokamax", "Tokamax", _tokamax, _only_heads_last, ("tokamax",), _GET_PEERS, platforms=("gpu",)),
    JaxContestant("jax-nn", "jax.nn (XLA)", _jax_nn("xla"), _only_jax_nn),
]


def find(names: list[str], among: list[Contestant]) -> list[Contestant]:
    """The contestants of these names, in their order; "all" and "none" too."""
    if names == ["all"]:
        return list(among)
    known = {contestant.name: contestant for contestant in among}
    unknown = [name for name in names if name not in known and name != "none"]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}, all and none")
    return [known[name] for name in names if name in known]


def inputs_of(problem: Problem, seed: int = 0) -> Arrays:
    """Random inputs of a benchmark problem, made on the device: zeros would run faster."""
    from pallas_flash.testing import inputs
    operands = problem.operands(seed=seed, normal=inputs.device_normal)
    dout, _ = inputs.cotangents(problem.spec(), seed=seed, normal=inputs.device_normal)
    return Arrays(operands.q, operands.k, operands.v, dout)
