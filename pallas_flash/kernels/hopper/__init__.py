"""Kernels for NVIDIA Hopper (compute capability 9.0), in Pallas Mosaic GPU."""
