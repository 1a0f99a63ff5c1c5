"""Decoding against a cache of keys and values: `kernel` is where to begin."""
