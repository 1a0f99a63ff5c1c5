"""The direct path up to the launch, without a GPU: compiled by JAX's plugin, recorded, and launched by a stand-in
driver (driver.c) that writes down what it is asked. What a plan launches is what Mosaic's own host code launches.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hopper.offline import places

from bridge.direct import A100, CACHE, DECODE, FORWARD, SMALL
from pallas_flash import ALiBi, device, scores
from pallas_flash.kernels.ampere import defaults as ampere_defaults
from pallas_flash.kernels.ampere import schedule as ampere_schedule
from pallas_flash.kernels.hopper import defaults as hopper_defaults
from pallas_flash.kernels.hopper import kernel_names as hopper_kernels
from torch_bridge.direct import cache, lower, parent, plan, score_ir
from torch_bridge.direct.problem import Problem

ROOT = Path(__file__).parents[2]
AMPERE, HOPPER = (ampere_defaults, ampere_schedule), (hopper_defaults, hopper_kernels)
BACKWARD = dataclasses.replace(FORWARD, pass_name="backward")
ORDERED = dataclasses.replace(BACKWARD, problem=dataclasses.replace(SMALL, deterministic=True, layout="BLHD"))
PACKED = dataclasses.replace(BACKWARD, problem=dataclasses.replace(SMALL, layout="BLHD", outer=(
    (12, 64), (2, 64), (2, 192))))  # q of (B, L, 3, H, D), k dense, v of (B, L, H, 3, D)
PARTS = dataclasses.replace(BACKWARD, pass_name="backward_of_parts", problem=dataclasses.replace(
    SMALL, layout="BLHD", kv_heads=4, outer=((12, 64),) * 3))  # of (B, L, 3, H, D), whose gradient is another such
LENGTHS = dataclasses.replace(SMALL, given=(("kv_lengths", (1,), "int32"), ("seed", (2,), "int32")), dropout_p=0.25)
MASK = dataclasses.replace(SMALL, given=(("mask", (1, 4, 200, 256), "bool"),))
PAIRS = dataclasses.replace(SMALL, window=(None, None, 0, False), given=(("bias", (1, 4, 200, 256), "bfloat16"),))
KEYS = dataclasses.replace(SMALL, window=(None, None, 0, False), given=(("bias", (1, 1, 1, 256), "float32"),))
SLOPES, PLAIN = (scores.checked(x) for x in (
    ALiBi(np.ones(4, np.float32)), lambda score, *_: jnp.maximum(score, 0.1 * score)))
SCORED, BENT = (dataclasses.replace(
    SMALL, score=name, score_ir=score_ir.serialized(score.with_placeholders()), given=given)
    for name, score, given in (("slopes", SLOPES, (("score_floats", (4,), "float32"),)), ("plain", PLAIN, ())))
PAGES = dataclasses.replace(
    CACHE, layout="BLHD", d=128, pages=(70, 16), q_len=2, window=(99, 0),
    given=(*CACHE.given, ("page_table", (2, 32), "int32"), ("bias", (2, 1, 1, 512), "float32"),
           ("sinks", (8,), "float32")))
REQUESTS = {"backward": BACKWARD, "ordered": ORDERED, "packed": PACKED, "parts": PARTS,
            "parts, d256": dataclasses.replace(PARTS, problem=dataclasses.replace(
                PARTS.problem, d=256, d_v=256, outer=((4, 768),) * 3)),  # (B, L, H, 3, D): dq by a kernel of its own
            "mask": dataclasses.replace(BACKWARD, problem=MASK), "bias": dataclasses.replace(BACKWARD, problem=PAIRS),
            "bias, forward": dataclasses.replace(FORWARD, problem=PAIRS),
            "bias of keys": dataclasses.replace(BACKWARD, problem=KEYS),
            "score": dataclasses.replace(BACKWARD, problem=SCORED),
            "score, forward": dataclasses.replace(FORWARD, problem=SCORED),
            "plain score": dataclasses.replace(BACKWARD, problem=BENT),
            "lengths": dataclasses.replace(BACKWARD, problem=LENGTHS),
            "lengths, forward": dataclasses.replace(FORWARD, problem=LENGTHS), "decode, forward": DECODE,
            "decode of pages, forward": dataclasses.replace(DECODE, problem=PAGES),
            "decode in long runs, forward": dataclasses.replace(DECODE, problem=dataclasses.replace(
                CACHE, capacity=67_584))}
REQUESTS |= {f"8.0, {name}": dataclasses.replace(request, gpu=A100) for name, request in REQUESTS.items()
             if "bias" not in name and "score" not in name and "decode" not in name and "d256" not in name}
WHY_NOT = places.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the stand-in driver."""
    folder = tmp_path_factory.mktemp("direct")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", Path(__file__).with_name("driver.c"),
                    "-ldl", "-lpthread"], check=True)
    return folder


