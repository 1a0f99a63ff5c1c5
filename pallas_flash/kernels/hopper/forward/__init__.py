"""The forward: `kernel` is where to begin."""
