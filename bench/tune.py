"""Sweeps schedules of our kernels: those legal for a problem, checked, then timed side by side with the default.

Names of fields are those of the schedule; of the backward's parts, "kv.block_q" and the like. Nothing here runs inside
a user's call: what is found becomes a row of the default table, with the record that put it there.
"""

import contextlib
import dataclasses
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from bench import records, run, timing
from bench.check import Check
from bench.contestants import OURS, inputs_of
from pallas_flash import device, dispatch
from pallas_flash.testing.problems import Problem

__all__ = ["TUNABLE", "Target", "candidates", "rows", "scheduled", "sweep", "vary"]

GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "forward": {
        "block_kv": (48, 64, 80, 96, 112, 128, 144, 160, 176, 192), "warpgroups": (2, 3), "num_stages": (1, 2, 3, 4),
        "query_buffers": (1, 2), "out_chunks": (0, 1, 2, 4), "pingpong": (False, True),
        "maxima": (0, 2, 4, 8), "slack": (0.0, 0.75, 1.0, 2.0), "long_slack": (1.0, 2.0, 8.0),
        "held_columns": (0, 16, 32, 48, 64), "q_registers": (False, True), "opaque": (False, True),
        "section_bytes": (8 << 20, 16 << 20, 32 << 20, 64 << 20), "mask_kernel": (False, True)},
    "backward": {
        "kv.block_q": (64, 128), "kv.warpgroups": (1, 2, 3), "kv.num_stages": (1, 2, 4),
        "kv.dq": ("none", "shared", "own"), "kv.ds_slots": (1, 2, 4), "kv.dq_slots": (1, 2, 3),
        "kv.ordered": (False, True), "kv.rounds_dq": (False, True), "kv.longest_last": (0, 2, 3, 4, 6, 8),
        "kv.pipelined": (False, True), "kv.paired": (False, True), "kv.pinned": (False, True),
        "kv.opaque": (False, True),
        "kv.p_slots": (1, 2, 4), "kv.section_bytes": (16 << 20, 32 << 20, 64 << 20),
        "dq.block_kv": (32, 48, 64, 80, 96, 112, 128), "dq.warpgroups": (1, 2, 3), "dq.k_stages": (1, 2, 3),
        "dq.v_stages": (1, 2, 3), "dq.pipelined": (False, True), "dq.pinned": (False, True),
        "dq.opaque": (False, True), "mask_kernel": (False, True)},
}
"""Values to try, of every implementation: a field that a schedule does not have is passed over."""
TUNABLE = tuple(row.name for row in dispatch.IMPLEMENTATIONS
                if row.schedules and all(pass_.reasons_against for pass_ in row.schedules))
"""The implementations that have more than one schedule."""


class Target(NamedTuple):
    """What is tuned: one pass ("forward" or "backward") of one of our implementations, on one problem."""

    implementation: str
    kernel: str
    problem: Problem

    @property
    def schedules(self) -> dispatch.Schedules:
        """Where the schedules of this pass come from."""
        both = dispatch.get(self.implementation).schedules
        assert both is not None, self.implementation
        return both[("forward", "backward").index(self.kernel)]


def vary(schedule: Any, changes: dict[str, Any]) -> Any:
    """A schedule with some fields, named by their paths, replaced; None where it has no such field."""
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        part = getattr(schedule, head, None)
        if head not in {field.name for field in dataclasses.fields(schedule)} or (rest and part is None):
            return None
        new = vary(part, {rest: value}) if rest else value
        if new is None:
            return None
        schedule = dataclasses.replace(schedule, **{head: new})
    return schedule


def candidates(target: Target, crossed: list[str]) -> list[Any]:
    """The default, and every legal schedule that differs from it in the crossed fields, or in any one field if none."""
    schedules, spec, grid = target.schedules, target.problem.spec(), GRIDS[target.kernel]
    start = pkgutil.resolve_name(schedules.default)(spec, device.current())
    unknown = [name for name in crossed if name not in grid]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; the fields of {target.kernel} are {', '.join(grid)}")
    if crossed:
        changes = [dict(zip(crossed, values)) for values in itertools.product(*(grid[name] for name in crossed))]
    else:
        changes = [{name: value} for name, values in grid.items() for value in values]
    found = [schedule for change in changes if (schedule := vary(start, change)) is not None]
    reasons_against = pkgutil.resolve_name(schedules.reasons_against or "")
    smem_bytes = device.current().smem_bytes
    legal = [schedule for schedule in found if not reasons_against(spec, schedule, smem_bytes)]
    return list(dict.fromkeys([start, *legal]))


@contextlib.contextmanager
def scheduled(target: Target, schedule: Any) -> Iterator[None]:
    """Makes `schedule` the default of a pass, for every problem; what was traced with another one is forgotten."""
    assume = pkgutil.resolve_name(target.schedules.assume or "")
    jax.clear_caches()
    try:
        with assume(schedule):
            yield
    finally:
        jax.clear_caches()


def sweep(target: Target, schedules: list[Any], rounds: int, seconds: float, common: dict[str, Any],
          say: Callable[[str], Any] = print, advance: Callable[[], Any] = lambda: None) -> list[dict[str, Any]]:
    """One record a schedule that compiles and is right; the first schedule is what the others are compared with."""
    ours = next(contestant for contestant in OURS if contestant.name == target.implementation)
    problem, kernel = target.problem, target.kernel
    case = Check(problem, inputs_of(problem), gradients=kernel == "backward")
    calls, by_name = {}, {}
    for schedule in schedules:
        advance()
        try:
            with scheduled(target, schedule):
                prepared = ours.prepare(problem, case.arrays, kernel)
                results = prepared.results(prepared.call.finish())
            errors = case.errors(ours, results)
        except Exception as error:  # the compiler's refusal of one schedule is a result too
            say(f"{schedule}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if max(errors.values()) > case.limit:
            say(f"{schedule}: wrong, relative errors {errors}")
            continue
        calls[str(schedule)], by_name[str(schedule)] = prepared.call, errors
    times = timing.interleaved(calls, rounds, seconds) if calls else {}
    first = next(iter(times), None)
    return [common | dict(
        kind="tune", problem=problem.name, direction=kernel, contestant=ours.name,
        spec=records.spec_fields(problem.spec()), schedule=name, errors=by_name[name],
        median_us=timing.spread(times[name]).median * 1e6,
        tflops=run.flops(problem, kernel) / timing.spread(times[name]).median / 1e12,
        speed_over_default=timing.ratios(times[name], times[first])._asdict()) for name in times]


def rows(found: list[dict[str, Any]]) -> list[str]:
    """A table, fastest first."""
    ordered = sorted(found, key=lambda record: -record["speed_over_default"]["median"])
    return [f"{record['speed_over_default']['median']:.3f}  {record['tflops']:6.1f} TFLOP/s  {record['schedule']}"
            for record in ordered]
