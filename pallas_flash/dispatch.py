"""The table of implementations, the choice among them, and why: pure data, so that a laptop can ask what a GPU would
run."""

import dataclasses
import functools
import pkgutil
import threading
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, NamedTuple

from pallas_flash import errors, padding
from pallas_flash.arrays import Array, Float
from pallas_flash.device import Device
from pallas_flash.kernels.ampere import support as ampere
from pallas_flash.kernels.hopper import support as hopper
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["Decision", "IMPLEMENTATIONS", "Implementation", "Name", "Requested", "Schedules", "choose", "decide",
           "explain", "get", "require_device", "require_names", "warn_of_fallback"]


Name = Literal["hopper", "ampere", "xla", "reference"]
"""Of each row of `IMPLEMENTATIONS`: what a type checker knows of them."""

Requested = Name | tuple[Name, ...] | None
"""What `implementation=` takes: a name, names in the caller's order of preference, or None for the table's order."""


class Schedules(NamedTuple):
    """Where the schedules of one pass come from, for `explain` and benchmarks: functions written "module:name"."""

    default: str
    """(spec, device) -> the schedule that runs."""
    reasons_against: str | None = None
    """(spec, schedule, smem_bytes) -> the reasons why another cannot run; None: none but the default is offered."""
    assume: str | None = None
    """(schedule) -> a context in which it is the default."""
    kernels: str | None = None
    """(schedule) -> the names of the kernels that the pass launches, in order; None: XLA makes them."""


def _no_device(device: Device) -> bool:
    del device
    return False


def _all_measured(spec: AttentionSpec) -> list[str]:
    del spec
    return []


def _itself(spec: AttentionSpec) -> None:
    del spec


def _never(spec: AttentionSpec) -> bool:
    del spec
    return False


