"""The passes of a spec as lists of kernel launches, for a runtime that launches them itself."""

from typing import NamedTuple

from pallas_flash import dispatch, errors
from pallas_flash.device import Device
from pallas_flash.kernels.mosaic.launch import Pass
from pallas_flash.spec import AttentionSpec

__all__ = ["Pass", "Passes", "launches"]


class Passes(NamedTuple):
    """The forward: q, k, v -> out, stats; the backward: q, k, v, out, stats, dout, dstats -> dq, dk, dv. Both read what
    `Pass.make` makes, too, if they have it. Against a cache the forward also takes the arrays of the mask, a bias,
    sinks and the page table, and the backward is no list of launches: None.
    """

    forward: Pass
    backward: Pass | None


def launches(spec: AttentionSpec, device: Device) -> Passes:
    """The launches of what an automatic choice runs for `spec` on `device`, with the default schedules.

    Trace their kernels under `device.assume(device)`.

    Raises:
      UnsupportedError: that is no list of launches, with the reasons against each implementation that has one.
    """
    decision = dispatch.decide(spec, device)
    passes = None if spec.is_empty else decision.passes()
    if passes is None:
        found = [f"{row.name!r} {reason}" for row in dispatch.IMPLEMENTATIONS if row.launches
                 for reason in decision.reasons[row.name]] or [_what_is_beside(spec, decision)]
        raise errors.unsupported(f"launches of {spec} on {device.name}", found,
                                 f"let JAX run it (implementation={decision.implementation.name!r})")
    return Passes(*passes)


def _what_is_beside(spec: AttentionSpec, decision: dispatch.Decision) -> str:
    """Why what runs is no list of launches, although an implementation that has them is chosen."""
    if spec.is_empty:
        return "nothing runs: there is no output element or no key"
    name, copies = decision.implementation.name, decision.implementation.copies(spec)
    if copies is not None:
        return f"{name!r} reads copies that JAX makes before the launches ({copies.forward})"
    if spec.bias is not None or spec.score is not None:
        return f"{name!r} has no launches for the gradients of a bias and of a score function's arrays"
    return f"{name!r} reads arrays that JAX makes beside the launches, those of a mask that holds arrays or of dropout"
