"""What each strategy costs, from the sizes of a problem alone, and the choice among them: pure data, no device needed.

On each of n devices lie `length` positions of queries and of keys, so the sequence has n * length. The strategies:

    ring        keys and values travel from device to device while the kernels compute; in the backward the sums of dk
                and dv travel behind them. Each step costs the longer of its compute and its hop, and copies of rows
                and partial results.
    all_gather  every device gets all keys and values first; the backward gathers again and reduce-scatters dk and dv.
                Nothing hides the collectives, and memory grows with the whole sequence. A program for all devices
                moves the mask to a place known at run time, where kernels are slower.
    all_to_all  queries, keys and values change from a part of the sequence to a part of the heads, and back
                (DeepSpeed Ulysses, Jacobs et al., 2023). Nothing hides the collectives.

A pass of attention itself is the same work whatever the strategy, spread evenly over the devices: with the balanced
order of a sequence it is. Beside it are copies, hops and launches, at rates for which the sum is what was measured on
two H200s (docs/notes/context_parallel.md): they do not say what each of them takes alone.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from pallas_flash import errors
from pallas_flash.device import Device

__all__ = ["Choice", "Estimate", "MEMORY_SHARE", "Problem", "Rates", "Strategy", "choose", "estimate", "rates",
           "why_not"]

Strategy = Literal["ring", "all_gather", "all_to_all"]
"""In this order where the costs are equal: a ring needs the least memory and takes any number of heads."""

MEMORY_SHARE = 0.1
"""Of a device's memory: an all-gather that needs more for one layer is not chosen. Weights, optimizer and the
activations of other layers need the rest."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a device computes and moves data.

    Attributes:
      forward_flops, backward_flops: of the kernels, 16-bit numbers, in flop/s.
      link_bytes: what a device sends to its neighbours, one direction, in bytes/s.
      memory_bytes_per_s: device memory, read and written by copies beside the kernels.
      step_s: what a step of launches and handshakes takes beside its work, in seconds.
      placed: by what the kernels' time is multiplied, forward and backward, where a mask is at a place known at run
        time.
      memory_bytes: how much memory the device has.
      source: where the numbers come from, for `explain`.
    """

    forward_flops: float
    backward_flops: float
    link_bytes: float
    memory_bytes_per_s: float
    step_s: float
    placed: tuple[float, float]
    memory_bytes: float
    source: str


_HOPPER = Rates(700e12, 600e12, 300e9, 3.0e12, 100e-6, (1.17, 1.03), 80e9,
                "of two H200s and the NVLink between them, measured with bfloat16 and d=128")
_MEMORY_BYTES = {"H200": 141e9, "H100 NVL": 94e9, "H100": 80e9, "GH200": 96e9}
_OTHERS = dataclasses.replace(_HOPPER, memory_bytes=40e9, source=(
    "of Hopper GPUs, since this device was not measured: where its kernels are slower and its links are not, this may "
    "send less than would be fastest, and where its links are slower still, more"))


def rates(device: Device) -> Rates:
    """The rates of a device; those of one that was not measured are Hopper's, with less memory."""
    if device.capability != (9, 0):
        return _OTHERS
    known = [size for name, size in _MEMORY_BYTES.items() if name in device.name]
    return dataclasses.replace(_HOPPER, memory_bytes=known[0] if known else _HOPPER.memory_bytes)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The sizes of a call that its cost depends on.

    Attributes:
      length: positions of a device.
      n: devices along the sequence.
      itemsize: bytes of an element of query, key and value.
      share: pairs of the whole sequence that attend, of all (n * length)^2: about 0.5 where causal.
      steps: of a ring, those that any device needs, its own keys included; None for n. Windows need fewer.
      partial_itemsize: bytes of an element of a ring's partial results, before they are summed; None for the
        accumulators'.
    """

    batch: int
    length: int
    n: int
    q_heads: int
    kv_heads: int
    d: int
    d_v: int
    itemsize: int
    share: float
    steps: int | None = None
    partial_itemsize: int | None = None

    def __str__(self) -> str:
        dim = f"d={self.d}" if self.d == self.d_v else f"d={self.d}, d_v={self.d_v}"
        return (f"attention of {self.n} devices with {self.length} positions each (batch={self.batch}, "
                f"heads={self.q_heads}:{self.kv_heads}, {dim})")

    @property
    def rows(self) -> int:
        """Positions of a device, over the batch."""
        return self.batch * self.length

    @property
    def q(self) -> int:
        """Elements of the queries of a device; out has `q_out`."""
        return self.rows * self.q_heads * self.d

    @property
    def q_out(self) -> int:
        """Elements of out on a device."""
        return self.rows * self.q_heads * self.d_v

    @property
    def kv(self) -> int:
        """Elements of the keys and values of a device together."""
        return self.rows * self.kv_heads * (self.d + self.d_v)

    @property
    def acc_itemsize(self) -> int:
        """Bytes of an element of an accumulator."""
        return max(self.itemsize, 4)

    @property
    def pairs(self) -> float:
        """Pairs that attend on one device, over batch and heads."""
        return self.share * self.n * self.length**2 * self.batch * self.q_heads


class _Pass(NamedTuple):
    """One pass of a strategy on one device: its time in seconds, what it sends, what it holds beside its operands and
    results in bytes."""

    seconds: float
    moved: int
    transient: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a strategy costs on each device.

    Attributes:
      forward_s, backward_s: seconds of a pass.
      bytes_forward, bytes_backward: sent by a device in a pass.
      transient_bytes: what the pass that needs more holds beside its operands and results.
      reasons_against: why it is not chosen, whatever it costs; each what is needed and what there is.
    """

    strategy: Strategy
    forward_s: float
    backward_s: float
    bytes_forward: int
    bytes_backward: int
    transient_bytes: int
    reasons_against: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward_s + self.backward_s

    def __str__(self) -> str:
        return (f"{self.strategy}: forward {_show(self.forward_s, 's')}, backward {_show(self.backward_s, 's')}; sends "
                f"{_show(self.bytes_forward, 'B')} and {_show(self.bytes_backward, 'B')}; holds "
                f"{_show(self.transient_bytes, 'B')} beside operands and results")


