"""Every shipped schedule of the Hopper kernels compiles for sm_90a, without a GPU: no spills, nothing serialised, the
descriptors of wgmma in uniform registers.

ptxas says so itself: C7504, C7507 (register reallocation ignored), C7510 to C7515 and C7520 (wgmma serialised). Such a
kernel would still be right, at half the speed; one that moves descriptors in each step is 5 to 14 % slower
(docs/notes/hopper_forward.md, 2026-11-25). Each problem is compiled with the ptxas that constraints.txt pins, whatever
PATH has, and with the first one outside of the wheels, if there is one of another version (offline/places.py).
"""

import os
import time

import jax
import pytest

from pallas_flash.testing import problems
from tests.hopper.offline import compile_kernels, machine_code, places, sass, tools

MOVED_DESCRIPTORS = 15  # in a step; up to 13 where uniform registers ran out cost nothing; gone wrong, 27 and more
MOVED_WIDE = 64
"""In a step of `backward.wide`, which has 16 products of 128 cycles and more: as many, one for each four instructions,
move in their shadow.
"""
OUTSIDE = {"dropout": 4, "documents+lengths": 20, "d512-s2048+gradients+softcap": 8, "d64-s2048+partial": 4,
           "d64-s512": 4,
           "float32+lengths": 36, "float32+documents": 36, "float32+dense": 36}
"""Bytes of spills that are allowed outside of the loops that multiply, by a part of a problem's name: dq of d 256 and
the fused kernel of d 128 with documents; the forward, once a tile of 4,000 clocks and more, by ptxas 13.0 alone; dq
of d 512, likewise; the fused kernel of d 64, which has them at other lengths too, where it was timed, by 13.5 alone;
float32 with arrays, of steps of 3,000 clocks.
"""
INSIDE = {"attention_backward_wide_dq": 1, "attention_forward_float32": 2, "attention_gradient_float32": 6}
"""Accesses to spilled registers that are allowed in a step of 3,000 clocks and more: dq of d 512 with a soft cap loads
8 bytes, by ptxas 13.0 alone; float32 with arrays loads two addresses, and its gradients touch six words with a soft
cap beside them.
"""
REJECTED = {"C7504", "C7507", *(f"C75{n}" for n in range(10, 16)), "C7520"}
WHY_NOT = "JAX 0.12 ignores setmaxnreg (C7504)" if jax.__version_info__ >= (0, 12) else places.why_not()


NAMES = [*(f"{problem.name}+gradients" for problem in problems.BENCHMARKS
           if "gpu" in problem.tags and (problem.q_len == 2048 or problem.q_len % 128)),
         *(f"causal-d{d}-s512+gradients" for d in (64, 128)),
         "causal-d128-s512+gradients+dropout", "causal-d128-s4096+gradients",
         *(f"causal-d{d}-s2048+gradients+deterministic" for d in (64, 128)),
         *(f"causal-d{d}-s2048+gradients+softcap" for d in (64, 128, 256)),
         *(f"causal-d{d}-s2048+gradients+softcap+deterministic" for d in (64, 128)),
         *(f"causal-d{d}-s2048+gradients+ragged" for d in (96, 256)), "causal-d256-s2048+gradients+softcap+ragged",
         "causal-d64-s2048+gradients+documents", "causal-d128-s2048+gradients+documents+lengths",
         "causal-d256-s2048+gradients+lengths", "causal-d64-s2048+gradients+padding",
         *(f"causal-d{d}-s2048+gradients+dense" for d in (128, 256)), "causal-d128-s2048+gradients+bias",
         *(f"causal-d{d}-s2048+gradients+pairs" for d in (64, 128)), "full-d128-s2048+gradients+pairs",
         "causal-d128-s2048+gradients+pairs+documents",
         "causal-d64-s2048+gradients+bias+softcap", "causal-d128-s2048+gradients+pairs+learned",
         "causal-d64-s2048+gradients+pairs+bias32+learned",
         "causal-d128-s2048+gradients+pairs+learned+dropout+softcap",
         "causal-d192-v128-s2048+wide", "causal-d512-s2048+gradients+softcap", "causal-d256-s2048+wide+dropout",
         *(f"causal-d{d}-s2048+partial" for d in (64, 128)), "causal-d256-s2048+ragged+partial",
         "causal-d128-s2048+partial+dropout",
         "full-d128-s2048+merge", "causal-d128-s2048+merge+softcap",
         "causal-d64-s2048+merge", "causal-d256-s2048+merge",
         *(f"causal-d{d}-s2048+gradients+dropout" for d in (64, 128, 256)),
         "causal-d128-s2048+gradients+dropout+documents",
         "causal-d128-s2048+gradients+alibi", "causal-d128-s2048+gradients+bent", "causal-d64-s2048+gradients+table",
         "causal-d128-s2048+documents+lengths+mask", "causal-d64-s2048+packed+mask",
         "causal-d64-s2048+dropout+keys",
         *(f"causal-d{d}-s2048+gradients+own" for d in (64, 128)),
         "causal-d128-s2048+softcap+dropout+sinks", "causal-d64-s2048+softcap+partial",
         "causal-d64-s2048+sinks", "causal-d128-s2048+sinks+documents+lengths", "causal-d256-s2048+sinks+dropout",
         *(f"causal-d{d}-s2048+gradients+float32" for d in (64, 96)),
         "causal-d128-s2048+gradients+float32+lengths+softcap",
         *(f"causal-d128-s2048+gradients+float32+{mask}" for mask in ("documents", "dense", "ragged")),
         *(f"{name}+gradients+float32" for name in ("scale-negative", "mask-window", "shape-heads-first-gqa")),
         "causal-d64-s2048+decode", "causal-d128-s2048+decode+pages", "causal-d256-s2048+decode+softcap",
         "causal-d192-v128-s2048+decode", "causal-d128-s2048+decode+sinks", "causal-d64-s2048+decode+eight",
         "causal-d128-s2048+decode+eight+pages", "causal-d256-s2048+decode+softcap+eight",
         "causal-d64-s2048+decode+bands+late", "causal-d128-s2048+decode+pages+bands",
         "causal-d128-s2048+decode+pages+late", "causal-d128-s2048+decode+sinks+cluster",
         "causal-d128-s2048+decode+pages+bands+late+two", "causal-d128-s2048+decode+sinks+two",
         "causal-d64-s2048+decode+eight+bands+late+three"]