def environment(work):
    return os.environ | {"LD_LIBRARY_PATH": f"{work}:{os.environ.get('LD_LIBRARY_PATH', '')}", "PYTHONPATH": str(ROOT),
                         "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "STANDIN_LOG": str(work / "log"),
                         "CUDA_ROOT": str(places.cuda_root() or "")}


def logged(work):
    """What the stand-in driver wrote down, which is forgotten."""
    lines = [json.loads(line) for line in (work / "log").read_text().splitlines()]
    (work / "log").unlink()
    return lines


@pytest.fixture(scope="module")
def compiled(work):
    """Of each request, the program, the launches at the same addresses by Mosaic's host code and by the plan, and the
    kernels of a graph into which these are captured."""
    found = {}
    for gpu in (FORWARD.gpu, A100):
        found |= compiled_for(work, {name: x for name, x in REQUESTS.items() if x.gpu == gpu}, gpu)
    return found


def compiled_for(work, requests, gpu, *options):
    """The same of requests for one kind of GPU."""
    worker = Path(__file__).with_name("direct_worker.py")
    done = subprocess.run([places.interpreter(), worker, work, *options], text=True,
                          input="\n".join(request.text for request in requests.values()), capture_output=True,
                          env=environment(work) | {"STAND_IN_CAPABILITY": "{}{}".format(*gpu.capability)})
    assert done.returncode == 0, done.stderr[-4000:]
    launched, found = [line for line in logged(work) if "launched" in line], {}
    for (name, request), graph in zip(requests.items(), done.stdout.splitlines(), strict=True):
        program = plan.read((work / f"{request.key}.plan").read_bytes(), request.text)
        count = len(program.steps)
        found[name] = program, launched[:count], launched[count:2 * count], graph.split()
        launched = launched[2 * count:]
    assert not launched
    return found


@pytest.mark.parametrize("name", REQUESTS)
def test_a_plan_launches_what_mosaic_launches(compiled, name):
    """Grid, block, shared memory, and every byte of the parameters."""
    program, native, replayed, graph = compiled[name]
    assert replayed == native and len(native) == len(program.steps)
    assert graph == [step.kernel.name for step in program.steps], "all of them, in order, can be captured"
    for step, line in zip(program.steps, replayed, strict=True):
        assert line["device"] == 0 and line["launched"] == step.kernel.name
        assert line["smem_bytes"] <= REQUESTS[name].gpu.smem_bytes and line["block"][0] % 128 == 0 < min(line["grid"])
        is_small = any(x in line["launched"] for x in ("attention_mask", "dropout_keys"))
        assert line["smem_bytes"] > 0 or is_small or ("8.0" in name and "backward_finish" in line["launched"])


@pytest.mark.parametrize("blocks", [8, 16])  # more than 8 need the function's permission
def test_clusters_are_launched(work, blocks):
    program, native, replayed, _ = compiled_for(work, {"": DECODE}, DECODE.gpu, str(blocks))[""]
    assert replayed == native and len(native) == 1
    assert native[0]["cluster"] == [blocks, 1, 1] == list(program.steps[0].kernel.cluster)
    assert native[0]["grid"][0] == blocks * DECODE.problem.batch * DECODE.problem.kv_heads


@pytest.mark.parametrize("name", REQUESTS)
def test_the_kernels_are_those_that_explain_names(compiled, name):
    spec = lower.spec_of(REQUESTS[name].problem)
    gpu, (defaults, schedule) = (device.A100, AMPERE) if "8.0" in name else (device.H200, HOPPER)
    default = defaults.default_forward if "forward" in name else defaults.default_backward
    small = {"lengths": ["attention_dropout_keys", "attention_mask"], "8.0, lengths": ["attention_mask"]}
    kernels = [*small.get(name.removesuffix(", forward"), []), *schedule.kernels(default(spec, gpu))]
    assert compiled[name][0].implementation == ("ampere" if "8.0" in name else "hopper")
    names = [step.kernel.name for step in compiled[name][0].steps]
    assert [name.removesuffix("_mosaic_gpu_kernel") for name in names] == kernels


