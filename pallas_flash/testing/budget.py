"""The error that a result may have, computed from the data.

An implementation may err twice as much as the same formulas evaluated in the same precision the plain way
(`textbook`), plus one rounding. Errors are counted in units of each element's magnitude, the root of the sum of its
squared terms, so that one number holds for large and small elements, for ill- and for well-conditioned ones:

    |result - oracle| <= 2 (max(|baseline - oracle| / magnitude) + u_acc) magnitude + 2 u |oracle|

with u and u_acc the largest relative error of one rounding to the result's dtype and to that of the accumulation; and
the same for root mean squares over all elements. Where the magnitude is 0 the result must be exact. For float64 results
all of it counts twice: the oracle, float64 too, errs as much as they do.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_flash import scores
from pallas_flash.spec import AttentionSpec, Operands
from pallas_flash.testing import textbook
from pallas_flash.testing.textbook import Results

__all__ = ["Budget"]


@dataclasses.dataclass(frozen=True)
class Budget:
    """What each result of one problem may differ from `oracle`.

    Attributes:
      oracle: the results in float64.
      baseline, magnitude: see `textbook.attention`.
      roundoff: for each result, the largest relative error of rounding it once.
      acc_roundoff: the same for the accumulation.
    """

    oracle: Results[np.ndarray]
    baseline: Results[np.ndarray]
    magnitude: Results[np.ndarray]
    roundoff: Results[float]
    acc_roundoff: float

    @classmethod
    def of(cls, spec: AttentionSpec, operands: Operands, cotangents: tuple[np.ndarray, np.ndarray],
           oracle: Results[np.ndarray]) -> "Budget":
        """The budget of a problem whose results in float64, for the same (rounded) inputs, are `oracle`."""
        baseline, magnitude = textbook.attention(spec, operands, *cotangents)
        u, u_acc = (float(jnp.finfo(dtype).eps) / 2 for dtype in (spec.dtype, spec.acc_dtype))
        u_bias = u if spec.bias is None else max(u, float(jnp.finfo(spec.bias.dtype).eps) / 2)
        u_score = max([u, *(float(jnp.finfo(x.dtype).eps) / 2 for x in scores.floats(spec.score))])
        budget = cls(oracle, baseline, magnitude, Results(u, u_acc, u, u, u, u_bias, u_score), u_acc)
        for name in budget.names:
            budget._check_baseline(name)
        return budget

    @property
    def times(self) -> int:
        """How often the baseline's error may be made: twice, and as often again by an oracle of the same precision."""
        return 4 if self.baseline.lse.dtype == np.float64 else 2

    @property
    def names(self) -> list[str]:
        """The results that there are: dbias only with a bias, dscore with an array of a score function."""
        return [name for name in Results._fields if getattr(self.oracle, name) is not None]

    def used(self, results: Results[np.ndarray]) -> dict[str, float]:
        """For each result, the share of its budget that its error takes.

        At most 1 where it is right; infinite where it is NaN, or not zero where it must be.
        """
        return {name: self._share(name, getattr(results, name)) for name in self.names}

    def _errors(self, name: str, result: np.ndarray) -> np.ndarray:
        """The error of each element in units of its magnitude; infinite where the result must be exact and is not."""
        oracle, magnitude = (np.asarray(getattr(x, name), np.float64) for x in (self.oracle, self.magnitude))
        smallest = float(jnp.finfo(getattr(self.baseline, name).dtype).smallest_subnormal)
        result = np.asarray(result, np.float64)
        if result.shape != oracle.shape:
            raise AssertionError(f"{name} has shape {result.shape}, not {oracle.shape}")
        finite = np.isfinite(oracle) & np.isfinite(result)
        difference = abs(np.where(finite, result, 0) - np.where(finite, oracle, 0))
        exact = (difference <= smallest) & (finite | (result == oracle))
        errors = difference / np.where(magnitude > 0, magnitude, 1)
        return np.where(exact, 0, np.where(finite & (magnitude > 0), errors, np.inf))

    def _share(self, name: str, result: np.ndarray) -> float:
        errors, allowed = self._errors(name, result), self._errors(name, getattr(self.baseline, name))
        if errors.size == 0:
            return 0.0
        oracle, magnitude = (np.nan_to_num(np.asarray(getattr(x, name), np.float64), neginf=0) for x in (
            self.oracle, self.magnitude))
        last_rounding = getattr(self.roundoff, name) * abs(oracle) / np.where(magnitude > 0, magnitude, 1)
        worst = errors / (self.times * (allowed.max() + self.acc_roundoff + last_rounding))
        typical = _rms(errors) / (self.times * (_rms(allowed) + self.acc_roundoff + _rms(last_rounding)))
        return max(float(worst.max()), typical)

    def _check_baseline(self, name: str) -> None:
        """A baseline that lost half of its digits would allow anything: then the problem, or a formula, is wrong."""
        worst = float(self._errors(name, getattr(self.baseline, name)).max(initial=0))
        limit = float(np.sqrt(2 * getattr(self.roundoff, name)))
        if not worst <= limit:
            raise AssertionError(f"the baseline of {name} errs by {worst:.1e} of its magnitude, more than {limit:.1e}")


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))
