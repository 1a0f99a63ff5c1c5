"""What of the direct path a user is warned of, each reason once in a process."""

from collections.abc import Sequence

__all__ = ["warn_of_fallback", "warn_of_left"]

_said: set[str] = set()
"""The reasons of which a warning was given."""


def warn_of_fallback(subject: str, reason: str, variable: str) -> None:
    """Warns that calls go another way than the direct path, which the environment's `variable` switches off."""
    _warn_once(f"{subject}, because the direct path cannot be taken", reason, f"change that, or set {variable}=0")


def warn_of_left(what: str, left: Sequence[tuple[str, str]]) -> None:
    """Warns as `pallas_flash.dispatch` does where kernels run that were not written for the GPU.

    Args:
      what: which kernels run what, and where.
      left: the implementations that were written for it, each with why it cannot.
    """
    for name, reason in left:
        _warn_once(f"{what}, because {name!r}, written for this device, cannot", reason,
                   f"change that to reach {name!r}")


def _warn_once(subject: str, reason: str, do: str) -> None:
    if reason in _said:
        return
    from pallas_flash import errors  # imports JAX, which a call that goes through DLPack will need now

    errors.warn(errors.fallback(subject, [reason], do))
    _said.add(reason)
