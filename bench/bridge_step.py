"""What the attention of a GPT training step costs a GPU: `python -m bench.bridge_step`, one JSON object a line.

    torch-cudnn   torch.nn.functional.scaled_dot_product_attention, with its cuDNN backend
    torch-flash   the same, with its FlashAttention-2
    direct        the same model under torch_bridge.patched(), launched directly
    fa3           FlashAttention-3 through JAX, as many forwards and backwards as there are layers, without a model

Round by round, in one process, each step's time on the device by torch.profiler: of all that runs there, and of the
kernels of attention alone; then of those without the rest of a step. Gradients are checked before. In processes of
their own: what a first `generate` of a tiny Llama takes (bridge_generate.py), and what takes memory beside torch's
allocator (module_memory.py). It needs a Hopper GPU, about 80 s of it, and no other work there. With --cpu all of it is
run on tiny problems and CPU tensors, of which the figures mean nothing.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_bridge
from bench import (
    bridge_generate,
    bridge_paths,
    cli,
    contestants,
    environment,
    first_call,
    profiles,
    records,
    step_report,
    timing,
)
from bench.small_gpt import Gpt, Size
from bench.waiting import Waiting
from pallas_flash.errors import FallbackWarning
from pallas_flash.testing import problems
from torch_bridge.direct.attention import VARIABLE
from torch_bridge.direct.cache import VARIABLE as PLANS

__all__ = ["ALONE", "FA3", "KIND", "MEMORY", "STEP", "WAYS", "main", "measure", "steps"]

Record = dict[str, Any]
KIND, MEMORY = "bridge-step", "bridge-memory"
STEP, ALONE = step_report.STEP, step_report.ALONE
WITHIN = 2.0
"""Times the error of PyTorch's formula in bfloat16, the largest that is no fault."""
SIZES = {"cuda": Size(4, 4096, 16, 128, 4, 4096, (1, 8, 128, 128)), "cpu": Size(1, 32, 2, 16, 1, 32, (1, 2, 16, 8))}


class Way(NamedTuple):
    """A way to compute the attention of a model that calls PyTorch's function.

    Attributes:
      kernels: what is found in the names of its kernels, and in no other's; on a CPU, in those of operators.
      taken: where calls go this way.
    """

    name: str
    label: str
    kernels: dict[str, str]
    taken: Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    with bridge_paths.PATHS[-1].taken(), torch_bridge.patched():
        yield


def _backend(name: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    return lambda: torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, name))


_ON_CPU = r"scaled_?dot_?product"
WAYS = (Way("torch-cudnn", "PyTorch (cuDNN)", {"cuda": "cudnn", "cpu": _ON_CPU}, _backend("CUDNN_ATTENTION")),
        Way("torch-flash", "PyTorch (FlashAttention-2)", {"cuda": "pytorch_flash", "cpu": _ON_CPU},
            _backend("FLASH_ATTENTION")),
        Way("direct", "torch_bridge, direct", {"cuda": "mosaic", "cpu": r"\b_attention"}, _ours))
FA3 = Way("fa3", "FlashAttention-3 (JAX)", {"cuda": "flash", "cpu": ""}, contextlib.nullcontext)


# What is measured ----------------------------------------------------------------------------------------------------

class _Setting:
    """A model with random weights in bfloat16, its optimizer, tokens, and arrays of one layer's attention."""

    def __init__(self, size: Size, device: str) -> None:
        self.size, self.device = size, device
        torch.manual_seed(0)
        self.model = Gpt(size).to(device=device, dtype=torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-5, fused=device == "cuda")
        self.tokens = torch.randint(size.vocabulary, (size.batch, size.length + 1), device=device)
        self.case = bridge_paths._Case.of(size.shape, device)

    def step(self) -> None:
        """A training step."""
        self.optimizer.zero_grad()
        self.model(self.tokens).backward()
        self.optimizer.step()

    def attention(self) -> None:
        """Forward and backward of as many layers' attention."""
        q, k, v, dout = self.case
        for _ in range(self.size.layers):
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), dout)


