"""A stand-in for the Hopper kernels' passes on a CPU: the reference, on the same problem and the same arrays.

It takes the place of the kernels alone. What surrounds them, `hopper.calls` and all above it, is what ships.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_flash import autodiff, device, reference, softmax
from pallas_flash.kernels.hopper import calls
from pallas_flash.kernels.hopper.backward.statistics import Statistics
from pallas_flash.kernels.mosaic import bias
from pallas_flash.kernels.mosaic.dbias import walk
from pallas_flash.kernels.xla import backward as xla
from pallas_flash.spec import AttentionSpec, Operands

NAMES = "q", "k", "v", "out", "stats", "dout", "dstats"


@dataclasses.dataclass(frozen=True)
class StandIn:
    """The forward or the backward of a spec, which kernels are given, as a function of their arrays; no dropout."""

    spec: AttentionSpec
    is_forward: bool

    @property
    def result_types(self):
        spec, shapes = self.spec, self.spec.operand_shapes
        if self.is_forward:
            return (jax.ShapeDtypeStruct(spec.out_shape, spec.result_dtype),
                    jax.ShapeDtypeStruct(spec.stats_shape, spec.acc_dtype))
        rows = jax.ShapeDtypeStruct((*spec.lse_shape[:2], len(Statistics), spec.q_len), spec.acc_dtype)
        return (*(jax.ShapeDtypeStruct(shape, spec.result_dtype) for shape in shapes[:3]),
                *[rows] * (spec.sinks is not None))

    def __call__(self, *arrays):
        spec, count = self.spec, 3 if self.is_forward else 7
        assert spec.d % 8 == 0 == spec.d_v % 8, "kernels cannot read other rows"
        given, rest = dict(zip(NAMES, arrays)), arrays[count:]
        sinks = None
        if spec.sinks is not None and self.is_forward:
            sinks, *rest = rest
        fields, structure = jax.tree.flatten(spec.mask)
        mask = jax.tree.unflatten(structure, rest[:len(fields)])
        assert len(rest) == len(fields) + len(bias.names(spec))
        found = rest[len(fields)] if spec.bias is not None else None

        def run(*q_k_v):
            return tuple(reference.forward(spec, Operands(
                *q_k_v, bias=found, score=(), mask=mask, score_integers=(), dropout_seed=None, dropout_origin=None,
                page_table=None)))
        if sinks is not None:
            return with_sinks(spec, run(*arrays[:3]), sinks)
        if self.is_forward:
            return run(*arrays[:3])
        if spec.sinks is not None:
            return backward_with_sinks(spec, mask, given)
        return jax.vjp(run, *arrays[:3])[1]((given["dout"], given["dstats"]))


def with_sinks(spec, results, sinks):
    """The results with sinks, (1|b h 1 1), in them, for rows that attend to something: others keep lse, and out 0."""
    out, stats = results
    is_empty = stats[:, :, 0] <= jnp.finfo(stats.dtype).min
    lse = jnp.where(is_empty, stats[:, :, 0], jnp.logaddexp(stats[:, :, 0], sinks[..., 0]))
    share = jnp.where(is_empty, 0, jnp.exp(stats[:, :, 0] - lse))
    share = share if spec.layout == "BHLD" else share.swapaxes(1, 2)
    return (out.astype(share.dtype) * share[..., None]).astype(out.dtype), stats.at[:, :, 0].set(lse)


def backward_with_sinks(spec, mask, given):
    """The gradients from the statistics that have the sinks in them, and the statistics of queries, by `xla`."""
    operands = Operands(given["q"], given["k"], given["v"], bias=None, score=(), mask=mask, score_integers=(),
                        dropout_seed=None, dropout_origin=None, page_table=None)
    found = xla.backward(dataclasses.replace(spec, sinks=None), operands,
                         *(given[name] for name in ("out", "stats", "dout", "dstats")))
    out, dout = (x if spec.layout == "BHLD" else x.swapaxes(1, 2) for x in (given["out"], given["dout"]))
    lse, delta = given["stats"][:, :, 0], softmax.delta(out, dout, given["dstats"][:, :, 0], spec.acc_dtype)
    return *found[:3], jnp.stack([lse * softmax.LOG2E, -delta, jnp.zeros_like(lse)], axis=2)


@functools.cache
def _builder(is_forward):
    """The same object for the same pass, as `partitioned` wants it."""
    return functools.cache(lambda spec: StandIn(spec, is_forward))


@contextlib.contextmanager
def standing_in(monkeypatch):
    """`implementation="hopper"` runs on a CPU, which is taken for an H200."""
    def forget():  # programs are kept by spec, not by what ran it
        autodiff.forward.clear_cache()
        autodiff.backward.clear_cache()

    monkeypatch.setattr(calls, "_forward_on", lambda where: _builder(True))
    monkeypatch.setattr(calls, "_backward_on", lambda where: _builder(False))
    monkeypatch.setattr(calls, "_dbias_on", lambda where: walk)
    forget()
    with device.assume(device.H200):
        yield
    forget()