@pytest.mark.parametrize("name", REQUESTS)
def test_every_array_of_a_launch_is_given_to_it(compiled, name):
    program = compiled[name][0]
    for kernel, arrays in program.steps:
        # A bias of pairs in 16 bits has no anchor, but zeros, which the fused backward does not read.
        unread = {"anchor"} if name == "bias" and "backward_kv" in kernel.name else set()
        assert {arrays[i] for _, i in kernel.patches} == {*arrays} - unread
        words = memoryview(kernel.parameters).cast("Q")
        assert all(words[place] == 0 for place, _ in kernel.patches)
        assert not {*words} & {(i + 1) << 36 for i in range(len(arrays))}, "an address of the recording is left"


@pytest.mark.parametrize("name", REQUESTS)
def test_tensor_maps_span_their_arrays(compiled, name):
    """A map of the stand-in driver holds sizes and strides; its last element is the array's last. That of an operand
    which is a part of an array is the whole array's: kernels touch only what they have an index for.
    """
    program, seen, packed = compiled[name][0], 0, 0
    problem = REQUESTS[name].problem
    whole = problem.outer_shapes() if isinstance(problem, Problem) else problem.shapes()
    if "parts" in name:
        whole |= {f"d{operand}": shape for operand, shape in whole.items()}
    for kernel, arrays in program.steps:
        words = memoryview(kernel.parameters).cast("Q")
        for place, i in kernel.patches:
            buffer, head = program.buffers[arrays[i]], words[place + 1] if place + 16 <= len(words) else 0
            rank, sizes = head >> 8 & 255, words[place + 2:place + 7]
            if not (1 <= rank <= 5 and head >> 40 == 0 and all(sizes[:rank])):
                continue
            seen += 1
            strides = [plan.ITEM_BYTES[buffer.dtype], *words[place + 7:place + 7 + rank - 1]]
            last = sum((size - 1) * stride for size, stride in zip(sizes, strides))
            shape = whole.get(arrays[i], buffer.shape)
            assert last + strides[0] == math.prod(shape) * strides[0], arrays[i]
            if buffer.strides is not None:
                packed += 1
                assert {*strides} <= {2 * stride for stride in buffer.strides} | {128}, arrays[i]
    if "8.0" in name:
        assert not seen, "kernels with mma.sync take addresses alone"
    else:
        assert seen >= (2 if "decode" in name else 3 if "forward" in name else 4)
        assert packed == (2 if name == "packed" else 0) if "parts" not in name else packed >= 6
        assert "parts" not in name or {*program.results} <= {x for step in program.steps for x in step.arrays}


VERSIONS = """
import json, sys, types
sys.modules["torch_bridge"] = types.ModuleType("torch_bridge")
sys.modules["torch_bridge"].__path__ = ["torch_bridge"]
from torch_bridge.direct.problem import versions
print(json.dumps(versions(13000)))
"""


@pytest.fixture(scope="module")
def current(work):
    """FORWARD with what is installed for the child."""
    done = subprocess.run([places.interpreter(), "-c", VERSIONS], text=True, env=environment(work), cwd=ROOT,
                          check=True, capture_output=True)
    return dataclasses.replace(FORWARD, versions=json.loads(done.stdout))


def test_a_child_that_finds_other_sources_makes_no_plan(work, current):
    """They were changed, or upgraded, while its parent runs: their plan would be kept as that of those before."""
    older = dataclasses.replace(current, versions=current.versions | {"product": "0" * 64})
    done = subprocess.run([places.interpreter(), parent.COMMAND[1], "0", work / "none"], text=True, input=older.text,
                          env=environment(work), capture_output=True)
    assert json.loads(done.stdout) == {
        "reason": "needs what this process started with, but a new one finds another product: start it again, with "
                  "packages that a new process finds"}, done.stderr
    assert not (work / "none").exists()


def test_a_child_that_sees_another_kind_of_gpu_makes_no_plan(work, current):
    """CUDA_VISIBLE_DEVICES may change after CUDA has started. What it makes would be kept, and refused ever after."""
    blackwell = dataclasses.replace(current, gpu=dataclasses.replace(FORWARD.gpu, capability=(10, 0)))
    done = subprocess.run([places.interpreter(), parent.COMMAND[1], "1", work / "none"], text=True,
                          input=blackwell.text, env=environment(work), capture_output=True)
    last = json.loads(done.stdout.splitlines()[-1])
    assert "to be of compute capability (10, 0), as NVIDIA H200, it is of (9, 0)" in last["reason"], done.stderr[-4000:]
    assert not (work / "none").exists()


