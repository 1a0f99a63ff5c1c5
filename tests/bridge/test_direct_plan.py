"""The direct path without a compiler: keys, what is lowered, and the file of a plan, which is trusted only if whole."""

import dataclasses
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bridge.direct import ADD, FORWARD, H200, PROGRAM, SMALL, VERSIONS
from pallas_flash import UnsupportedError, device, dispatch, masks
from pallas_flash.kernels.hopper import compiler
from pallas_flash.launches import launches
from pallas_flash.spec import AttentionSpec
from torch_bridge.direct import lower, plan
from torch_bridge.direct.problem import Request, versions

FULL = None, None, 0, False
LENGTHS = (("kv_lengths", (1,), "int32"), ("seed", (2,), "int32"))


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    *(dict(problem=dataclasses.replace(SMALL, **{name: value})) for name, value in dict(
        layout="BLHD", dtype="float16", batch=2, q_heads=2, kv_heads=1, q_len=201, kv_len=255, d=128, d_v=128,
        window=(None, 0, 1, False), scale=0.5, softcap=30.0, deterministic=True).items()),
    dict(problem=dataclasses.replace(SMALL, window=FULL)), dict(pass_name="backward"),
    dict(gpu=dataclasses.replace(H200, num_sms=78)), dict(gpu=dataclasses.replace(H200, capability=(10, 0))),
    dict(versions=VERSIONS | {"driver": "13010"}), dict(versions=VERSIONS | {"product": "changed"}),
], ids=str)
def test_whatever_differs_has_a_plan_of_its_own(change):
    other = dataclasses.replace(FORWARD, **change)
    assert other.key != FORWARD.key
    assert Request.of(other.text) == other and Request.of(other.text).key == other.key


ALONE = """
import sys, types
sys.modules["torch_bridge"] = package = types.ModuleType("torch_bridge")  # without torch: importing it takes seconds
package.__path__ = ["torch_bridge"]
from torch_bridge.direct.problem import Request, versions
assert versions(13000)["product"]
print(Request.of(sys.argv[1]).key, "jax" in sys.modules)
"""


