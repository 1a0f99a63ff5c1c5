"""The errors of the project, and the form of their message: what must hold, what was given, what to do."""

from collections.abc import Sequence

__all__ = ["UnsupportedError", "invalid", "unsupported"]


class UnsupportedError(ValueError):
    """A valid problem that the implementation asked for cannot run on this device, with every reason."""


def invalid(must: str, given: str, do: str) -> ValueError:
    """A ValueError for input that no implementation takes.

    Args:
      must: what must hold, a clause that names the array or argument.
      given: what was given instead, as `name=value`.
      do: what the caller can do about it, a clause.
    """
    return ValueError(f"{must}, got {given}. {do[0].upper()}{do[1:]}.")


def unsupported(subject: str, reasons: Sequence[str], do: str) -> UnsupportedError:
    """An UnsupportedError that lists every reason.

    Args:
      subject: what cannot run where, e.g. 'implementation="hopper" cannot run AttentionSpec(...) on NVIDIA A100'.
      reasons: each what is needed and what there is.
      do: what the caller can do about it, a clause.
    """
    return UnsupportedError(f"{subject}: {'; '.join(reasons)}. {do[0].upper()}{do[1:]}.")
