"""The table of implementations, the choice among them, and why: pure data, so that a laptop can ask what a GPU would
run."""

import dataclasses
import functools
from collections.abc import Callable
from importlib import import_module
from typing import Literal, NamedTuple

from pallas_flash import errors
from pallas_flash.arrays import Array, Float
from pallas_flash.device import Device
from pallas_flash.kernels.hopper import support as hopper
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["Decision", "IMPLEMENTATIONS", "Implementation", "Name", "Schedules", "decide", "explain", "get"]


Name = Literal["hopper", "xla", "reference"]
"""Of each row of `IMPLEMENTATIONS`: what a type checker knows of them."""


class Schedules(NamedTuple):
    """Where the schedules of one pass come from, for benchmarks: functions written "module:name"."""

    default: str
    """(spec, device) -> the schedule that runs."""
    reasons_against: str | None = None
    """(spec, schedule, smem_bytes) -> the reasons why another cannot run; None: none but the default is offered."""
    assume: str | None = None
    """(schedule) -> a context in which it is the default."""


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
    """

    name: str
    summary: str
    why_not: Callable[[AttentionSpec, Device], list[str]]
    automatic: bool
    differentiates_itself: bool
    modules: tuple[str, str]
    schedules: tuple[Schedules, Schedules] | None = None

    def forward(self, spec: AttentionSpec, operands: Operands) -> Results[Array]:
        """out and the statistics of rows."""
        results: Results[Array] = import_module(self.modules[0]).forward(spec, operands)
        return results

    def backward(self, spec: AttentionSpec, operands: Operands, out: Float[Array, "b t h v"],
                 stats: Float[Array, "b h 2 t"], dout: Float[Array, "b t h v"],
                 dstats: Float[Array, "b h 2 t"]) -> Gradients[Array]:
        """The gradients, from `forward`'s results and their cotangents, of whose statistics only that of lse counts."""
        gradients: Gradients[Array] = import_module(self.modules[1]).backward(
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
                              "pallas_flash.kernels.hopper.defaults:assume"),
                    Schedules("pallas_flash.kernels.hopper.defaults:default_backward",
                              "pallas_flash.kernels.hopper.rules:reasons_against",
                              "pallas_flash.kernels.hopper.defaults:assume"))),
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
    """What runs a spec on a device, and the reasons against each implementation that could not."""

    spec: AttentionSpec
    device: Device
    implementation: Implementation
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [str(self.spec), f"on {self.device.name}: implementation={self.implementation.name!r}, "
                 f"{self.implementation.summary}"]
        for row in IMPLEMENTATIONS:
            if row is not self.implementation:
                lines.append(f"  not {row.name!r}: {self._why_not(row)}")
        return "\n".join(lines)

    def _why_not(self, row: Implementation) -> str:
        if self.reasons[row.name]:
            return "; ".join(self.reasons[row.name])
        if not row.automatic:
            return "it runs only when it is named"
        comes_first = IMPLEMENTATIONS.index(row) < IMPLEMENTATIONS.index(self.implementation)
        return f"it could run, but another {'is named' if comes_first else 'comes first'}"


def get(name: str) -> Implementation:
    """The implementation of that name."""
    for row in IMPLEMENTATIONS:
        if row.name == name:
            return row
    names = ", ".join(repr(row.name) for row in IMPLEMENTATIONS)
    raise errors.invalid(f"implementation must be None or one of {names}", f"implementation={name!r}",
                         "pass None to take the first that can run")


def decide(spec: AttentionSpec, device: Device, requested: str | None = None) -> Decision:
    """What runs `spec` on `device`: the implementation requested, or the first that can.

    Raises:
      ValueError: `requested` names no implementation.
      UnsupportedError: the implementation requested cannot, with every reason.
    """
    return _decide(spec, device, None if requested is None else get(requested))


@functools.lru_cache(maxsize=4096)
def _decide(spec: AttentionSpec, device: Device, chosen: Implementation | None) -> Decision:
    reasons = {row.name: row.why_not(spec, device) for row in IMPLEMENTATIONS}
    able = [row for row in IMPLEMENTATIONS if row.automatic and not reasons[row.name]]
    if chosen is None:
        return Decision(spec, device, able[0], reasons)
    if reasons[chosen.name]:
        raise errors.unsupported(f"implementation={chosen.name!r} cannot run {spec} on {device.name}",
                                 reasons[chosen.name],
                                 f'use implementation=None to take the first that can ("{able[0].name}" here)')
    return Decision(spec, device, chosen, reasons)


def explain(spec: AttentionSpec, device: Device, requested: str | None = None) -> str:
    """What `decide` chooses and why, or why it refuses, as text."""
    try:
        return str(decide(spec, device, requested))
    except errors.UnsupportedError as error:
        return f"UnsupportedError: {error}"
