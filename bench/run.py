"""Measures a problem: checks every contestant, times those that are right side by side, and makes the records."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench import chain, features, plain, records, timing
from bench.check import NOISE, Check
from bench.contestants import SHARED, Arrays, Contestant, Exclusive, Prepared, inputs_of
from pallas_flash.spec import AttentionSpec
from pallas_flash.testing.problems import Problem

__all__ = ["Hooks", "LeftOut", "Options", "flops", "matmul_peak", "measure"]

Record = dict[str, Any]
LeftOut = Callable[[str, str, str, str], Any]
"""Called with (problem, direction, contestant's label, reason) for each contestant that is not timed."""


class Options(NamedTuple):
    """How to measure."""

    rounds: int = 9
    burst_seconds: float = 0.01
    timed: bool = True


class Hooks(NamedTuple):
    """What goes on besides measuring."""

    left_out: LeftOut
    after_round: Callable[[], Any] = lambda: None
    exclusive: Exclusive = SHARED


def flops(problem: Problem, direction: str) -> float:
    """Floating-point operations of the pairs that attend: 2 products forward, 5 backward (the scores once more)."""
    pairs = features.attended(problem) * problem.q_heads
    forward = 2 * pairs * (problem.d + problem.d_v)
    backward = 2 * pairs * (3 * problem.d + 2 * problem.d_v)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def matmul_peak(rounds: int = 9) -> float:
    """FLOP/s of a square matrix product: bfloat16 8192^3 on a GPU, float32 2048^3 on a CPU."""
    size, dtype = (8192, jnp.bfloat16) if jax.default_backend() == "gpu" else (2048, jnp.float32)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in (0, 1))
    product = jax.jit(jnp.matmul)
    call = timing.Call(lambda: product(a, b), jax.block_until_ready)
    return 2 * size**3 / statistics.median(timing.burst(call, 0.02) for _ in range(rounds))


class _Truths:
    """The right results for the contestants of a problem: its own, those of its plain call, those without dropout."""

    def __init__(self, problem: Problem, arrays: Arrays, gradients: bool, exclusive: Exclusive) -> None:
        self.problem, self.arrays, self.gradients, self.exclusive = problem, arrays, gradients, exclusive
        self._cases: dict[tuple[AttentionSpec, bool], Check] = {}

    def case(self, contestant: Contestant) -> Check:
        """The truth of what a contestant computes, its executable compiled."""
        wanted = contestant.computes(self.problem)
        key = (wanted.spec(), wanted.sinks)
        if key not in self._cases:
            self._cases[key] = Check(wanted, self.arrays.of(wanted), self.gradients, self.exclusive)
            _ = self._cases[key].compute  # compiled now, not when the device is held
        return self._cases[key]

    def errors(self, contestant: Contestant, prepared: Prepared, call: timing.Call) -> dict[str, float]:
        """How far the results of a call are from the truth."""
        case = self.case(contestant)
        with self.exclusive:
            results = prepared.results(call.finish())
            if self._is_noisy(contestant):
                return case.noise(contestant, results, self.problem.dropout_rate)
            return case.errors(contestant, results)

    def wrong(self, contestant: Contestant, errors: dict[str, float]) -> str:
        """Why errors are too large; empty if they are not."""
        if not errors:
            return ""
        limit = NOISE if self._is_noisy(contestant) else self.case(contestant).limit
        if all(error <= limit for error in errors.values()):  # NaN is not
            return ""
        return f"wrong: relative errors {errors}, more than {limit:.1e}"

    def _is_noisy(self, contestant: Contestant) -> bool:
        return bool(self.problem.dropout_rate) and contestant.has_own_bits


class _Entrant(NamedTuple):
    contestant: Contestant
    prepared: Prepared
    errors: dict[str, float]
    call: timing.Call
    """What is timed: the prepared call, or a chain of them."""
    not_chained: str = ""
    """Why it is not a chain, where the others are."""


