"""Blockwise attention in plain JAX: O(length) memory, every platform, every field of the spec."""
