"""Heads in place of the sequence (DeepSpeed Ulysses, Jacobs et al., 2023): each device gets all positions of a part of
the heads, attends as one device does, and gives back the results of its own positions.

Everything around attention is a permutation of rows over devices, which JAX differentiates: the backward sends the
cotangent of out there and the gradients back.
"""

import dataclasses
import functools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_flash import autodiff, dropout, sharding
from pallas_flash.arrays import Array, Float
from pallas_flash.context_parallel.order import reorder
from pallas_flash.context_parallel.shards import Shards, pick_rows
from pallas_flash.masks import Full, Mask, SegmentIds
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["attend", "of_heads", "why_not"]


def why_not(shards: Shards) -> list[str]:
    """Why heads cannot be exchanged for the sequence, each reason what is needed and what there is; beside what
    `model.why_not` says of their number."""
    reasons = []
    if shards.chunking.load_balance == "zigzag_documents":
        reasons.append('needs chunks that are parts of the sequence, load_balance is "zigzag_documents"')
    if shards.bias is not None and shards.bias.shape[1] == 1 and shards.bias.shape[2] != 1:
        reasons.append(f"needs a bias of each head or of no query, bias has shape {shards.bias.shape}")
    reasons += [f"needs masks without arrays over positions but SegmentIds, there is {type(part).__name__}"
                for part in shards.spec.mask.parts if part.position_axes and not isinstance(part, SegmentIds)]
    return reasons


def attend(shards: Shards, operands: Operands) -> tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """(out, lse) of this device's queries, differentiable with respect to q, k, v and bias."""
    exchange = _Exchange(shards)
    problem = exchange.problem(operands)
    passes = _HeadPasses(exchange.spec(problem), shards)
    out, stats = autodiff.differentiable(passes, problem)
    lse = autodiff.natural_lse(passes.spec, problem, stats)
    return exchange.to_sequence(out, 1, 2), exchange.to_sequence(lse, 2, 1)


def of_heads(spec: AttentionSpec) -> AttentionSpec:
    """The spec of some heads, whose positions are those of the whole sequence: they begin at 0."""
    return dataclasses.replace(spec, dropout_moved=dropout.UNIT if spec.dropout_moved else 0)


class _HeadPasses(NamedTuple):
    """The passes over all positions of some heads. Keys and values may come in `acc_dtype`, and their gradients go so:
    those of repeated heads are summed before they are rounded."""

    spec: AttentionSpec
    shards: Shards

    @property
    def label(self) -> str:
        return "context_parallel_attention"

    def forward(self, operands: Operands) -> Results[Array]:
        results: Results[Array] = autodiff.forward(self.spec, self.shards.implementation_of(self.spec),
                                                   self._narrow(operands), where=self.shards.device)
        return results

    def backward(self, operands: Operands, results: Results[Array], cotangents: Results[Array]) -> Gradients[Array]:
        spec = dataclasses.replace(self.spec, partial=operands.k.dtype != self.spec.dtype)
        found: Gradients[Array] = autodiff.backward(
            spec, self.shards.implementation_of(spec), self._narrow(operands), results, cotangents,
            where=self.shards.device)
        q, k, v, bias, _ = operands.differentiable
        dbias = None if bias is None or found.dbias is None else found.dbias.astype(bias.dtype)
        return Gradients(dq=found.dq.astype(q.dtype), dk=found.dk.astype(k.dtype), dv=found.dv.astype(v.dtype),
                         dbias=dbias, dscore=())

    def _narrow(self, operands: Operands) -> Operands:
        return operands._replace(k=operands.k.astype(self.spec.dtype), v=operands.v.astype(self.spec.dtype))


class _Exchange(NamedTuple):
    """Who has what: a device's positions of all heads, or all positions of a device's heads."""

    shards: Shards

    def problem(self, operands: Operands) -> Operands:
        """The operands of all positions, in the order of the sequence, and of this device's heads."""
        k, v = (self._to_heads(self._repeated(x), 1, 2) for x in (operands.k, operands.v))
        mask = functools.reduce(operator.and_, map(self._of_heads, operands.mask.parts), Full()).canonical()
        origin, first = operands.dropout_origin, self._first_head
        if operands.dropout_seed is not None:
            origin = (jnp.zeros(4, jnp.int32) if origin is None else origin).at[1].add(first)
        found = operands._replace(q=self._to_heads(operands.q, 1, 2), k=k, v=v, bias=self._bias(operands.bias),
                                  mask=mask, dropout_origin=origin)
        return sharding.vary_together(found)

    def spec(self, problem: Operands) -> AttentionSpec:
        """Of what `problem` returns."""
        k, v = (x.astype(self.shards.spec.dtype) for x in (problem.k, problem.v))
        return of_heads(self.shards.spec_of(problem._replace(k=k, v=v), partial=False))

    def to_sequence(self, x: Array, length: int, heads: int) -> Array:
        """An array of all positions of this device's heads, as one of this device's positions of all heads.

        Args:
          length, heads: the axes of x.
        """
        n, _, load_balance = self.shards.chunking
        return self._exchanged(reorder(x, n, length, load_balance=load_balance), length, heads)

    def _to_heads(self, x: Array, length: int, heads: int) -> Array:
        n, _, load_balance = self.shards.chunking
        return reorder(self._exchanged(x, heads, length), n, length, inverse=True, load_balance=load_balance)

    def _exchanged(self, x: Array, split: int, joined: int) -> Array:
        found: Array = lax.all_to_all(x, self.shards.axis_name, split_axis=split, concat_axis=joined, tiled=True)
        return found

    def _repeated(self, x: Array) -> Array:
        """Fewer key heads than devices: each goes to several, in the dtype in which its gradients are summed."""
        repeats = self.shards.chunking.num_devices // math.gcd(self.shards.chunking.num_devices, x.shape[2])
        return x if repeats == 1 else jnp.repeat(x.astype(self.shards.spec.acc_dtype), repeats, axis=2)

    @property
    def _first_head(self) -> Array:
        """The first query head of this device."""
        heads = self.shards.spec.q_heads // self.shards.chunking.num_devices
        return lax.axis_index(self.shards.axis_name) * heads

    def _own_heads(self, x: Array) -> Array:
        """The heads of this device in an array with heads, or 1, in its second axis."""
        heads = self.shards.spec.q_heads // self.shards.chunking.num_devices
        return x if x.shape[1] == 1 else pick_rows(x, self._first_head, heads, 1)

    def _of_heads(self, part: Mask) -> Mask:
        """A part of the mask for all positions of this device's heads."""
        n, _, load_balance = self.shards.chunking
        whole = functools.partial(reorder, n=n, axis=2, inverse=True, load_balance=load_balance)
        if isinstance(part, SegmentIds):
            ids = (lax.all_gather(jnp.asarray(x), self.shards.axis_name, axis=2, tiled=True)
                   for x in (part.q_ids, part.kv_ids))
            part = SegmentIds(*map(whole, ids))
        own: Mask = jax.tree.map(self._own_heads, part)
        return own

    def _bias(self, bias: Array | None) -> Array | None:
        if bias is None:
            return None
        n, _, load_balance = self.shards.chunking
        bias = self._own_heads(bias) if bias.shape[2] == 1 else self._to_heads(bias, 2, 1)
        return bias if bias.shape[3] == 1 else reorder(bias, n, 3, inverse=True, load_balance=load_balance)
