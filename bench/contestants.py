"""Who takes part: our implementations and the peers, each as functions of the same arrays.

A contestant turns a problem into a `Call` for "forward", "backward" (alone: its residuals are arguments) or "both".
What a problem has besides q, k and v (`features.arrays`) are keywords of a contestant's function: "mask", "starts",
"bias", "sinks", "dropout_rng".
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

from bench import environment, features
from bench.chain import chained
from bench.timing import Call
from pallas_flash import device, dispatch, flash_attention
from pallas_flash.masks import UNBOUNDED, Dense, Full, InBounds, Window
from pallas_flash.packed import Packed
from pallas_flash.testing.problems import Problem

__all__ = ["DIRECTIONS", "SHARED", "Arrays", "Contestant", "Exclusive", "JaxContestant", "OURS", "PEERS", "Prepared",
           "UNTRIED", "compiled", "find", "inputs_of", "prepared", "refusal"]

DIRECTIONS = ("forward", "backward", "both")
Exclusive = contextlib.AbstractContextManager[Any]
"""Held while the device computes, where several processes use it; entered again and again."""
SHARED: Exclusive = contextlib.nullcontext()
"""Where there are no others."""


class Arrays(NamedTuple):
    """Inputs of a problem and the cotangent of out, in the layout of its spec; by name what else it has."""

    q: Any
    k: Any
    v: Any
    dout: Any
    learned: dict[str, Any]  # with a gradient, which is called "d" and the name
    given: dict[str, Any]

    def of(self, problem: Problem) -> "Arrays":
        """Those of a problem of the same shapes that has less."""
        names = features.names(problem)
        learned, given = ({name: x for name, x in more.items() if name in names} for more in self[4:])
        return self._replace(learned=learned, given=given)


class Prepared(NamedTuple):
    """A call ready to be timed."""

    call: Call
    results: Callable[[Any], dict[str, Any]]
    """What the call returned, by name: out, dq, dk, dv, and the gradients of what is learned."""
    extra_bytes: int | None
    """Device memory that the call takes besides its arguments: results and temporary arrays; None if unknown."""
    chain: Callable[[int], Call]
    """Compiles a call that does the same that many times, without gaps, and returns the results of the last."""


@functools.cache
def simple_mask(problem: Problem) -> tuple[bool, tuple[int, int] | None] | None:
    """(is_causal, (left, right) or None) as most libraries say what is a rule of a mask; None where they cannot."""
    mask = features.rule(problem.mask)
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
      has_own_bits: what it drops is not what ours drops; it `computes` the problem without dropout, but for that.
    """

    name: str
    label: str
    packages: tuple[str, ...] = ()
    get: str = ""
    has_own_bits: bool = False

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

    def computes(self, problem: Problem) -> Problem:
        """The problem whose results are those of this contestant, apart from what is random."""
        return problem

    def row(self, problem: Problem, array: Any, batch: int, head: int) -> np.ndarray:
        """One head of a result, (length, dim) float32."""
        return self.numbers(array[batch, :, head] if problem.layout == "BLHD" else array[batch, head])

    def numbers(self, array: Any) -> np.ndarray:
        """A part of a result as float32 on the host."""
        return np.asarray(array.astype(jnp.float32))

    def is_finite(self, array: Any) -> bool:
        """Whether a result has no NaN and no infinity."""
        return bool(jnp.isfinite(array).all())

    def schedule(self, problem: Problem, direction: str) -> str | None:
        """Tile sizes and the like, if known."""
        return None


@dataclasses.dataclass(frozen=True)
class JaxContestant(Contestant):
    """A JAX function: `attention(problem)` is a function of q, k, v, and of what else a problem has by name, that
    returns out.

    Attributes:
      takes: what it takes of `features.wanted`.
    """

    name: str
    label: str
    attention: Callable[[Problem], Callable[..., Any]]
    refuses: Callable[[Problem], str] = lambda problem: ""
    packages: tuple[str, ...] = ()
    get: str = ""
    needs_simple_mask: bool = True
    takes: tuple[str, ...] = ()
    platforms: tuple[str, ...] = ("gpu", "cpu")

    def why_not(self, problem: Problem) -> str:
        if jax.default_backend() not in self.platforms:
            return f"runs on {' and '.join(self.platforms)} only"
        if self.needs_simple_mask and (reason := refusal(problem, self.takes)):
            return reason
        return self.refuses(problem)

    def prepare(self, problem: Problem, arrays: Arrays, direction: str, exclusive: Exclusive = SHARED) -> Prepared:
        return prepared(self.attention(problem), arrays, direction, exclusive)

    def schedule(self, problem: Problem, direction: str) -> str | None:
        return _our_schedule(self.name, problem, direction) if self in OURS else None