# What is checked before anything is timed ----------------------------------------------------------------------------

def _gradients(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    loss = model(tokens)
    return [loss.detach(), *torch.autograd.grad(loss, tuple(model.parameters()))]


def _reasons(setting: _Setting) -> dict[str, str]:
    """Why ways cannot be measured: they fail, another would run, or a gradient of the model is wrong."""
    with _backend("MATH")():
        truth = _gradients(copy.deepcopy(setting.model).float(), setting.tokens)
        limit = WITHIN * first_call.largest_error(_gradients(setting.model, setting.tokens), truth)
    found = {}
    for way in WAYS:
        try:
            with way.taken(), warnings.catch_warnings():
                warnings.simplefilter("error", FallbackWarning)  # it would measure another way
                error = first_call.largest_error(_gradients(setting.model, setting.tokens), truth)
            reason = "" if error <= limit else f"wrong: a relative error of {error:.1e}, more than {limit:.1e}"
        except Exception as raised:  # whatever a way raises: the others are still to be measured
            reason = f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}"[:300]
        if reason:
            found[way.name] = reason
    return found


# FlashAttention-3 ----------------------------------------------------------------------------------------------------

def _fa3(setting: _Setting) -> Callable[[], Any] | str:
    """As many forwards and backwards as there are layers, at the shapes of a layer; why there are none, if so."""
    size = setting.size
    problem = dataclasses.replace(
        problems.find("causal-d128-s4096"), name="bridge-step", batch=size.batch, q_heads=size.heads,
        kv_heads=size.heads, q_len=size.length, kv_len=size.length, d=size.dim, d_v=size.dim)
    (peer,) = contestants.find([FA3.name], contestants.PEERS)
    if reason := peer.missing() or peer.why_not(problem):
        return reason
    try:
        arrays = contestants.inputs_of(problem)
        call = peer.prepare(problem, arrays, "both")
        error = _error_of(problem, arrays, call.results(call.call.finish()))
    except Exception as raised:  # of a library of others: the rest is still to be measured
        return f"{type(raised).__name__}: {raised}"[:300]
    if not error <= bridge_paths.LIMIT:
        return f"wrong: a relative error of {error:.1e}, more than {bridge_paths.LIMIT:.1e}"

    def layers() -> None:
        for _ in range(size.layers):
            result = call.call.start()
        call.call.wait(result)
    return layers


def _error_of(problem: problems.Problem, arrays: contestants.Arrays, results: dict[str, Any]) -> float:
    """Of results in JAX, of the first row of the batch, (length, heads, dim)."""
    def row(array: Any) -> Tensor:
        return torch.from_dlpack(array.astype(jax.numpy.float32)[:1]).transpose(1, 2)
    assert problem.layout == "BLHD"
    truth = first_call.truth([row(x) for x in arrays[:3]], row(arrays.dout))
    return first_call.largest_error([row(results[name]) for name in ("out", "dq", "dk", "dv")], truth)


# Rounds --------------------------------------------------------------------------------------------------------------

class _Turn(NamedTuple):
    """What is profiled of a way."""

    what: str
    way: Way
    call: Callable[[], Any]


Key = tuple[str, str]
"""What, and the name of a way."""


def _profiled(turns: list[_Turn], device: str, rounds: int) -> list[dict[Key, list[profiles.Event]]]:
    """The events of each turn in every round, one after another, in the other direction in every second round."""
    found = []
    for i in range(rounds + 1):
        of_round = {}
        for turn in turns if i % 2 else turns[::-1]:
            with turn.way.taken():
                of_round[turn.what, turn.way.name] = profiles.of_call(turn.call, device)
        found += [of_round] if i else []  # the first round is for what is set up once
    return found