def _no_copies(spec: AttentionSpec) -> None:
    del spec


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute attention.

    Attributes:
      name: what `implementation=` calls it.
      summary: what it is, one line.
      why_not: (spec, device) -> the reasons why it cannot run the spec there, each what is needed and what there is;
        empty: it can.
      automatic: whether it is chosen without being named.
      differentiates_itself: JAX differentiates its forward, to any order and in forward mode; the others have a
        backward.
      modules: the modules that define `forward` and `backward`, imported when first used.
      schedules: those of the forward and of the backward; None where there are no schedules.
      is_made_for: (device) -> whether it was written for that kind of device: an automatic choice that leaves it there
        warns.
      launches: where the passes of a spec come from as lists of kernel launches, a function written "module:name":
        (spec, device) -> the forward, the backward (`kernels.mosaic.launch.Pass`; None if that alone is no such list);
        None: they are JAX's own programs.
      not_measured: (spec) -> what of the spec it computes, but was not timed on a GPU, or was and is not yet as fast as
        it is to be, as reasons against an automatic choice: who names the implementation gets it.
      backward_of: (spec) -> the name of another implementation, whose backward follows this one's forward; None: it has
        its own.
      copies: (spec) -> what is copied around the kernels, because they compute another problem; None: nothing.
      finds_lost: (spec) -> whether its forward takes lengths of a cache as they are, also above the capacity, and
        gives NaN for sequences that have lost keys; for the others `autodiff` does.
      takes_sinks: (spec) -> whether its forward computes `AttentionSpec.sinks`; for the others `autodiff` adds them to
        the results.
      merges: the module that merges results of parts of a problem in its kernels; None: XLA does, beside them.
    """

    name: str
    summary: str
    why_not: Callable[[AttentionSpec, Device], list[str]]
    automatic: bool
    differentiates_itself: bool
    modules: tuple[str, str]
    schedules: tuple[Schedules, Schedules] | None = None
    is_made_for: Callable[[Device], bool] = _no_device
    launches: str | None = None
    not_measured: Callable[[AttentionSpec], list[str]] = _all_measured
    backward_of: Callable[[AttentionSpec], str | None] = _itself
    copies: Callable[[AttentionSpec], padding.Copies | None] = _no_copies
    finds_lost: Callable[[AttentionSpec], bool] = _never
    takes_sinks: Callable[[AttentionSpec], bool] = _never
    merges: str | None = None

    def merging(self) -> ModuleType | None:
        """What merges the results of parts of a problem in its kernels; None: nothing does."""
        return None if self.merges is None else import_module(self.merges)

    def forward(self, spec: AttentionSpec, operands: Operands) -> Results[Array]:
        """out and the statistics of rows."""
        results: Results[Array] = import_module(self.modules[0]).forward(spec, operands)
        return results

    def backward(self, spec: AttentionSpec, operands: Operands, out: Float[Array, "b t h v"] | None,
                 stats: Float[Array, "b h 2 t"], dout: Float[Array, "b t h v"],
                 dstats: Float[Array, "b h 2 t"]) -> Gradients[Array]:
        """The gradients, from `forward`'s results and their cotangents, of whose statistics only that of lse counts. Of
        a partial spec, out is None (`autodiff.without_out`).
        """
        other = self.backward_of(spec)
        module = (self if other is None else get(other)).modules[1]
        gradients: Gradients[Array] = import_module(module).backward(
            spec, operands, out, stats, dout, dstats)
        return gradients


def _anything(spec: AttentionSpec, device: Device) -> list[str]:
    del spec, device
    return []


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("hopper", "Mosaic GPU kernels for sm_90a", hopper.why_not, True, False,
                   ("pallas_flash.kernels.hopper.calls", "pallas_flash.kernels.hopper.calls"),
                   (Schedules("pallas_flash.kernels.hopper.defaults:default_forward",
                              "pallas_flash.kernels.hopper.rules:reasons_against",
                              "pallas_flash.kernels.hopper.defaults:assume",
                              "pallas_flash.kernels.hopper.kernel_names:kernels"),
                    Schedules("pallas_flash.kernels.hopper.defaults:default_backward",
                              "pallas_flash.kernels.hopper.rules:reasons_against",
                              "pallas_flash.kernels.hopper.defaults:assume",
                              "pallas_flash.kernels.hopper.kernel_names:kernels")), hopper.is_made_for,
                   "pallas_flash.kernels.hopper.calls:passes", hopper.not_measured, hopper.backward_of, hopper.copies,
                   hopper.finds_lost, hopper.takes_sinks, merges="pallas_flash.kernels.hopper.merging"),
    Implementation("ampere", "Mosaic GPU kernels with mma.sync, for compute capability 8.0 and higher", ampere.why_not,
                   True, False, ("pallas_flash.kernels.ampere.calls", "pallas_flash.kernels.ampere.calls"),
                   (Schedules("pallas_flash.kernels.ampere.defaults:default_forward",
                              "pallas_flash.kernels.ampere.rules:reasons_against",
                              "pallas_flash.kernels.ampere.defaults:assume",
                              "pallas_flash.kernels.ampere.schedule:kernels"),
                    Schedules("pallas_flash.kernels.ampere.defaults:default_backward",
                              "pallas_flash.kernels.ampere.rules:reasons_against",
                              "pallas_flash.kernels.ampere.defaults:assume",
                              "pallas_flash.kernels.ampere.schedule:kernels")), ampere.is_made_for,
                   "pallas_flash.kernels.ampere.calls:passes", ampere.not_measured, ampere.backward_of, ampere.copies,
                   ampere.finds_lost, ampere.takes_sinks),
    Implementation("xla", "blockwise attention in plain JAX, O(length) memory", _anything, True, False,
                   ("pallas_flash.kernels.xla.forward", "pallas_flash.kernels.xla.backward"),
                   (Schedules("pallas_flash.kernels.xla.schedule:default"),
                    Schedules("pallas_flash.kernels.xla.schedule:default"))),
    Implementation("reference", "the O(q_len * kv_len) oracle, differentiable to any order", _anything, False, True,
                   ("pallas_flash.reference", "pallas_flash.reference")),
)
"""In order of preference. A new GPU generation is one row."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What runs a spec on a device, and the reasons against each implementation that could not.

    Attributes:
      requested: what the caller named; None: the choice is automatic.
    """

    spec: AttentionSpec
    device: Device
    implementation: Implementation
    reasons: dict[str, list[str]]
    requested: str | tuple[str, ...] | None

    @functools.cached_property
    def left(self) -> tuple[Implementation, ...]:
        """The implementations written for the device that an automatic choice leaves. What is empty runs nowhere."""
        if self.requested is not None or self.spec.is_empty:
            return ()
        before = IMPLEMENTATIONS[:IMPLEMENTATIONS.index(self.implementation)]
        return tuple(row for row in before if row.is_made_for(self.device))

    def passes(self) -> tuple[Any, ...] | None:
        """The passes of `launches.Passes` as lists of launches (`Implementation.launches`); None where there are none.
        """
        where = self.implementation.launches
        return None if where is None else pkgutil.resolve_name(where)(self.spec, self.device)

    def __str__(self) -> str:
        lines = [str(self.spec), f"on {self.device.name}: implementation={self.implementation.name!r}, "
                 f"{self.implementation.summary}", *self._passes()]
        for row in IMPLEMENTATIONS:
            if row is not self.implementation:
                lines.append(f"  not {row.name!r}: {self._why_not(row)}")
        return "\n".join(lines)

    def _passes(self) -> list[str]:
        """What each pass runs: the kernels, where they are ours, and the schedule."""
        if self.spec.is_empty:
            return ["  nothing runs: there is no output element or no key"]
        lines, other = [], self.implementation.backward_of(self.spec)
        theirs = self.implementation if other is None else get(other)
        for i, (name, row) in enumerate((("forward", self.implementation), ("backward", theirs))):
            if row.schedules is None:
                continue
            schedules, copies = row.schedules[i], row.copies(self.spec)
            run = self.spec if copies is None else (copies.run, copies.backward_run)[i]
            schedule = pkgutil.resolve_name(schedules.default)(run, self.device)
            kernels = pkgutil.resolve_name(schedules.kernels)(schedule) if schedules.kernels else ()
            of = () if row is self.implementation else (f"that of {row.name!r}",)
            lines.append(f"  {name}: " + ", ".join((*of, *kernels, str(schedule))))
            if copies is not None and i == 0 and copies.instead:
                lines.append(f"    runs {copies.instead}")
            if copies is not None and (said := getattr(copies, name)):
                lines.append(f"    copies: {said}")
        return lines

    def _why_not(self, row: Implementation) -> str:
        if self.reasons[row.name]:
            return "; ".join(self.reasons[row.name])
        if self.requested is not None:
            is_named = row.name in _names(self.requested)
            return f"it could run, but another {'comes first' if is_named else 'is named'}"
        return "it could run, but another comes first" if row.automatic else "it runs only when it is named"


def get(name: str) -> Implementation:
    """The implementation of that name."""
    for row in IMPLEMENTATIONS:
        if row.name == name:
            return row
    raise _unknown(name)


def _unknown(requested: object) -> ValueError:
    names = ", ".join(repr(row.name) for row in IMPLEMENTATIONS)
    return errors.invalid(f"implementation must be None, one of {names}, or a tuple of these",
                          f"implementation={requested!r}", "pass None to take the first that can run")


def require_names(requested: object) -> None:
    """Raises ValueError unless `requested` is what `implementation=` takes."""
    if requested is not None:
        names, known = _names(requested), [row.name for row in IMPLEMENTATIONS]
        if not names or any(name not in known for name in names):
            raise _unknown(requested)


def _names[T](requested: T | tuple[T, ...]) -> tuple[T, ...]:
    return requested if isinstance(requested, tuple) else (requested,)


def decide(spec: AttentionSpec, device: Device, requested: str | tuple[str, ...] | None = None) -> Decision:
    """What runs `spec` on `device`: of the implementations requested, the first in the caller's order that can; else
    the first automatic one of the table that can.

    Raises:
      ValueError: `requested` names no implementation.
      UnsupportedError: none of those requested can, with every reason.
    """
    require_names(requested)
    return _decide(spec, device, requested)


@functools.lru_cache(maxsize=4096)
def _decide(spec: AttentionSpec, device: Device, requested: str | tuple[str, ...] | None) -> Decision:
    reasons = {row.name: row.why_not(spec, device) for row in IMPLEMENTATIONS}
    cautious = {row.name: reasons[row.name] or row.not_measured(spec) for row in IMPLEMENTATIONS}
    able = [row for row in IMPLEMENTATIONS if row.automatic and not cautious[row.name]]
    if requested is None:
        return Decision(spec, device, able[0], cautious, requested)
    names = _names(requested)
    for name in names:
        if not reasons[name]:
            return Decision(spec, device, get(name), reasons, requested)
    found = [reason if len(names) == 1 else f"{name!r} {reason}" for name in names for reason in reasons[name]]
    raise errors.unsupported(f"implementation={requested!r} cannot run {spec} on {device.name}", found,
                             f'use implementation=None to take the first that can ("{able[0].name}" here)')


def choose(spec: AttentionSpec, device: Device, requested: str | tuple[str, ...] | None = None) -> Implementation:
    """The implementation that `decide` chooses, for a call that runs it: warns as `warn_of_fallback` does."""
    decision = decide(spec, device, requested)
    if decision.left:
        warn_of_fallback(decision)
    return decision.implementation


_warned: set[tuple[str, str]] = set()
"""Implementation and reason of the warnings that were given."""
_warned_lock = threading.Lock()


def warn_of_fallback(decision: Decision) -> None:
    """Warns where an automatic choice leaves an implementation written for the device, once for each reason in a
    process; Python's own memory, which is by line of code and often cleared, plays no part."""
    for row in decision.left:
        with _warned_lock:
            new = {(row.name, reason) for reason in decision.reasons[row.name]} - _warned
            _warned.update(new)
        if not new:
            continue
        try:
            errors.warn(_fallback(decision, row.name))
        except errors.FallbackWarning:  # a filter made it an error, and shall do so in the next call
            with _warned_lock:
                _warned.difference_update(new)
            raise


