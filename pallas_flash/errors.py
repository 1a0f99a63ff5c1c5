"""The errors of the project, and the form of their message: what must hold, what was given, what to do."""

import numbers
import pathlib
import sys
import warnings
from collections.abc import Sequence

__all__ = ["FallbackWarning", "UnsupportedError", "fallback", "invalid", "is_torch", "mistyped", "require_bool",
           "require_count", "unsupported", "warn"]

_OURS = tuple(f"{pathlib.Path(__file__).parents[1] / package}/" for package in ("pallas_flash", "torch_bridge"))


class UnsupportedError(ValueError):
    """A valid problem that the implementation asked for cannot run on this device, with every reason."""


class FallbackWarning(UserWarning):
    """An automatic choice that left an implementation written for this device, with every reason.

    Given once for each reason in a process, when a program is traced; not where an implementation is named.
    `warnings.filterwarnings("error", category=FallbackWarning)` makes it an error, in every call, and "ignore" silences
    it.
    """


def invalid(must: str, given: str, do: str) -> ValueError:
    """A ValueError for input that no implementation takes.

    Args:
      must: what must hold, a clause that names the array or argument.
      given: what was given instead, as `name=value`.
      do: what the caller can do about it, a clause.
    """
    return ValueError(_message(must, given, do))


def mistyped(must: str, given: str, do: str) -> TypeError:
    """A TypeError of the same form, where Python itself raises one: a keyword or an operator that does not exist."""
    return TypeError(_message(must, given, do))


def _message(must: str, given: str, do: str) -> str:
    return f"{must}, got {given}. {do[0].upper()}{do[1:]}."


def unsupported(subject: str, reasons: Sequence[str], do: str) -> UnsupportedError:
    """An UnsupportedError that lists every reason.

    Args:
      subject: what cannot run where, e.g. 'implementation="hopper" cannot run AttentionSpec(...) on NVIDIA A100'.
      reasons: each what is needed and what there is.
      do: what the caller can do about it, a clause.
    """
    return UnsupportedError(_listing(subject, reasons, do))


def fallback(subject: str, reasons: Sequence[str], do: str) -> FallbackWarning:
    """A FallbackWarning of the same form."""
    return FallbackWarning(_listing(subject, reasons, do))


def warn(warning: FallbackWarning) -> None:
    """Gives a warning at the caller's line: outside of our files, and of PyTorch's, whose autograd stands between two
    of ours.
    """
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    prefixes = _OURS if torch is None else (*_OURS, f"{pathlib.Path(torch).parent}/")
    warnings.warn(warning, skip_file_prefixes=prefixes)


def _listing(subject: str, reasons: Sequence[str], do: str) -> str:
    return f"{subject}: {'; '.join(reasons)}. {do[0].upper()}{do[1:]}."


def require_bool(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a bool: Python would take any other object as True or False."""
    if type(value).__name__ not in ("bool", "bool_"):  # bool_: NumPy's
        raise invalid(f"{name} must be True or False", f"{name}={value!r}", "pass a Python bool")


def require_count(name: str, value: object, smallest: int, do: str) -> None:
    """Raises ValueError, which ends in `do`, unless `value` is an integer, Python's or NumPy's, of at least `smallest`.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < smallest:
        raise invalid(f"{name} must be an integer of at least {smallest}", f"{name}={value!r}", do)


def is_torch(value: object) -> bool:
    """Whether `value` is a PyTorch tensor; does not import PyTorch."""
    return _is_tensor(type(value))


def _is_tensor(kind: type) -> bool:
    return any(base.__module__.split(".")[0] == "torch" and base.__name__ == "Tensor" for base in kind.__mro__)


_is_tensor._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile calls it, not traces it