def _enter(truths: _Truths, contestants: Iterable[Contestant], direction: str, timed: bool,
           hooks: Hooks) -> Iterator[_Entrant]:
    """Compiles and checks each contestant; one that cannot run the problem, or is wrong, is left out."""
    for contestant in contestants:
        reason = contestant.why_not(truths.problem)
        if not reason:
            try:
                prepared = contestant.prepare(truths.problem, truths.arrays, direction, hooks.exclusive)
                errors = truths.errors(contestant, prepared, prepared.call) if timed else {}
            except Exception as error:  # whatever a peer raises: the others are still to be measured
                reason = _first_line(error)
            else:
                reason = truths.wrong(contestant, errors)
                if not reason:
                    yield _Entrant(contestant, prepared, errors, prepared.call)
                    continue
        hooks.left_out(truths.problem.name, direction, contestant.label, reason)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]


def _in_chains(truths: _Truths, entrants: list[_Entrant], options: Options) -> list[_Entrant]:
    """The entrants, with chains to be timed if calls are so short that the gaps between them count."""
    with truths.exclusive:
        fastest = min(timing.burst(entrant.call, options.burst_seconds / 10) for entrant in entrants)
    count = chain.length(truths.problem.kv_len, fastest, options.burst_seconds)
    return entrants if count is None else [_in_chain(truths, entrant, count) for entrant in entrants]


def _in_chain(truths: _Truths, entrant: _Entrant, count: int) -> _Entrant:
    """An entrant whose call is a chain, checked like a single call; where that fails, as it was and the reason."""
    try:
        call = entrant.prepared.chain(count)
        reason = truths.wrong(entrant.contestant, truths.errors(entrant.contestant, entrant.prepared, call))
    except Exception as error:  # one that cannot be captured, say
        reason = _first_line(error)
    return entrant._replace(not_chained=reason) if reason else entrant._replace(call=call)


def measure(problem: Problem, ours: list[Contestant], peers: list[Contestant], directions: list[str], options: Options,
            common: Record, hooks: Hooks) -> Iterator[list[Record]]:
    """For each direction of a problem, one record a contestant.

    Inputs, checks and timing hold `hooks.exclusive`; tracing and compiling do not.

    Args:
      common: fields that every record gets: the environment, the matmul peak.
    """
    with hooks.exclusive:
        arrays = jax.block_until_ready(inputs_of(problem))
    truths = _Truths(problem, arrays, directions != ["forward"], hooks.exclusive)
    names = [contestant.name for contestant in ours]
    for direction in directions:
        entrants = list(_enter(truths, [*ours, *peers], direction, options.timed, hooks))
        times: dict[str, list[float]] = {}
        if options.timed and entrants:
            entrants = _in_chains(truths, entrants, options)
            calls = {entrant.contestant.name: entrant.call for entrant in entrants}
            with hooks.exclusive:
                times = timing.interleaved(calls, options.rounds, options.burst_seconds, after_round=hooks.after_round)
        yield [_record(problem, direction, entrant, times, names, common) for entrant in entrants]


def _record(problem: Problem, direction: str, entrant: _Entrant, times: dict[str, list[float]], ours: list[str],
            common: Record) -> Record:
    name = entrant.contestant.name
    record = common | dict(
        kind="memory" if not times else "feature" if problem.plain else "speed", problem=problem.name,
        direction=direction, contestant=name, label=entrant.contestant.label, spec=records.spec_fields(problem.spec()),
        schedule=entrant.contestant.schedule(problem, direction), errors=entrant.errors,
        extra_bytes=entrant.prepared.extra_bytes)
    if not times:
        return record
    seconds = timing.spread(times[name])
    rate = flops(entrant.contestant.computes(problem), direction) / seconds.median
    against = {mine: timing.ratios(times[mine], times[name])._asdict()
               for mine in ours if mine in times and mine != name}
    return record | dict(
        median_us=seconds.median * 1e6, low_us=seconds.low * 1e6, high_us=seconds.high * 1e6,
        rounds_us=[round(t * 1e6, 3) for t in times[name]], tflops=rate / 1e12,
        chained=entrant.call.count if entrant.call.count > 1 else None,
        matmul_share=rate / common["matmul_flops"] if common.get("matmul_flops") else None, ratio_to=against,
        **{"not_chained": entrant.not_chained} if entrant.not_chained else {},
        **_beside_plain(problem, times[name], times.get(plain.PLAIN.name)) if name in ours else {})


def _beside_plain(problem: Problem, mine: list[float], times: list[float] | None) -> Record:
    """What of the speed of the problem's plain call is left; nothing where that was not timed."""
    if times is None:
        return {}
    return dict(plain_share=plain.share(problem), of_plain=plain.of_plain(problem, mine, times)._asdict())
