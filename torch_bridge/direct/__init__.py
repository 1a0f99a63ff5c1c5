"""Kernels on torch's current stream and memory, without JAX's runtime: JAX is a compiler, in a process of its own.

    requirements.py  what must be installed
    problem.py       a pass to compile, as plain data, and the key of its plan
    parent.py        starts the process that compiles, and follows it
    child.py         that process:
      lower.py         a pass -> its launches, each a Mosaic module
      beside.py        what is computed beside them -> operations; intervals.py leaves out those that change nothing
      plugin.py        a module -> machine code, by what JAX keeps to itself
      compile.py       each launch as the driver sees it: machine code, grid, parameters
      score_ir.py      a score function as data, of which the request of a plan tells it
    plan.py          what is kept of that, a file
    cache.py         finds plans, and has them made; progress.py shows that
    driver.py        CUDA's driver
    launch.py        loads a plan on a device, and launches it on addresses
    runner.py        the same on torch's tensors
    room.py          memory of the GPU for a process that compiles
    counters.py      memory that launches count in, which is 0 between them
    shared.py        memory that all problems of a device share
    allocation.py    new tensors, fast
    operations.py    what torch computes before the launches, of lengths, ids and seeds
    attention.py     which calls take this path; their tensors in and out
    decoding.py      the same of attention to a cache
    scored.py        which score functions take it
    storage.py       which tensors are read where they lie, and in which shapes others are given
    reasons.py       why a call does not take it
    shortcut.py      calls seen before; guards.py knows them at a glance
    repeated.py      the same of calls of the operators

A process that finds its plans imports no JAX. A child process imports no torch.
"""
