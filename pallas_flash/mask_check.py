"""`check_mask`: a mask's bounds against its `keep`, by brute force."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from pallas_flash import errors, forks, masks
from pallas_flash.arithmetic import Positions

__all__ = ["check_mask"]


def check_mask(mask: masks.Mask, q_len: int, kv_len: int) -> None:
    """Raises unless the bounds of a mask agree with its `keep`, for every interval of queries and of keys.

    For queries [q_lo, q_hi), and likewise for keys with queries and keys exchanged, `kv_bounds` must be such that

        no key outside [lo, hi) is kept by any of the queries, else tiles that matter would be skipped;
        every key inside [full_lo, full_hi) is kept by all of them, else tiles would go unmasked.

    Intervals end anywhere up to twice the length: kernels also ask about a last tile that reaches past the end, whose
    padding they mask themselves. Bounds that are looser than they could be pass: they cost time only. A class that
    defines `moved` must keep the same pairs from any other positions on. It is brute
    force: lengths of 20 to 60 that are no multiples of the mask's numbers find what there is to find, in seconds.

    Args:
      mask: of any class; the parts of an intersection are checked one by one, each (batch, head) that its arrays tell
        apart too.
      q_len, kv_len: how many queries and keys, integers of at least 1; the lengths of the mask's arrays where it has
        some.

    Raises:
      ValueError: naming the interval, the bound, and the pair of positions for which `keep` says otherwise; or where a
        method cannot be traced, gives other numbers when it is, or gives what is not boolean (`keep`) or integer
        (bounds).
    """
    forks.require_no_fork("check_mask")
    for name, length in (("q_len", q_len), ("kv_len", kv_len)):
        errors.require_count(name, length, 1, "give the number of positions to look at, 20 to 60")
    for part in masks.checked(mask).canonical().parts:
        keep = _keep(part, q_len, kv_len)
        _check_bounds(part, "kv_bounds", keep)
        _check_bounds(part, "q_bounds", keep.swapaxes(2, 3))
        if type(part).moved is not masks.Mask.moved:
            _check_moved(part, keep)


def _check_moved(part: masks.Mask, keep: np.ndarray) -> None:
    """Raises where `moved` contradicts `keep`, which is as `_keep` returns it."""
    q_len, kv_len = keep.shape[2:]
    for q_lo, kv_lo in ((q_len // 2, 0), (0, kv_len // 2), (q_len // 3, kv_len - 1), (q_len - 1, kv_len // 3)):
        wanted = keep[:, :, q_lo:, kv_lo:]
        found = _keep(part.moved(q_lo, kv_lo), *wanted.shape[2:])
        for batch, head, q_pos, kv_pos in np.argwhere(np.broadcast_to(found, wanted.shape) != wanted)[:1]:
            name = f"{type(part).__name__}.moved({q_lo}, {kv_lo})"
            raise errors.invalid(
                f"{name} must keep of the pair ({q_pos}, {kv_pos}) what the mask keeps of "
                f"({q_pos + q_lo}, {kv_pos + kv_lo})", f"{not wanted[batch, head, q_pos, kv_pos]}",
                "return the mask whose keep(q, k) is this one's keep(q + q_lo, k + kv_lo)")


def _keep(part: masks.Mask, q_len: int, kv_len: int) -> np.ndarray:
    """(batch or 1, heads or 1, q_len, kv_len): which pairs a mask keeps."""
    pos = np.arange(q_len)[:, None], np.arange(kv_len)[None, :]
    name = f"{type(part).__name__}.keep"
    (found,) = _traced(part, name, lambda part, *pos: part.keep(*pos), *pos)
    shape = (*found.shape[:2], q_len, kv_len)
    if found.dtype != np.bool_ or found.ndim != 4 or any(n not in (1, m) for n, m in zip(found.shape, shape)):
        raise errors.invalid(f"{name} must return booleans of the shape that q_pos and kv_pos broadcast to",
                             f"dtype={found.dtype}, shape={found.shape[2:]} for {q_len=}, {kv_len=}",
                             "compare positions, and join comparisons with & and |")
    found = np.broadcast_to(found, shape)
    if not part.has_arrays and not np.array_equal(np.broadcast_to(part.keep(*pos), (q_len, kv_len)), found[0, 0]):
        raise _differs(name)
    return found


def _traced[A: (masks.Bounds, Positions)](part: masks.Mask, name: str, ask: Callable[..., A],
                                          *pos: np.ndarray) -> list[np.ndarray]:
    """The leaves of ask(part, *pos) traced, as kernels do, with two leading axes (batch or 1, heads or 1) each."""
    pos = tuple(x.astype(np.int32) for x in pos)
    try:
        run = jax.jit(lambda part, *pos: masks.over_batch(part, lambda one: ask(one, *pos)))
        return [np.asarray(x) for x in jax.tree.leaves(run(part, *pos))]
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError,
            jax.errors.TracerIntegerConversionError) as error:
        raise errors.invalid(
            f"{name} must work on traced positions", f"error={type(error).__name__}",
            "use arithmetic, comparisons, &, |, and maximum, minimum, where of pallas_flash.masks; no `if`") from error


def _differs(name: str) -> ValueError:
    return errors.invalid(f"{name} must give the same for plain and for traced positions", "traced=other numbers",
                          "use int32 arithmetic, and maximum, minimum and where of pallas_flash.masks")


def _check_bounds(part: masks.Mask, method: str, keep: np.ndarray) -> None:
    """Raises where a method contradicts `keep`, (batch or 1, heads or 1, positions that ask, positions asked about)."""
    length, name = keep.shape[2], f"{type(part).__name__}.{method}"
    pairs = [(lo, hi) for lo in range(length) for hi in range(lo + 1, 2 * length + 1)]
    if not pairs:
        return
    lo, hi = np.array(pairs, np.int32).T

    def ask(part: masks.Mask, lo: Positions, hi: Positions) -> masks.Bounds:
        bounds: masks.Bounds = getattr(part, method)(lo, hi)
        return bounds

    found = _traced(part, name, jax.vmap(ask, (None, 0, 0)), lo, hi)
    if any(x.dtype.kind not in "iu" for x in found):
        raise errors.invalid(f"{name} must return integers", f"dtypes={[x.dtype.name for x in found]}",
                             "divide positions with `//`")
    if not part.has_arrays and not all(np.array_equal(np.broadcast_to(plain, lo.shape), traced[0, 0])
                                       for plain, traced in zip(ask(part, lo.astype(int), hi.astype(int)), found)):
        raise _differs(name)
    bounds = [np.broadcast_to(x, (*keep.shape[:2], len(pairs))) for x in found]
    for where in np.ndindex(keep.shape[0], keep.shape[1]):
        for i, interval in enumerate(pairs):
            asked = _Asked(name, interval, where, masks.Bounds(*(int(x[where][i]) for x in bounds)))
            asked.check(keep[where])


class _Asked(NamedTuple):
    """One question: what was asked about which positions, of which (batch, head), and the answer."""

    name: str
    interval: tuple[int, int]
    where: tuple[int, ...]
    bounds: masks.Bounds

    def check(self, keep: np.ndarray) -> None:
        """Raises where the bounds contradict `keep`, (positions that ask, positions asked about)."""
        rows, pos = keep[slice(*self.interval)], np.arange(keep.shape[1])
        lo, full_lo, full_hi, hi = self.bounds
        missed = rows.any(axis=0) & ((pos < lo) | (pos >= hi))
        if missed.any():
            at = int(missed.argmax())
            must = f"at most {at} as lo" if at < lo else f"more than {at} as hi"
            raise self._error(f"{must}, or a pair that attends is skipped", at, int(rows[:, at].argmax()), True)
        inside_length = lo < hi and self.interval[1] <= keep.shape[0]  # past the end, kernels mask the tile anyway
        wrong = ~rows.all(axis=0) & (full_lo <= pos) & (pos < full_hi) & inside_length
        if wrong.any():
            at = int(wrong.argmax())
            must = f"more than {at} as full_lo or at most {at} as full_hi, or a pair goes unmasked"
            raise self._error(must, at, int(rows[:, at].argmin()), False)

    def _error(self, must: str, at: int, row: int, kept: bool) -> ValueError:
        from_q, row = self.name.endswith("kv_bounds"), row + self.interval[0]
        q_pos, kv_pos = (row, at) if from_q else (at, row)
        tile = "{} [{}, {})".format("queries" if from_q else "keys", *self.interval)
        return errors.invalid(
            f"{self.name} of the tile of {tile} must give {must}",
            f"{self.name.split('.')[1]}{self.interval}={self.bounds}, keep({q_pos=}, {kv_pos=})={kept}"
            + (f" in (batch, head)={self.where}" if any(self.where) else ""),
            "mend the bounds, or leave both methods out: then nothing is skipped")
