"""Kernels on torch's current stream and memory, without JAX's runtime: JAX is a compiler, in a process of its own.

    problem.py   a pass to compile, as plain data, and the key of its plan
    lower.py     -> its launches, each a Mosaic module; in the child process
    compile.py   -> each launch as the driver sees it: machine code, grid, parameters; in the child process
    plan.py      what is kept of that, a file
    cache.py     finds plans, and has them made
    launch.py    loads a plan, and launches it
    attention.py torch's tensors into launches, and back

A process that finds its plans imports no JAX. A child process imports no torch.
"""