DECODING_WITH_A_BIAS = {"causal-d64-s2048+decode+pages+bias+heads+sinks": 0,
                        "causal-d128-s2048+decode+bias+heads+sinks": 0,
                        "causal-d256-s2048+decode+softcap+bias+heads+sinks": 40}
"""Bytes of spills that are allowed. Their loop holds another one, which adds values that are not finite, so that it is
not among the innermost, which say what a step of it spills or moves."""


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("compiler", places.compilers() if WHY_NOT is None else ["pinned"])
@pytest.mark.parametrize("name", NAMES)
def test_shipped_schedule_compiles_clean(offline_tools, name, compiler):
    for report in compiled(offline_tools, name, compiler):
        assert report["compiled"], report
        assert report["registers"], "ptxas' report is missing"
        assert not report["unset_loads"], report
        assert not REJECTED & set(report["advice"]), report
        allowed = max((size for part, size in OUTSIDE.items() if part in name), default=0)
        inside = INSIDE.get(report["kernel"], 0)
        assert report["spill_bytes"] <= allowed and (report["spills_inside"] or 0) <= inside, report
        if report["multiplies"]:
            assert report["moved_descriptors"] is not None, "no innermost loop multiplies"
            limit = MOVED_WIDE if "_wide_" in report["kernel"] else MOVED_DESCRIPTORS
            assert report["moved_descriptors"] <= limit, report


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("compiler", places.compilers() if WHY_NOT is None else ["pinned"])
@pytest.mark.parametrize("name", DECODING_WITH_A_BIAS)
def test_decoding_with_a_bias_compiles(offline_tools, name, compiler):
    report, = compiled(offline_tools, name, compiler)
    assert report["compiled"] and report["multiplies"] and not report["unset_loads"], report
    assert report["registers"], "ptxas' report is missing"
    assert not REJECTED & set(report["advice"]), report
    assert report["spill_bytes"] <= DECODING_WITH_A_BIAS[name], report


def compiled(tools, name, compiler):
    """The report on each kernel of a problem."""
    reports = tools.compiled("tests.hopper.offline.compile_kernels", name, compiler)
    assert reports, "no kernel was lowered"
    makes_keys = "keys" in name.split("+")  # the launch that makes dropout's, which multiplies nothing
    assert makes_keys or any(report["multiplies"] for report in reports), "the machine code is missing"
    return reports


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_what_cannot_be_lowered_fails_alone(offline_tools):
    """With what its process said; another process takes its place."""
    compiler = next(iter(places.compilers()))
    with pytest.raises(RuntimeError, match=r"asked for nothing-like-it ended(?s:.*)nothing-like-it"):
        offline_tools.compiled("tests.hopper.offline.compile_kernels", "nothing-like-it", compiler)
    assert compiled(offline_tools, "causal-d64-s2048+decode", compiler)[0]["compiled"]


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_a_process_that_ends_before_it_is_asked_fails_alone(tmp_path):
    """Regression: neither what it said was raised, nor could it be closed, so that the next test failed, too."""
    process = tools.Process("tests.hopper.offline.nothing_like_it", {**os.environ}, tmp_path)
    while not process.ended():
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=r"asked for anything ended(?s:.*)nothing_like_it"):
        process.ask("anything")
    process.close()


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_a_schedule_is_not_that_of_the_problem_before_it(offline_tools):
    """Regression: one process lowers them all, and JAX had kept the kernel of the default schedule."""
    default, other, again = (offline_tools._lowered("tests.hopper.offline.compile_kernels", f"causal-d128-s2048+{name}",
                                                    "9.0") for name in ("decode", "decode+late", "decode"))
    assert other not in (default, again)