def _show(number: float, unit: str) -> str:
    """A number with a prefix, as 1.2 GB or 340 us."""
    exponent = max(-3, min(4, math.floor(math.log10(number) / 3 + 1e-9))) if number else 0
    prefix = {-3: "n", -2: "u", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T"}[exponent]
    return f"{number / 1000**exponent:.3g} {prefix}{unit}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The strategy taken, what each would cost, and by which rates."""

    strategy: Strategy
    estimates: tuple[Estimate, ...]
    rates: Rates

    def __str__(self) -> str:
        lines = [f"strategy={self.strategy!r}, by rates {self.rates.source}"]
        for found in self.estimates:
            lines += [f"  {found}", *(f"    against it: {reason}" for reason in found.reasons_against)]
        return "\n".join(lines)


def attention_seconds(problem: Problem, rates: Rates) -> tuple[float, float]:
    """The time of the kernels alone on each device, forward and backward: what no strategy can go below."""
    return (2 * (problem.d + problem.d_v) * problem.pairs / rates.forward_flops,
            2 * (3 * problem.d + 2 * problem.d_v) * problem.pairs / rates.backward_flops)


def why_not(strategy: Strategy, problem: Problem) -> list[str]:
    """Why a strategy cannot run a problem, each reason what is needed and what there is."""
    if strategy == "all_to_all" and problem.q_heads % problem.n:
        return [f"needs query heads that the devices along the sequence divide, there are q_heads={problem.q_heads}, "
                f"devices={problem.n}"]
    return []


def estimate(strategy: Strategy, problem: Problem, rates: Rates) -> Estimate:
    """What a strategy costs for a problem, and the reasons against choosing it."""
    forward, backward = _PASSES[strategy](problem, rates, attention_seconds(problem, rates))
    transient, reasons = max(forward.transient, backward.transient), why_not(strategy, problem)
    if strategy == "all_gather" and transient > MEMORY_SHARE * rates.memory_bytes:
        reasons.append(f"it holds keys and values of the whole sequence: at most {MEMORY_SHARE:.0%} of the device's "
                       f"{_show(rates.memory_bytes, 'B')} may be used, it takes {_show(transient, 'B')}")
    return Estimate(strategy, forward.seconds, backward.seconds, forward.moved, backward.moved, transient,
                    tuple(reasons))


def choose(problem: Problem, rates: Rates, requested: Strategy | None = None,
           against: Mapping[Strategy, Sequence[str]] | None = None) -> Choice:
    """The strategy requested, or the one with the least time of both passes and no reason against it.

    Args:
      against: further reasons why strategies cannot run, which the sizes do not show, such as a mask that cannot move.

    Raises:
      ValueError: `requested` names no strategy.
      UnsupportedError: the strategy requested cannot run, or none can, with every reason.
    """
    names: tuple[Strategy, ...] = get_args(Strategy)
    if requested is not None and requested not in names:
        raise errors.invalid(f"strategy must be None or one of {', '.join(map(repr, names))}",
                             f"strategy={requested!r}", "pass None to take the one that costs least")
    impossible = {name: [*why_not(name, problem), *(against or {}).get(name, ())] for name in names}
    found = tuple(_with_reasons(estimate(name, problem, rates), impossible[name]) for name in names)
    able = [one for one in found if not impossible[one.strategy]]
    wanted = min(able, key=lambda one: (bool(one.reasons_against), one.seconds), default=None)
    if wanted is None or (requested is not None and impossible[requested]):
        asked = names if requested is None else (requested,)
        raise errors.unsupported(
            f"{'no strategy can' if requested is None else f'strategy={requested!r} cannot'} run {problem}",
            [f"{name}: {reason}" for name in asked for reason in impossible[name]],
            f'use strategy=None to take one that can ("{wanted.strategy}" here)' if wanted else "change the problem")
    return Choice(requested or wanted.strategy, found, rates)


def _with_reasons(found: Estimate, impossible: Sequence[str]) -> Estimate:
    return dataclasses.replace(found, reasons_against=tuple(dict.fromkeys((*impossible, *found.reasons_against))))


def _ring(problem: Problem, rates: Rates, attention_s: tuple[float, float]) -> tuple[_Pass, _Pass]:
    """Steps that cost the longer of compute and hop. Beside its kernels a step copies rows of the operands, unpacks and
    packs what travels, and adds partial results."""
    steps, item, acc = problem.steps or problem.n, problem.itemsize, problem.acc_itemsize
    partial = problem.partial_itemsize or acc
    keys, sums, added = item * problem.kv, acc * problem.kv, partial + 2 * acc
    copied_forward = 2 * item * problem.q + 4 * keys + added * problem.q_out
    copied_backward = (2 * item * (problem.q + problem.q_out) + 4 * keys + 2 * sums
                       + added * (problem.q + problem.kv))

    def seconds(attention: float, copied: int, hop: int) -> float:
        step = attention / steps + copied / rates.memory_bytes_per_s + rates.step_s
        return (steps - 1) * max(step, hop / rates.link_bytes) + step

    home = sums if steps > 1 else 0
    forward = _Pass(seconds(attention_s[0], copied_forward, keys), (steps - 1) * keys,
                    2 * keys + (acc + partial) * problem.q_out)
    backward = _Pass(seconds(attention_s[1], copied_backward, keys + sums) + home / rates.link_bytes,
                     (steps - 1) * (keys + sums) + home, 2 * (keys + sums) + (acc + partial) * problem.q
                     + partial * problem.kv)
    return forward, backward


def _all_gather(problem: Problem, rates: Rates, attention_s: tuple[float, float]) -> tuple[_Pass, _Pass]:
    """Collectives that nothing hides. Keys and values are held as they arrive and in the order of the sequence, and so
    are the sums of dk and dv, which two calls add. A mask that keeps all is the same at each place.
    """
    n, keys, sums = problem.n, problem.itemsize * problem.kv, problem.acc_itemsize * problem.kv
    forward_s, backward_s = (seconds * (slower if problem.share < 1 else 1)
                             for seconds, slower in zip(attention_s, rates.placed, strict=True))
    return (_exposed(forward_s, (n - 1) * keys, n * 2 * keys, n * 2 * keys, rates),
            _exposed(backward_s, (n - 1) * (keys + sums), n * (2 * keys + 5 * sums), n * (2 * keys + 2 * sums), rates))


def _all_to_all(problem: Problem, rates: Rates, attention_s: tuple[float, float]) -> tuple[_Pass, _Pass]:
    """Collectives that nothing hides: operands there, out back; cotangents of out there, gradients back. A device keeps
    1/n of what it has. Fewer key heads than devices are repeated first, and sent as accumulators are. Each array is
    copied twice, by heads for the collective and into the order of the sequence."""
    repeats = problem.n // math.gcd(problem.n, problem.kv_heads)
    keys = problem.itemsize if repeats == 1 else repeats * problem.acc_itemsize
    held = problem.itemsize * (problem.q + problem.q_out) + keys * problem.kv
    moved = held * (problem.n - 1) // problem.n
    copied = 4 * held  # twice, read and written
    return (_exposed(attention_s[0], moved, copied, 2 * held, rates),
            _exposed(attention_s[1], moved, copied, 4 * held, rates))


def _exposed(attention_s: float, moved: int, copied: int, transient: int, rates: Rates) -> _Pass:
    """A pass of bytes sent and then bytes read and written by copies, beside its kernels."""
    beside = moved / rates.link_bytes + copied / rates.memory_bytes_per_s + 2 * rates.step_s
    return _Pass(attention_s + beside, moved, transient)


_PASSES = {"ring": _ring, "all_gather": _all_gather, "all_to_all": _all_to_all}