def _times(turns: list[_Turn], found: list[dict[Key, list[profiles.Event]]], device: str) -> Iterator[Record]:
    """A record for each turn, of those rounds in which the profiler missed no kernel of attention."""
    of_attention = {(turn.what, turn.way.name): [
        profiles.matching(events[turn.what, turn.way.name], turn.way.kernels[device]) for events in found]
        for turn in turns}
    counts = {key: max(map(len, rounds)) for key, rounds in of_attention.items()}
    whole = [i for i in range(len(found)) if all(len(of_attention[key][i]) == count for key, count in counts.items())]
    us: dict[str, dict[Key, list[float]]] = {"step": {}, "attention": {}}
    for key, rounds in of_attention.items():
        us["step"][key] = [profiles.busy_us(found[i][key]) for i in whole]
        us["attention"][key] = [(profiles.sum_us if device == "cuda" else profiles.busy_us)(rounds[i]) for i in whole]
    for turn in turns:
        key = turn.what, turn.way.name
        record = {"kind": KIND, "what": turn.what, "way": turn.way.name, "label": turn.way.label}
        if reason := _missed(turn, counts[key], found, whole, device):
            yield record | {"reason": reason}
            continue
        yield record | {
            **{f"{name}_us": statistics.median(times[key]) for name, times in us.items()},
            **{f"{name}_us_range": [min(times[key]), max(times[key])] for name, times in us.items()},
            "attention_busy_us": statistics.median([profiles.busy_us(of_attention[key][i]) for i in whole]),
            "kernels": statistics.median([len(found[i][key]) for i in whole]), "attention_kernels": counts[key],
            "rounds": len(whole), "rounds_left_out": len(found) - len(whole),
            **{f"{name}_over": {" ".join(other): timing.ratios(times[other], times[key])._asdict()
                                for other in times if counts[other]} for name, times in us.items()},
            "names": _longest(of_attention[key][whole[0]])}


def _missed(turn: _Turn, count: int, found: list[dict[Key, list[profiles.Event]]], whole: list[int],
            device: str) -> str:
    """Why the profiles of a turn say nothing; empty if they do."""
    key = turn.what, turn.way.name
    if not count:
        names = sorted({event.name[:40] for event in found[0][key]})
        return f"no kernel has {turn.way.kernels[device]!r} in its name: {', '.join(names)}"[:300]
    if not whole:
        return f"the profiler missed kernels of attention in each of {len(found)} rounds"
    other = next((way for way in WAYS if device == "cuda" and way.name != turn.way.name and turn.way != FA3
                  and profiles.matching(found[whole[0]][key], way.kernels[device])), None)
    return f"kernels of {other.label} ran, too" if other else ""


def _longest(events: list[profiles.Event]) -> dict[str, float]:
    """Microseconds by name, the names cut; the longest first."""
    found: dict[str, float] = collections.defaultdict(float)
    for event in events:
        found[event.name[:80]] += event.end_us - event.start_us
    return dict(sorted(found.items(), key=lambda item: -item[1])[:8])


def steps(size: Size, device: str, rounds: int) -> Iterator[Record]:
    """Records of training steps, and of attention alone."""
    setting = _Setting(size, device)
    common = {"shape": list(size.shape), "layers": size.layers, "vocabulary": size.vocabulary}
    reasons: dict[str, str] = _reasons(setting)
    turns = [_Turn(what, way, call) for what, call in ((STEP, setting.step), (ALONE, setting.attention))
             for way in WAYS if way.name not in reasons]
    fa3 = _fa3(setting)
    if isinstance(fa3, str):
        reasons[FA3.name] = fa3
    else:
        turns.append(_Turn(ALONE, FA3, fa3))
    for way in (*WAYS, FA3):
        if way.name in reasons:
            yield {"kind": KIND, "what": ALONE if way is FA3 else STEP, "way": way.name, "label": way.label,
                   "reason": reasons[way.name], **common}
    yield from (record | common for record in _times(turns, _profiled(turns, device, rounds), device))


