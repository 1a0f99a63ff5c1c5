"""Attention over sequences that are cut over several devices, on JAX's own collectives."""