def refusal(problem: Problem, takes: tuple[str, ...]) -> str:
    """Why a library with simple masks, which besides takes some features, cannot run a problem; empty if it can."""
    missing = [name for name in features.wanted(problem) if name not in takes]
    if simple_mask(problem) is None:
        return f"has no mask like {problem.mask}"
    return f"takes no {', no '.join(name.removeprefix('a ') for name in missing)}" if missing else ""


def prepared(attention: Callable[..., Any], arrays: Arrays, direction: str, exclusive: Exclusive = SHARED) -> Prepared:
    """One direction of an attention function, compiled."""
    function, args = _direction(attention, arrays, direction, exclusive)
    one = compiled(function, args, exclusive)
    memory = one.memory_analysis()
    extra = None if memory is None else memory.temp_size_in_bytes + memory.output_size_in_bytes

    def chain(count: int) -> Call:
        many = compiled(chained(function, count), args, exclusive)
        return Call(lambda: many(*args)[-1], jax.block_until_ready, count)
    return Prepared(Call(lambda: one(*args), jax.block_until_ready), functools.partial(_named, direction), extra, chain)


UNTRIED = {"xla_gpu_autotune_level": 0}
"""Options with which XLA tries out no matrix products: for what is not timed."""


def compiled(function: Callable[..., Any], args: Any, exclusive: Exclusive = SHARED,
             options: dict[str, Any] | None = None) -> Any:
    """The executable of a function; `args` may be shapes.

    Compiling leaves the device to others, unless there are matrix products, which XLA tries out on a GPU.
    """
    lowered = jax.jit(function).lower(*args)
    tries = options != UNTRIED and jax.default_backend() == "gpu" and "stablehlo.dot_general" in lowered.as_text()
    with exclusive if tries else SHARED:
        return lowered.compile(options)


def _direction(attention: Callable[..., Any], arrays: Arrays, direction: str, exclusive: Exclusive = SHARED,
               ) -> tuple[Callable[..., Any], Any]:
    """A function to compile, and the tuple of its arguments."""
    q, k, v, dout, learned, given = arrays

    def attend(q: Any, k: Any, v: Any, learned: Any, given: Any) -> Any:
        return attention(q, k, v, **learned, **given)

    def residuals(q: Any, k: Any, v: Any, learned: Any, given: Any) -> Any:
        return jax.vjp(lambda *args: attend(*args, given), q, k, v, learned)
    if direction == "forward":
        return attend, (q, k, v, learned, given)
    if direction == "backward":
        forward = compiled(lambda *args: residuals(*args)[1], (q, k, v, learned, given), exclusive)
        with exclusive:
            vjp = jax.block_until_ready(forward(q, k, v, learned, given))
        return (lambda vjp, dout: vjp(dout)), (vjp, dout)

    def both(q: Any, k: Any, v: Any, dout: Any, learned: Any, given: Any) -> Any:
        out, vjp = residuals(q, k, v, learned, given)
        return out, *vjp(dout)
    return both, tuple(arrays)


def _named(direction: str, results: Any) -> dict[str, Any]:
    if direction == "forward":
        return {"out": results}
    *results, learned = results
    names = ("out", "dq", "dk", "dv") if direction == "both" else ("dq", "dk", "dv")
    return dict(zip(names, results, strict=True)) | {f"d{name}": x for name, x in learned.items()}


def _our_schedule(name: str, problem: Problem, direction: str) -> str:
    """The schedules of the passes that run, forward first."""
    passes = dict(zip(("forward", "backward"), dispatch.get(name).schedules or (), strict=False))
    return "; ".join(str(pkgutil.resolve_name(schedules.default)(problem.spec(), device.current()))
                     for pass_, schedules in passes.items() if direction in (pass_, "both"))


