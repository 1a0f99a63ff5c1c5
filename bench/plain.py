"""The plain call that a feature is measured against: a batch of its sequences, or its shapes, and a mask of numbers.

    share     the pairs of the feature's problem over those of the plain calls
    of plain  share * (time of the plain calls) / (time with the feature): 1 where the feature costs nothing

Documents of one length are one plain call, with a batch of them. Of documents of several lengths those of each length
are a call, one after another in one executable. Cutting and joining them is not timed.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp

from bench import features, timing
from bench.contestants import OURS, PEERS, SHARED, Arrays, Contestant, Exclusive, Prepared, prepared
from pallas_flash import device, dispatch
from pallas_flash.testing.problems import Plain, Problem

__all__ = ["PLAIN", "calls", "of_plain", "share"]


def _plain(problem: Problem, **changes: Any) -> Problem:
    return dataclasses.replace(problem, bias=None, sinks=False, learned=(), dropout_rate=0.0, softcap=None, plain=None,
                               mask=_wanted(problem).mask, **changes)


def _wanted(problem: Problem) -> Plain:
    if problem.plain is None:
        raise ValueError(f"{problem.name} is no feature: nothing is plainer")
    return problem.plain


def _lengths(problem: Problem) -> tuple[int, ...]:
    """The lengths of the sequences that each plain call has, cut from every row of tokens one after another."""
    lengths = _wanted(problem).lengths or (problem.q_len,)
    return lengths[:1] if len(set(lengths)) == 1 else lengths


def calls(problem: Problem) -> list[Problem]:
    """The plain calls."""
    if _wanted(problem).lengths is None:
        return [_plain(problem)]
    tokens, lengths = problem.batch * problem.q_len, _lengths(problem)
    return [_plain(problem, batch=tokens // sum(lengths), q_len=length, kv_len=length) for length in lengths]


def _cut(problem: Problem, x: Any) -> tuple[Any, ...]:
    """An array of a problem, (batch, length, heads, dim), as those of the plain calls."""
    if _wanted(problem).lengths is None:
        return (x,)
    lengths = _lengths(problem)
    rows = x.reshape(-1, sum(lengths), *x.shape[2:])
    stops = itertools.accumulate(lengths)
    return tuple(jnp.array(rows[:, stop - length:stop]) for length, stop in zip(lengths, stops, strict=True))


def _joined(problem: Problem, parts: tuple[Any, ...]) -> Any:
    """What `_cut` came from."""
    joined = jnp.concatenate(parts, axis=1)
    return joined if _wanted(problem).lengths is None else joined.reshape(problem.batch, problem.q_len,
                                                                          *joined.shape[2:])


def share(problem: Problem) -> float:
    """The pairs of a problem over those of its plain calls."""
    return features.attended(problem) / sum(features.attended(call) for call in calls(problem))


def of_plain(problem: Problem, mine: list[float], plain: list[float]) -> timing.Spread:
    """What of the plain calls' speed is left, round by round."""
    return timing.Spread(*(share(problem) * x for x in timing.ratios(mine, plain)))


class _PlainCall(Contestant):
    """The implementation of ours that runs plain calls here."""

    name, label = "plain", "a plain call"

    def why_not(self, problem: Problem) -> str:
        return "" if problem.plain else "the problem is no feature: nothing is plainer"

    def computes(self, problem: Problem) -> Problem:
        return problem if _wanted(problem).lengths else _plain(problem)

    def prepare(self, problem: Problem, arrays: Arrays, direction: str, exclusive: Exclusive = SHARED) -> Prepared:
        found = calls(problem)
        attends = [next(ours for ours in OURS if ours.name == self._chosen(call)).attention(call) for call in found]
        with exclusive:
            cut = Arrays(*(_cut(problem, x) for x in arrays[:4]), {}, {})

        def attention(*qkv: Any) -> tuple[Any, ...]:
            return tuple(attend(*one) for attend, *one in zip(attends, *qkv, strict=True))
        one = prepared(attention, cut, direction, exclusive)
        return one._replace(results=lambda results: {
            name: _joined(problem, parts) for name, parts in one.results(results).items()})

    def schedule(self, problem: Problem, direction: str) -> str | None:
        call = calls(problem)[0]
        return next(ours for ours in OURS if ours.name == self._chosen(call)).schedule(call, direction)

    def _chosen(self, call: Problem) -> str:
        return dispatch.decide(call.spec(), device.current()).implementation.name


PLAIN = _PlainCall()
PEERS.append(PLAIN)
