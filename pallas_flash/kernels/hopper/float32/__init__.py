"""The kernels of float32 inputs: each number as two of float16, and three products in the place of one."""
