"""One problem, one implementation: everything it computes, compared with the float64 oracle within the error budget."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from pallas_flash import device, dispatch, flash_attention
from pallas_flash.arrays import Array
from pallas_flash.spec import Differentiable, Operands
from pallas_flash.testing import inputs
from pallas_flash.testing.budget import Budget
from pallas_flash.testing.problems import Problem
from pallas_flash.testing.textbook import Results

__all__ = ["budget", "compiled", "oracle", "random_case", "supports"]


def _fast_to_compile() -> dict[str, bool | int]:
    """Nearly all the time of a small problem goes into compiling it, and what XLA makes of it need not be fast."""
    if jax.default_backend() != "cpu":
        return {"xla_gpu_autotune_level": 0}
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.lru_cache(maxsize=32)  # a program takes some 200 of the 65,530 memory maps that Linux gives a process
def compiled(problem: Problem,
             implementation: dispatch.Requested) -> Callable[[Operands, inputs.Cotangents], Results[Array]]:
    """A jitted function of operands and the cotangents of (out, lse) that computes everything."""
    def run(operands: Operands, cotangents: inputs.Cotangents) -> Results[Array]:
        def call(given: Differentiable[Array]) -> tuple[Array, Array]:
            q, k, v, bias, _ = given
            return flash_attention(q, k, v, bias=bias, implementation=implementation,
                                   **problem.keywords(Operands.of(given, operands.others)))
        (out, lse), vjp = jax.vjp(call, operands.differentiable)
        (found,) = vjp(cotangents)
        return Results(out=out, lse=lse, dq=found.q, dk=found.k, dv=found.v, dbias=found.bias,
                       dscore=next(iter(found.score), None))
    return jax.jit(run, compiler_options=_fast_to_compile())


def _cpu() -> jax.Device | None:
    """Where the oracle runs: compiling for a GPU takes longer. None, JAX's default device, where there is no CPU."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return None


def oracle(problem: Problem, operands: Operands, cotangents: inputs.Cotangents) -> Results[np.ndarray]:
    """What `reference` computes in float64 from the same numbers, as numpy arrays."""
    in_float64 = lambda x: x if x.dtype.kind in "iub" else np.asarray(x, np.float64)
    with jax.enable_x64(True), jax.default_device(_cpu()):
        exact = compiled(problem, "reference")(*jax.tree.map(in_float64, (operands, cotangents)))
        on_host: Results[np.ndarray] = jax.tree.map(np.asarray, exact)
        return on_host


def budget(problem: Problem, dtype: str, operands: Operands, cotangents: inputs.Cotangents) -> Budget:
    """The error budget of a problem in a dtype. float64 needs JAX's 64-bit mode."""
    return Budget.of(problem.spec(dtype), operands, cotangents, oracle(problem, operands, cotangents))


def supports(problem: Problem, dtype: str, implementation: str) -> bool:
    """Whether an implementation takes a problem on this device."""
    return not dispatch.get(implementation).why_not(problem.spec(dtype), device.current())


def random_case(problem: Problem, dtype: str, seed: int = 0) -> tuple[Operands, inputs.Cotangents]:
    """Operands and cotangents of a problem in a dtype."""
    return problem.operands(dtype, seed=seed), inputs.cotangents(problem.spec(dtype), seed=seed)
