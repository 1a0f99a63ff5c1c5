"""Kernels with mma.sync and cp.async: for every NVIDIA GPU of compute capability 8.0 or higher."""