def test_a_key_is_the_same_in_another_process_which_imports_no_jax():
    done = subprocess.run([sys.executable, "-c", ALONE, FORWARD.text], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONHASHSEED": "7"}, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == [FORWARD.key, "False"]


def test_versions_hold_the_sources_and_the_driver():
    assert versions(13000) != versions(13010)
    assert len(versions(13000)["product"]) == 64 and versions(13000)["jax"] == jax.__version__


IMPORTS = """
import sys
sys.path.insert(0, "torch_bridge/direct")
import child
sys.path[0] = "."
child.alone()
from torch_bridge.direct import compile, driver, lower, plan, plugin, problem
read = []
problem.Path.read_bytes = lambda path: read.append(str(path.resolve())) or b""
problem._digest_of_sources()
print(*(name for name, module in sys.modules.items() if name.split(".")[0] in ("pallas_flash", "torch_bridge")
        and getattr(module, "__file__", None) and module.__file__ not in read), len(read) > 50)
"""


def test_the_sources_are_all_that_a_process_imports_to_compile():
    """Regression: what says which pairs attend was not among them, and a plan from before a change of it was run."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["True"], done.stdout + done.stderr


# --- lowering --------------------------------------------------------------------------------------------------------

MASKS = {
    "full": (FULL, masks.Full()),
    "causal": ((None, 0, -30, False), masks.Causal(-30)),
    "window": ((100, 0, 0, False), masks.Window(100, 0)),
    "an open window": ((None, 3, 2, False), masks.Window(right=3, offset=2)),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_problem_is_its_spec(name):
    rule, mask = MASKS[name]
    q, k = (jax.ShapeDtypeStruct((1, heads, length, 64), "bfloat16") for heads, length in ((4, 200), (2, 256)))
    for problem, options in ((dataclasses.replace(SMALL, window=rule), {}),
                             (dataclasses.replace(SMALL, window=rule, softcap=20.0, deterministic=True, scale=0.3),
                              dict(softcap=20.0, deterministic=True, scale=0.3))):
        assert lower.spec_of(problem) == AttentionSpec.of(q, k, k, layout="BHLD", mask=mask, **options)
        assert lower.spec_of(Request.of(Request(problem, "forward", H200, {}).text).problem) == lower.spec_of(problem)


def compiled(program, request):
    """The file of a program, had it been compiled."""
    steps = tuple(step._replace(kernel=ADD._replace(patches=())) for step in program.steps)
    return plan.write(program._replace(steps=steps), request.text)


@pytest.mark.parametrize(("changes", "name"), [({}, "forward"), ({}, "backward"),
                                               (dict(deterministic=True, window=(None, 0, -30, False)), "backward"),
                                               (dict(given=LENGTHS, dropout_p=0.25), "forward"),
                                               (dict(given=LENGTHS, dropout_p=0.25), "backward")])
def test_every_launch_reads_what_there_is(changes, name):
    request = dataclasses.replace(FORWARD, problem=dataclasses.replace(SMALL, **changes), pass_name=name)
    program, found = lower.lower(request), getattr(launches(lower.spec_of(request.problem), device.H200), name)
    given = {"dropout_seed": "given seed"} if "given seed" in program.given else {}  # read where it lies
    made = [name for name in found.inputs if name not in given]
    assert sorted((*program.inputs, *program.made)) == sorted(made) and program.results == found.results
    assert program.given == tuple(f"given {key}" for key, _, _ in request.problem.given)
    assert plan.read(compiled(program, request), request.text).operations == program.operations
    assert [step.arrays[:len(launch.inputs)] for step, launch in zip(program.steps, found.launches, strict=True)] == [
        tuple(given.get(name, name) for name in launch.inputs) for launch in found.launches]
    known = {*program.inputs, *program.made, *program.given, *program.constants}
    for step, launch in zip(program.steps, found.launches, strict=True):
        assert step.arrays[len(launch.inputs):] == (*launch.outputs, *launch.updates)
        assert step.kernel.code
        known |= {*launch.outputs}
        assert {*step.arrays} <= known <= {*program.buffers}
    assert {*program.scratch}.isdisjoint({*program.inputs, *program.results, *program.constants})
    for array, kind in found.inputs.items():
        dtype = "int32" if array in given else kind.dtype.name  # PyTorch's of the same bits
        assert program.buffers[given.get(array, array)] == (kind.shape, dtype, None)


def test_what_is_no_list_of_launches_is_refused():
    with pytest.raises(UnsupportedError, match=r"reads copies that JAX makes before the launches .* d=64, d_v=64"):
        lower.lower(dataclasses.replace(FORWARD, problem=dataclasses.replace(SMALL, d=60, d_v=60)))
    with pytest.raises(UnsupportedError, match=r"capability 9.0, .* 8.0 or higher, device has 7.5"):
        launches(lower.spec_of(SMALL), dataclasses.replace(device.A100, capability=(7, 5)))
    with pytest.raises(UnsupportedError, match="no key"):
        launches(lower.spec_of(dataclasses.replace(SMALL, kv_len=0)), device.H200)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_an_implementation_may_be_named(name, deterministic):
    """As tests and benchmarks of kernels on a GPU that has others do. It has a plan of its own."""
    request = dataclasses.replace(FORWARD, problem=dataclasses.replace(
        SMALL, given=LENGTHS, dropout_p=0.25, deterministic=deterministic), pass_name=name)
    named = dataclasses.replace(request, implementation="ampere")
    assert named.key != request.key and Request.of(named.text) == named
    program, found = lower.lower(named), launches(lower.spec_of(named.problem), device.H200, "ampere")
    assert program.implementation == found.implementation == "ampere"
    assert [step.arrays[:len(launch.inputs)] for step, launch in zip(
        program.steps, getattr(found, name).launches, strict=True)] == [
            launch.inputs for launch in getattr(found, name).launches]
    assert plan.read(compiled(program, named), named.text).implementation == "ampere"
    with pytest.raises(UnsupportedError, match=r"'xla' is JAX's own program, not a list of launches\."):
        launches(lower.spec_of(named.problem), device.H200, "xla")


def test_a_plan_says_which_kernels_were_left(monkeypatch):
    """Regression: with JAX 0.12 the kernels of other GPUs were launched on a Hopper GPU, and nothing said so."""
    assert lower.lower(FORWARD).left == ()
    monkeypatch.setattr(compiler, "why_not", lambda: "needs a compiler that moves registers")
    dispatch._decide.cache_clear()
    program = lower.lower(FORWARD)
    dispatch._decide.cache_clear()
    assert program.implementation == "ampere" and program.left == (("hopper", "needs a compiler that moves registers"),)
    assert plan.read(compiled(program, FORWARD), FORWARD.text).left == program.left


def test_another_jax_is_noticed(monkeypatch):
    """A launch that comes out as anything but one call of its kernel is an error, never a launch left out."""
    monkeypatch.setattr(lower, "TARGET", "mosaic_gpu_v3")
    with pytest.raises(RuntimeError, match="more than one call of 'mosaic_gpu_v3'"):
        lower.lower(FORWARD)


def test_a_launch_that_writes_to_the_callers_arrays_is_refused(monkeypatch):
    """JAX would copy them before; here they are the user's tensors, and constants of all calls."""
    passes = launches(lower.spec_of(SMALL), device.H200)
    for name in ("q", "table"):
        launch = passes.forward.launches[0]._replace(updates=(name,))
        changed = passes._replace(forward=dataclasses.replace(passes.forward, launches=(launch,)))
        monkeypatch.setattr(lower, "launches", lambda *_, changed=changed: changed)
        with pytest.raises(RuntimeError, match=rf"updates {name}, which outlives the call"):
            lower.lower(FORWARD)


# --- the file --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read():
    content = plan.write(PROGRAM, FORWARD.text)
    assert plan.read(content, FORWARD.text) == PROGRAM
    assert PROGRAM.scratch == ("sums", "more")
    assert content.count(ADD.cubin) == 1, "a kernel that is launched twice is kept once"
    assert content == plan.write(plan.read(content, FORWARD.text), FORWARD.text)


CONTENT = plan.write(PROGRAM, FORWARD.text)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 47, len(CONTENT) // 2, len(CONTENT) - 33, len(CONTENT) - 1])
def test_a_plan_cut_off_is_not_read(length):
    with pytest.raises(plan.UnreadablePlanError):
        plan.read(CONTENT[:length], FORWARD.text)


@pytest.mark.parametrize("place", [*range(0, len(CONTENT), 97), len(CONTENT) - 1])
def test_a_damaged_plan_is_not_read(place):
    damaged = bytearray(CONTENT)
    damaged[place] ^= 4
    with pytest.raises(plan.UnreadablePlanError):
        plan.read(bytes(damaged), FORWARD.text)


def test_a_plan_for_something_else_is_not_read():
    with pytest.raises(plan.UnreadablePlanError, match="not for"):
        plan.read(CONTENT, dataclasses.replace(FORWARD, pass_name="backward").text)


def rewritten(change):
    """The content with another header, and the checksum of that."""
    length = struct.unpack_from("<I", CONTENT, 12)[0]
    header = json.loads(CONTENT[16:16 + length])
    change(header)
    text = json.dumps(header).encode()
    content = CONTENT[:12] + struct.pack("<I", len(text)) + text + CONTENT[16 + length:-32]
    return content + hashlib.sha256(content).digest()


def test_a_plan_rewritten_unchanged_is_read():
    assert plan.read(rewritten(lambda header: None), FORWARD.text) == PROGRAM


@pytest.mark.parametrize("change", [
    lambda header: header.pop("steps"), lambda header: header.update(blobs=[]), lambda header: header.pop("blobs"),
    lambda header: header["blobs"].append(-5), lambda header: header["kernels"][0].pop(),
    lambda header: header["kernels"][0][-1].append([3, 0]), lambda header: header["kernels"][0][-1].append([0, 2]),
    lambda header: header["kernels"][0][-1].append([-1, 0]), lambda header: header["steps"].append([2, []]),
    lambda header: header["steps"].append([0, ["x", "z"]]), lambda header: header["results"].append("z"),
    lambda header: header["buffers"].update(table=[[5], "int32", None]), lambda header: header["buffers"].pop("x"),
    lambda header: header["buffers"].update(table=[[4], "int31", None]), lambda header: header.update(kernels=3),
    lambda header: header["results"].append("x"), lambda header: header["results"].append("table"),
    lambda header: header.update(buffers=[]), lambda header: header.update(blobs=[float("inf")]),
    lambda header: header["kernels"][0].__setitem__(3, float("inf")),
    lambda header: header["buffers"].update(sums=[[5, 7], "float32", [8, 1]]),
    lambda header: header["buffers"].update(y=[[2, 3], "bfloat16", [8]]),
    lambda header: header["buffers"].update(x=[[2, 3], "bfloat16", [8]]),
    lambda header: header["buffers"].update(x=[[2, 3], "bfloat16", [-8, 1]]),
], ids=range(24))
def test_a_plan_that_does_not_fit_itself_is_not_read(change):
    """Launched, it would read or write at addresses that nobody gave it."""
    with pytest.raises(plan.UnreadablePlanError):
        plan.read(rewritten(change), FORWARD.text)


def test_a_header_of_endless_depth_is_not_read():
    text = b'{"blobs":' + b"[" * 100_000
    content = CONTENT[:12] + struct.pack("<I", len(text)) + text
    with pytest.raises(plan.UnreadablePlanError, match="no JSON object"):
        plan.read(content + hashlib.sha256(content).digest(), FORWARD.text)


@pytest.mark.parametrize("wrong", [
    plan.Operation("exec", ("x",), (), "made"), plan.Operation("neg", ("what is not there",), (), "made"),
    plan.Operation("neg", ("x",), (), "x"), plan.Operation("neg", ("x",), (), "y")], ids=str)
def test_operations_are_known_and_read_what_there_is(wrong):
    """The last makes a result that a launch was to make."""
    given = PROGRAM._replace(given=("x",), operations=(plan.Operation("neg", ("x",), (), "made"),))
    assert plan.read(plan.write(given, "request"), "request") == given
    content = plan.write(given._replace(operations=(wrong,)), "request")
    with pytest.raises(plan.UnreadablePlanError, match="do not fit its arrays"):
        plan.read(content, "request")
