"""`python -m pallas_flash`: versions, compilers, settings, devices, and what would run for a typical call and why.
`python -m pallas_flash check`: whether the kernels are right on this card, and how fast (`check`).

Users of PyTorch run `python -m torch_bridge`, which says the first for both sides.
"""

import sys

from pallas_flash.diagnosis import ends_with_its_reader, report

if sys.argv[1:2] == ["check"]:
    from pallas_flash import check

    with ends_with_its_reader():
        sys.exit(check.main(sys.argv[2:]))
USAGE = """usage: python -m pallas_flash          versions, devices, settings, and what runs here and why
       python -m pallas_flash check    are the kernels right on this GPU, and how fast? (options: check --help)"""
if sys.argv[1:] in (["--help"], ["-h"]):
    with ends_with_its_reader():
        print(USAGE)
elif sys.argv[1:]:
    sys.exit(f"{USAGE}\ngot {' '.join(sys.argv[1:])!r}")
else:
    with ends_with_its_reader():
        print(report())
