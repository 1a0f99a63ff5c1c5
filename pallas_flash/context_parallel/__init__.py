"""Attention over a sequence that is sharded over devices, on JAX's own collectives."""