def _ours(name: str) -> JaxContestant:
    def attention(problem: Problem) -> Callable[..., Any]:
        def attend(q: Any, k: Any, v: Any, mask: Any = problem.mask, starts: Any = None, **others: Any) -> Any:
            attend = functools.partial(
                flash_attention, scale=problem.scale, softcap=problem.softcap, layout=problem.layout,
                dropout_rate=problem.dropout_rate, deterministic=problem.deterministic, implementation=name, **others)
            if isinstance(mask, Packed):
                return attend(q[0], k[0], v[0], mask=mask.rule, cu_seqlens_q=starts)[None]
            return attend(q, k, v, mask=mask)
        return attend

    def refuses(problem: Problem) -> str:
        return "; ".join(dispatch.get(name).why_not(problem.spec(), device.current()))
    return JaxContestant(name, f"pallas_flash ({name})", attention, refuses, needs_simple_mask=False)


def _jax_nn(implementation: str) -> Callable[[Problem], Callable[..., Any]]:
    def attention(problem: Problem) -> Callable[..., Any]:
        is_causal, window = simple_mask(problem) or (False, None)

        def attend(q: Any, k: Any, v: Any, mask: Any = problem.mask, bias: Any = None) -> Any:
            lengths, dense = features.part(mask, InBounds), features.part(mask, Dense)
            everywhere = (problem.batch, 1, problem.q_len, problem.kv_len)  # no other shape for cuDNN
            return jax.nn.dot_product_attention(
                q, k, v, bias, None if dense is None else jnp.broadcast_to(dense.attend, everywhere),
                key_value_seq_lengths=None if lengths is None else lengths.kv_len, scale=problem.scale,
                is_causal=is_causal, local_window_size=window, implementation=implementation)
        return attend
    return attention


def _fa3(problem: Problem) -> Callable[..., Any]:
    import dew_flash_attn
    is_causal, window = simple_mask(problem) or (False, None)
    options = dict(softmax_scale=problem.scale, is_causal=is_causal and window is None, window_size=window or (-1, -1))

    def attend(q: Any, k: Any, v: Any, starts: Any = None, mask: Any = None, sinks: Any = None) -> Any:
        del mask  # the boundaries say it
        if starts is None:
            return dew_flash_attn.flash_mha(q, k, v, sinks=sinks, **options)
        one_row = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        out = dew_flash_attn.flash_mha_varlen(*one_row, starts, features.longest(problem), sinks=sinks, **options)
        return out.reshape(q.shape)
    return attend


def _tokamax(problem: Problem) -> Callable[..., Any]:
    import tokamax
    is_causal, window = simple_mask(problem) or (False, None)
    return lambda q, k, v: tokamax.dot_product_attention(
        q, k, v, scale=problem.scale, is_causal=is_causal, local_window_size=window, implementation="mosaic",
        logits_soft_cap=problem.softcap)


def _only_heads_last(problem: Problem) -> str:
    return "" if problem.layout == "BLHD" else "takes (batch, length, heads, dim) only"


def _only_jax_nn(problem: Problem) -> str:
    return "has one head size for keys and values" if problem.d != problem.d_v else _only_heads_last(problem)


_GET_PEERS = "python -m bench peers"
_OF_JAX_NN = ("lengths", "a dense mask", "a bias", "the gradient of a bias")
OURS: tuple[JaxContestant, ...] = tuple(_ours(row.name) for row in dispatch.IMPLEMENTATIONS if row.automatic)
"""In dispatch's order of preference."""
PEERS: list[Contestant] = [
    JaxContestant("fa3", "FlashAttention-3", _fa3, _only_jax_nn, ("dew-flash-attn-cu13",), _GET_PEERS,
                  platforms=("gpu",), takes=("documents", "packed sequences", "sinks")),
    JaxContestant("cudnn", "cuDNN (jax.nn)", _jax_nn("cudnn"), _only_jax_nn, platforms=("gpu",), takes=_OF_JAX_NN),
    JaxContestant("tokamax", "Tokamax", _tokamax, _only_heads_last, ("tokamax",), _GET_PEERS, platforms=("gpu",),
                  takes=("a soft cap",)),
    JaxContestant("jax-nn", "jax.nn (XLA)", _jax_nn("xla"), _only_jax_nn, takes=_OF_JAX_NN),
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
    plain = dataclasses.replace(problem, bias=None)  # drawn here, on the device
    operands = plain.operands(seed=seed, normal=inputs.device_normal)
    dout, _ = inputs.cotangents(problem.spec(), seed=seed, normal=inputs.device_normal)
    more = features.arrays(problem, seed)
    learned = {name: x for name, x in more.items() if name in problem.learned}
    given = {name: x for name, x in more.items() if name not in problem.learned}
    return Arrays(operands.q, operands.k, operands.v, dout, learned, given)
