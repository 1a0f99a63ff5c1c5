"""`python -m torch_bridge`: versions, compilers, settings, devices, loaded CUDA libraries, and what would run for a
typical call and why."""

from torch_bridge.diagnosis import report

print(report())
