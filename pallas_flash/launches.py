"""The passes of a spec as lists of kernel launches, for a runtime that launches them itself."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from pallas_flash import dispatch, errors
from pallas_flash.device import Device, assume
from pallas_flash.kernels.mosaic.launch import Launch, Pass
from pallas_flash.kernels.mosaic.target import lowering_for
from pallas_flash.spec import AttentionSpec

__all__ = ["Launch", "Pass", "Passes", "launches", "tracing"]


class Passes(NamedTuple):
    """The forward: q, k, v -> out, stats; the backward: q, k, v, out, stats, dout, dstats -> dq, dk, dv. Both read what
    `Pass.make` makes, too, if they have it. And the gradient of a bias, of what the backward reads; None where no
    kernel makes it. The gradients of a score function's arrays are none of these. Against a cache the forward also
    takes the arrays of the mask, a bias, sinks and the page table, and the backward is no list of launches: None.
    `implementation` has them; `left` names those written for the device that an automatic choice leaves for it, with
    each reason (`dispatch.Decision.left`); `reasons` all that cannot.
    """

    forward: Pass
    backward: Pass | None
    dbias: Pass | None
    implementation: str
    left: tuple[tuple[str, str], ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()


@contextlib.contextmanager
def tracing(device: Device) -> Iterator[None]:
    """A context in which kernels of launches are to be traced, so that they are lowered for `device`."""
    with assume(device), lowering_for(device):
        yield


def launches(spec: AttentionSpec, device: Device, requested: str | None = None) -> Passes:
    """The launches of what an automatic choice, or the implementation that is named, runs for `spec` on `device`, with
    the default schedules. Trace their kernels inside `tracing(device)`.

    Raises:
      UnsupportedError: that is no list of launches, with the reasons against each implementation that has one; or what
        is named cannot run the spec.
    """
    decision = dispatch.decide(spec, device, requested)
    passes = None if spec.is_empty else decision.passes()
    if passes is None:
        found = [] if decision.implementation.launches else [
            f"{row.name!r} {reason}" for row in dispatch.IMPLEMENTATIONS if row.launches
            for reason in decision.reasons[row.name]]
        found = found or [_what_is_beside(spec, decision)]
        raise errors.unsupported(f"launches of {spec} on {device.name}", found,
                                 f"let JAX run it (implementation={decision.implementation.name!r})")
    forward, backward, *others = passes
    reasons = *((name, reason) for name, found in decision.reasons.items() for reason in found),
    names = {row.name for row in decision.left}
    return Passes(forward, backward, others[0] if others else None, decision.implementation.name,
                  tuple(pair for pair in reasons if pair[0] in names), reasons)


def _what_is_beside(spec: AttentionSpec, decision: dispatch.Decision) -> str:
    """Why what runs is no list of launches, although an implementation that has them is chosen."""
    if spec.is_empty:
        return "nothing runs: there is no output element or no key"
    if decision.implementation.launches is None:
        return f"{decision.implementation.name!r} is JAX's own program, not a list of launches"
    name, copies = decision.implementation.name, decision.implementation.copies(spec)
    if copies is not None and copies.instead:
        return f"{name!r} runs another problem, which JAX makes of this one before the launches: {copies.instead}"
    if copies is not None:
        return f"{name!r} reads copies that JAX makes before the launches ({copies.forward})"
    if spec.score is not None:
        return f"{name!r} has no launches for a score function, or for a mask class of your own with or beside arrays"
    if spec.bias is not None:
        return f"{name!r} makes what it reads of this bias beside the launches, by JAX"
    return f"{name!r} reads arrays that JAX makes beside the launches, those of a mask that holds arrays or of dropout"
