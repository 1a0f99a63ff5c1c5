"""`python -m pallas_flash`: versions, compilers, settings, devices, and what would run for a typical call and why.

Users of PyTorch run `python -m torch_bridge`, which says this for both sides.
"""

from pallas_flash.diagnosis import report

print(report())
