"""The kernels with mma.sync compile for every GPU generation since Ampere, without a GPU, and spill next to nothing
where they multiply.

Here too, as in `tests.hopper.test_offline`, ptxas of the pinned wheel says so. A thread has 255 registers at most, and
the largest schedules use all of them: a few spilled ones cost less than a smaller tile (docs/notes/ampere.md).
"""

import pytest

from tests.hopper.offline import places

WHY_NOT = places.why_not()
IN_THE_LOOP = 4  # instructions that touch a spilled register, of about 1,000 in a step
MORE_IN_THE_LOOP = {"softcap": 12, "d64-repeats": 8}
BYTES = 32
OF_AN_OLDER_PTXAS = (768, 56)
"""The same two bounds, bytes and instructions, for compute capability 12.0 where ptxas is not the pinned one: 13.0
keeps fewer values there. A step of the forward is 128 products a warp, 2,048 clocks on 12.x: 56 are below 3 % of them,
and every smaller tile costs more (docs/notes/ampere.md).
"""
NAMES = {"8.0": ["exported", "d128-lengths", "d128-bent-repeats", "d64-repeats", "d128-cache-pages",
                 "d64-documents-launched"],
         "8.9": ["d128-window-repeats", "d256", "d256-cache-bias-sinks-r64"],
         "9.0": ["d64", "d64-repeats", "d128", "d96-ragged-softcap", "d64-bias", "d256-repeats", "d192-v128-cache-r32"],
         "10.0": ["d64", "d128", "d256", "d128-cache-r64"],
         "12.0": ["d128-dense", "d128-alibi", "d256-cache-pages-bias"]}
"""What is compiled for each compute capability; 8.6 has the machine code, and the schedules, of 8.9."""


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.timeout(600)
@pytest.mark.parametrize("compiler", ["pinned", "found"])
@pytest.mark.parametrize("capability", NAMES)
def test_kernels_compile_for_every_generation(offline_tools, capability, compiler):
    if compiler not in places.compilers():
        pytest.skip(f"there is no other ptxas: {', '.join(places.compilers())} alone")
    names, is_older = NAMES[capability], compiler == "found" and capability == "12.0"
    reports = [report for name in names for report in offline_tools.compiled(
        "tests.ampere.offline.compile_kernels", f"{capability} {name}", compiler, capability)]
    more = sum(2 * ("launched" in name) - 3 * ("cache" in name) for name in names)
    assert len(reports) == 4 * len(names) + more, "a kernel for the forward, three for the backward"
    for report in reports:
        if "cache" in report["problem"]:
            assert report["compiled"] and report["spill_bytes"] == 0, report
            continue
        assert report["compiled"] and report["registers"], report
        in_the_loop = max((n for name, n in MORE_IN_THE_LOOP.items() if name in report["problem"]), default=IN_THE_LOOP)
        most = OF_AN_OLDER_PTXAS if is_older else (BYTES, in_the_loop)
        assert report["spill_bytes"] <= most[0] and (report["spills_inside"] or 0) <= most[1], report
        assert not report["multiplies"] or report["spills_inside"] is not None, "no innermost loop multiplies"