def test_equal_kernels_have_equal_modules():
    module = b"of_12\0dump_basename\0attention_forward_%b\0d_34\0"
    first, second = (compile_kernels.numberless(module % number) for number in (b"12", b"34"))
    assert first == second == module % b"00"


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_few_processes_wait(tmp_path):
    """Regression: each GPU of each generation kept three, and each worker all of them."""
    own, compiler = tools.Tools(tmp_path), next(iter(places.compilers()))
    found = [own._process("tests.hopper.offline.machine_code", compiler, f"{n}.0")[0] for n in range(tools.MOST + 1)]
    assert own._process("tests.hopper.offline.machine_code", compiler, "1.0")[0] is found[1]
    assert [process.ended() for process in found] == [True] + [False] * tools.MOST
    own.close()
    assert all(process.ended() for process in found)


def test_what_the_compiler_says_is_taken_apart():
    """C7510 in machine code is no advice of ptxas', and PTX is no machine code."""
    ptx, report, code = ".target sm_90a\n.entry f", "ptxas info : Used 8\nptxas info : (C7504)", "\n\t.target\tC7510"
    assert machine_code.parts(f"{ptx}\n{report}\n{code}") == (ptx, report, code)
    assert machine_code.parts(ptx) == (ptx, "", "")


LOOP = """\
STL [R1], RZ ;
.L_x_1:
 R2UR UR4, R2 ;
.L_x_2:
 HGMMA.64x128x16.F32 R24, gdesc[UR8] ;
 {} ;
@P0 BRA `(.L_x_2) ;
 LDL R3, [R1] ;
@P1 BRA `(.L_x_1) ;
"""


def test_spills_are_told_apart_by_where_they_lie():
    assert (sass.spills_inside(LOOP.format("NOP")), sass.moved_descriptors(LOOP.format("NOP"))) == (0, 0)
    assert sass.spills_inside(LOOP.format("LDL.LU R5, [R1]")) == 1
    assert sass.spills_inside(LOOP.format("STL [R1+0x4], R5")) == 1
    assert sass.moved_descriptors(LOOP.format("R2UR UR4, R9")) == 1
    assert sass.spills_inside("STL [R1], RZ ;") is None


ROLES = """\
.L_x_0:
 /*0000*/ UIADD3 UR16, UR4, 0x8000, URZ ;
 /*0010*/ ULDC.64 UR6, c[0x0][0x198] ;
 /*0020*/ UIADD3.64 UR20, UR44, 0x2, URZ ;
 /*0030*/ {}
 /*0040*/ @P0 BRA `(.L_x_2) ;
 /*0050*/ UMOV UR18, URZ ;
.L_x_1:
 /*0060*/ UMOV UR19, UR5 ;
 /*0070*/ UTMALDG.4D [UR16], [UR6] ;
 /*0080*/ @P1 BRA `(.L_x_1) ;
 /*0090*/ EXIT ;
.L_x_2:
 /*00a0*/ UMOV UR19, UR5 ;
 /*00b0*/ UTMALDG.4D [UR16], [UR6] ;
 /*00c0*/ UMOV UR18, URZ ;
 /*00d0*/ BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize("before, unset", [
    ("UMOV UR17, UR16 ;", ["00b0: [18]"]), ("@UP0 UIADD3 UR17, UR8, 0x1 ;", ["0070: [17]", "00b0: [17, 18]"])])
def test_a_load_whose_registers_are_not_set_is_found(before, unset):
    """Regression: ptxas 13.0 wrote a coordinate after the first load that needs it; an illegal instruction."""
    assert sass.unset_loads(ROLES.format(before)) == unset


def test_the_first_ptxas_on_path_is_the_other_compiler(tmp_path, monkeypatch):
    """Regression: one on PATH hid that the pinned one spills."""
    here = tmp_path / "ptxas"
    here.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.9, V11.9.1'\n")
    here.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = places.compilers.__wrapped__()
    assert found["found"] == here
    assert "pinned" not in found or "site-packages" in str(found["pinned"])