# Everything ----------------------------------------------------------------------------------------------------------

def _memory(processes: dict[str, Waiting], shape: tuple[int, ...]) -> Iterator[Record]:
    """What takes memory, with plans on disk: a process before makes them."""
    for way, process in processes.items():
        found = process.go()
        if "reason" not in found and found["warnings"]:
            found = {"reason": found["warnings"][0][:300]}
        if "reason" not in found and not found["error"] <= bridge_paths.LIMIT:
            found = {"reason": f"wrong: a relative error of {found['error']:.1e}"}
        yield {"kind": MEMORY, "shape": list(shape), **found, "way": way}


@contextlib.contextmanager
def _memory_processes(folder: str, device: str, shape: tuple[int, ...], variables: dict[str, str],
                      seconds: float) -> Iterator[dict[str, Waiting]]:
    ways = {"no plans": "alone", "alone": "alone", "after an empty module": "after an empty module"}
    start = functools.partial(Waiting, "bench.module_memory", environment={**variables, VARIABLE: "1", PLANS: folder},
                              seconds=seconds)
    found = {way: start(arguments=[*map(str, shape), how, device]) for way, how in ways.items()
             if device == "cuda" or way == "alone"}
    try:
        yield found
    finally:
        for process in found.values():
            process.end()


def measure(device: str, rounds: int, tokens: int, repeats: int, seconds: float = 120.0,
            sizes: dict[str, Size] = SIZES) -> Iterator[Record]:
    """All records. Plans are made in folders that are empty before and gone afterwards.

    Args:
      tokens: that are generated.
      repeats: processes of each kind that generate.
      seconds: after which a process is ended.
    """
    size, variables = sizes[device], dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="plans-") as folder:
        with (_memory_processes(f"{folder}/memory", device, size.memory, variables, seconds) as looking,
              bridge_generate.start(f"{folder}/generate", device, tokens, repeats, variables, seconds) as generating):
            yield from bridge_generate.measure(generating)
            yield from _memory(looking, size.memory)
        with mock.patch.dict(os.environ, {PLANS: f"{folder}/steps"}):
            yield from steps(size, device, rounds)


def _leave_gpus_alone() -> None:
    """In this process and in those that it starts."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_PLATFORMS"] = "cpu"


def main() -> None:
    """Prints the records, and what they say of the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="tiny problems on CPU tensors: does it run?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=20, help="to generate")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each kind that generate")
    parser.add_argument("--out", type=pathlib.Path, help="also append the records to a file of this folder, such as "
                        "bench/results")
    arguments = parser.parse_args()
    if not arguments.cpu and (reason := bridge_paths.why_not()):
        raise SystemExit(f"bench.bridge_step measures on a GPU of compute capability 9.0 (H100, H200): {reason}. Run "
                         "it there, with jax[cuda13] and a PyTorch for CUDA 13, or with --cpu to see that it runs.")
    if arguments.cpu and arguments.out:
        parser.error("--out is for what is measured on a GPU, and the figures of --cpu mean nothing")
    if arguments.cpu:
        _leave_gpus_alone()
    if (cli.PEERS_FOLDER / "site").is_dir():
        sys.path.append(str(cli.PEERS_FOLDER / "site"))
    where, found = environment.describe(), []
    for record in measure("cpu" if arguments.cpu else "cuda", arguments.rounds, arguments.tokens, arguments.repeats):
        print(json.dumps(record), flush=True)
        found.append({"environment": where} | record)
        if arguments.out:
            records.append(arguments.out / records.file_name(where), found[-1])
    for aim, measured, reached in step_report.bars(found) if not arguments.cpu else ():
        print(f"{aim}: {measured}; reached: {reached}", file=sys.stderr)


if __name__ == "__main__":
    main()