REPLAY = """
import json, os, sys, threading
import torch
from torch_bridge import streams
from torch_bridge.direct import cache, driver, launch, runner
from torch_bridge.direct.problem import Request
request = Request.of(sys.argv[1])
streams._number = lambda index: 77 + index
shapes = dict(q=(1, 4, 200, 64), k=(1, 2, 256, 64), v=(1, 2, 256, 64))
x = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
program = cache.find(request, 0)
run = runner.Runner(program, torch.device("cpu"))
out, stats = run(list(x.values()))
shapes = [(tuple(y.shape), str(y.dtype)) for y in (out, stats)]
named = x | dict(out=out, stats=stats, table=run._constants["table"])
pointers = {name: tensor.data_ptr() for name, tensor in named.items()}
table = named["table"].numpy().tobytes() == program.constants["table"]

second = launch.Loaded(program, 1)   # another device, from a thread that has used neither
def work():
    with driver.current(0):
        second.launch(list(range(0, 16 * len(program.buffers), 16)), 5)
thread = threading.Thread(target=work); thread.start(); thread.join()
said = []
for broken in (dict(cubin=b"\\x7fELF" + bytes(200)), dict(name="other")):
    try:
        step = program.steps[0]
        launch.Loaded(program._replace(steps=(step._replace(kernel=step.kernel._replace(**broken)),)), 0)
    except driver.DriverError as error:
        said.append(str(error))
short = step.kernel._replace(parameters=step.kernel.parameters[:-64], patches=())
try:
    launch.Loaded(program._replace(steps=(step._replace(kernel=short),)), 0).launch([0] * len(program.buffers), 0)
except driver.DriverError as error:
    said.append(str(error))
pid = os.fork()
if pid == 0:
    try:
        second.launch([0] * len(program.buffers), 0)
    except RuntimeError as error:
        os._exit(7 if "forked after they were loaded" in str(error) else 1)
    os._exit(2)
forked = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
second.unload()
print(json.dumps(dict(shapes=shapes, pointers=pointers, table=table, said=said, forked=forked,
                      jax="jax" in sys.modules)))
"""


@pytest.fixture(scope="module")
def replayed(work, current):
    """The forward's plan, made by the child process and then replayed by a process with torch and no JAX; what that
    says, and what it launched."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(work).items():
            patch.setenv(name, value)
        patch.setenv(cache.VARIABLE, str(work))
        patch.setattr(parent, "COMMAND", (places.interpreter(), *parent.COMMAND[1:]))
        program = cache.find(current, 0)
        (work / "log").unlink()
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", REPLAY, current.text], capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    return program, json.loads(done.stdout.splitlines()[-1]), logged(work)


def test_a_process_with_plans_imports_no_jax(replayed):
    _, said, _ = replayed
    assert said["jax"] is False
    assert said["shapes"] == [[[1, 4, 200, 64], "torch.bfloat16"], [[1, 4, 2, 200], "torch.float32"]] and said["table"]


def test_tensors_are_launched_on_torchs_stream(replayed):
    program, said, lines = replayed
    (kernel, arrays), = program.steps
    first = next(line for line in lines if "launched" in line)
    assert (first["launched"], tuple(first["grid"]), tuple(first["block"]), first["smem_bytes"], first["stream"]) == (
        kernel.name, kernel.grid, kernel.block, kernel.smem_bytes, 77)
    words, blank = memoryview(bytes.fromhex(first["parameters"])).cast("Q"), memoryview(kernel.parameters).cast("Q")
    wanted = list(blank)
    for place, i in kernel.patches:
        wanted[place] = said["pointers"][arrays[i]]
    assert list(words) == wanted


def test_each_device_has_its_modules_and_any_thread_launches(replayed):
    _, _, lines = replayed
    launched = [line for line in lines if "launched" in line]
    assert [(line["device"], line["stream"]) for line in launched] == [(0, 77), (1, 5)]
    loaded = [line["loaded"] for line in lines if "loaded" in line]
    assert loaded[:2] == [0, 1]
    assert [line["unloaded"] for line in lines if "unloaded" in line] == [0, 1], "after a name that is not there, too"


def test_return_codes_are_errors_that_name_the_call(replayed):
    _, said, _ = replayed
    image, name, short = said["said"]
    assert image == "cuModuleLoadData returned CUDA error 200: the stand-in driver refuses"
    assert name.startswith("cuModuleGetFunction returned CUDA error 500")
    assert short.startswith("cuLaunchKernelEx of attention_forward") and "returned CUDA error 1:" in short


def test_a_forked_process_is_told(replayed):
    assert replayed[1]["forked"] == 7