def _fallback(decision: Decision, left: str) -> errors.FallbackWarning:
    name = decision.implementation.name
    return errors.fallback(
        f"implementation={name!r} runs {decision.spec} on {decision.device.name}, because {left!r}, written for this "
        "device, cannot", decision.reasons[left],
        f"change that to reach {left!r}; what is meant as it is can be named (implementation={name!r}) or silenced "
        '(warnings.filterwarnings("ignore", category=pallas_flash.FallbackWarning))')


def require_device(device: object) -> None:
    """Raises ValueError unless `device` is None or a `Device`."""
    if not isinstance(device, Device | None):
        raise errors.invalid("device must be a pallas_flash.device.Device", f"device={device!r}",
                             "pass one of those given, such as device.H200, or device.of(a JAX device)")


def explain(spec: AttentionSpec, device: Device, requested: str | tuple[str, ...] | None = None,
            has_sinks: bool = False) -> str:
    """What `decide` chooses and why, or why it refuses, as text; and with sinks, where they join."""
    require_device(device)
    try:
        decision = decide(spec, device, requested)
    except errors.UnsupportedError as error:
        return f"UnsupportedError: {error}"
    if not has_sinks:
        return str(decision)
    in_kernel = decision.implementation.takes_sinks(spec)
    return f"{decision}\nsinks: {'in the kernel' if in_kernel else 'one more pass over out, in plain JAX'}"
