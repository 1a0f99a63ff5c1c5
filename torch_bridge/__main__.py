"""`python -m torch_bridge`: versions, compilers, settings, devices, loaded CUDA libraries, and what would run for a
typical call and why."""

from pallas_flash.diagnosis import ends_with_its_reader
from torch_bridge.diagnosis import report

with ends_with_its_reader():
    print(report())
