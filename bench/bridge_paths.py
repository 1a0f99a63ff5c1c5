"""What a call from PyTorch costs by each way: `python -m bench.bridge_paths`, one JSON object a line.

    torch         torch.nn.functional.scaled_dot_product_attention, with the backend that PyTorch chooses
    torch-cudnn   the same, with its cuDNN backend
    dlpack        torch_bridge, through DLPack into JAX's runtime
    direct        torch_bridge with PALLAS_FLASH_DIRECT=1

In one process, round by round: the host's microseconds of a forward without gradient, a forward with one, .backward()
and both, on a problem too small to keep the device busy; what a replay of a CUDA graph of a forward, or of a forward
and its gradients, costs the host and the device, the latter of a large problem too. In processes of their own: the
first call, with plans on disk and without, GPU memory beside torch's allocator, and whether JAX was imported. Results
are checked before anything is timed. It needs a Hopper GPU, and takes about two minutes there. With --kinds, of each
kind of calls (lengths, ids, packed sequences, dropout, masks) what bridge_kinds.py says, and nothing else; with --hosts
what bridge_hosts.py says.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench import environment, first_call, records, timing
from pallas_flash.errors import FallbackWarning
from torch_bridge import scaled_dot_product_attention
from torch_bridge.direct.attention import VARIABLE
from torch_bridge.direct.cache import VARIABLE as PLANS

__all__ = ["PATHS", "main", "measure"]

Record = dict[str, Any]
SMALL, LARGE = (1, 8, 128, 64), (4, 16, 4096, 128)
"""(batch, heads, length, dim) of tensors, bfloat16 and causal."""
LIMIT = 2e-2
"""Of |result - truth| / |truth|: of four roundings to bfloat16."""


class Path(NamedTuple):
    """A way to compute attention."""

    name: str
    label: str
    attend: Callable[..., torch.Tensor]
    direct: bool = False
    backend: str | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Where calls go this way. It is entered outside of what is timed."""
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = "1" if self.direct else "0"
        backend = self.backend and getattr(torch.nn.attention.SDPBackend, self.backend)
        try:
            with torch.nn.attention.sdpa_kernel(backend) if backend else contextlib.nullcontext():
                yield
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


PATHS = (Path("torch", "PyTorch", F.scaled_dot_product_attention),
         Path("torch-cudnn", "PyTorch (cuDNN)", F.scaled_dot_product_attention, backend="CUDNN_ATTENTION"),
         Path("dlpack", "torch_bridge by DLPack", scaled_dot_product_attention),
         Path("direct", "torch_bridge, direct", scaled_dot_product_attention, direct=True))


class _Case(NamedTuple):
    """Tensors of a problem, and what is done with them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    @classmethod
    def of(cls, shape: tuple[int, ...], device: str) -> "_Case":
        generator = torch.Generator(device).manual_seed(0)
        return cls(*(torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator).requires_grad_(i < 3)
                     for i in range(4)))

    def forward(self, path: Path) -> torch.Tensor:
        return path.attend(*self[:3], is_causal=True)

    def both(self, path: Path) -> list[torch.Tensor]:
        """out and the gradients."""
        out = self.forward(path)
        return [out, *torch.autograd.grad(out, self[:3], self.dout)]

    def clear(self) -> None:
        """Forgets gradients, which would be added up."""
        for x in self[:3]:
            x.grad = None


def _checked(case: _Case, paths: tuple[Path, ...], what: str) -> Iterator[tuple[Path, str]]:
    """Each path, and why it cannot be measured; empty if it can."""
    wanted = first_call.truth(case[:3], case.dout)
    for path in paths:
        reason = ""
        try:
            with path.taken(), warnings.catch_warnings():
                warnings.simplefilter("error", FallbackWarning)  # it would measure another path
                found = case.both(path)
            error = first_call.largest_error(found, wanted)
            reason = "" if error <= LIMIT else f"wrong: a relative error of {error:.1e}, more than {LIMIT:.1e}"
        except Exception as raised:  # whatever a path raises: the others are still to be measured
            reason = f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}"[:300]
        if reason:
            print(f"without {path.label}, {what}: {reason}", file=sys.stderr)
        yield path, reason


# The host's time -----------------------------------------------------------------------------------------------------

Turn = Callable[[Path, int], float]
"""(path, repeats) -> seconds of one."""


def _turns(case: _Case) -> dict[str, Turn]:
    def of(call: Callable[[Path], Any]) -> Turn:
        def turn(path: Path, repeats: int) -> float:
            begin = time.perf_counter()
            for _ in range(repeats):
                call(path)
            return (time.perf_counter() - begin) / repeats
        return turn

    def forward(path: Path, repeats: int) -> float:
        with torch.no_grad():
            return of(case.forward)(path, repeats)

    def backward(path: Path, repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            case.clear()
            out = case.forward(path)
            begin = time.perf_counter()
            out.backward(case.dout)
            total += time.perf_counter() - begin
        return total / repeats

    def step(path: Path) -> None:
        case.clear()
        case.forward(path).backward(case.dout)
    return {"forward": forward, "forward with gradient": of(case.forward), ".backward()": backward,
            "forward and .backward()": of(step), "forward and autograd.grad": of(case.both)}


def _interleaved(turn: Callable[[Path], float], paths: list[Path], rounds: int,
                 finish: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each path in every round, one after another, in the other direction in every second round."""
    found: dict[str, list[float]] = {path.name: [] for path in paths}
    for i in range(rounds + 1):
        for path in paths if i % 2 else reversed(paths):
            finish()
            with path.taken():
                seconds = turn(path)
            if i:  # the first round is for what is set up once
                found[path.name].append(seconds)
    finish()
    return found


def _records(what: str, unit: str, shape: tuple[int, ...], times: dict[str, list[float]]) -> Iterator[Record]:
    for path in PATHS:
        if path.name in times:
            mine = [seconds * 1e6 for seconds in times[path.name]]
            beside = times.get("torch")
            yield {"kind": "bridge-path", "what": what, "shape": list(shape), "path": path.name, "label": path.label,
                   unit: statistics.median(mine), f"{unit}_range": [min(mine), max(mine)],
                   "over_torch": timing.ratios(beside, times[path.name])._asdict() if beside else None}


def _refused(what: str, shape: tuple[int, ...], path: Path, reason: str) -> Record:
    return {"kind": "bridge-path", "what": what, "shape": list(shape), "path": path.name, "label": path.label,
            "reason": reason}


def _hosts(device: str, paths: tuple[Path, ...], rounds: int, repeats: int) -> Iterator[Record]:
    case = _Case.of(SMALL, device)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    checked = list(_checked(case, paths, "host time"))
    yield from (_refused("host", SMALL, *one) for one in checked if one[1])
    able = [path for path, reason in checked if not reason]
    for what, turn in _turns(case).items():
        times = _interleaved(lambda path, turn=turn: turn(path, repeats), able, rounds, finish)
        yield from _records(what, "host_us", SMALL, times)


# CUDA graphs ---------------------------------------------------------------------------------------------------------

class _Graph(NamedTuple):
    """A captured call, and the tensors that a replay fills."""

    graph: Any
    results: list[torch.Tensor]


def _captured(call: Callable[[], list[torch.Tensor]]) -> _Graph:
    """Raises where what a call does cannot be captured, or a replay gives other results than the call."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is set up in first calls may not be captured
            wanted = call()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    for x in results:
        x.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    error = first_call.largest_error(results, wanted)
    if not error <= LIMIT:
        raise ValueError(f"a replay differs from the call by {error:.1e}")
    return _Graph(graph, results)


def _calls(case: _Case) -> dict[str, Callable[[Path], list[torch.Tensor]]]:
    def forward(path: Path) -> list[torch.Tensor]:
        with torch.no_grad():
            return [case.forward(path)]
    return {"forward": forward, "forward and backward": case.both}


def _host_turn(graph: _Graph, repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        graph.graph.replay()
    return (time.perf_counter() - begin) / repeats


def _device_turn(graph: _Graph, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        graph.graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats / 1e3


def _graphs(shape: tuple[int, ...], paths: tuple[Path, ...], rounds: int, repeats: int) -> Iterator[Record]:
    """What replays cost: the host, if the problem is small, and the device."""
    case = _Case.of(shape, "cuda")
    checked = list(_checked(case, paths, "CUDA graphs"))
    yield from (_refused("graphs", shape, *one) for one in checked if one[1])
    able = [path for path, reason in checked if not reason]
    for what, call in _calls(case).items():
        graphs: dict[str, _Graph] = {}
        for path in able:
            try:
                with path.taken():
                    graphs[path.name] = _captured(lambda path=path, call=call: call(path))
            except Exception as error:  # a path that cannot be captured
                torch.cuda.synchronize()
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300]
                print(f"without {path.label}, graph of {what}: {reason}", file=sys.stderr)
                yield _refused(f"graph, {what}", shape, path, reason)
        turns = {"host_us": _host_turn, "device_us": _device_turn} if shape == SMALL else {"device_us": _device_turn}
        chosen = [path for path in able if path.name in graphs]
        for unit, turn in turns.items():
            one = lambda path, turn=turn, graphs=graphs: turn(graphs[path.name], repeats)
            times = _interleaved(one, chosen, rounds, torch.cuda.synchronize)
            yield from _records(f"graph, {what}", unit, shape, times)


# First calls ---------------------------------------------------------------------------------------------------------

def _first_calls(dims: list[int], folder: str, seconds: float) -> Iterator[Record]:
    """Of processes of their own: PyTorch's, DLPack's, and the direct path's without plans and then with them."""
    ways = (("torch", PATHS[0]), ("no plans", PATHS[3]), ("plans on disk", PATHS[3]), ("dlpack", PATHS[2]))
    for dim in dims:
        shape = (*SMALL[:3], dim)
        for way, path in ways:
            if way != "dlpack" or dim == dims[0]:
                yield {"kind": "bridge-first-call", "way": way, "path": path.name, "label": path.label,
                       "shape": list(shape), **_in_a_process(path, shape, folder, seconds)}


def _in_a_process(path: Path, shape: tuple[int, ...], folder: str, seconds: float) -> Record:
    """What `first_call` prints; a reason, if it does not end well."""
    variables = os.environ | {VARIABLE: str(int(path.direct)), PLANS: folder}
    called = "torch" if path.name == "torch" else "bridge"
    command = [sys.executable, "-m", "bench.first_call", called, *map(str, shape)]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=seconds, check=True)
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or ""
        said = said if isinstance(said, str) else said.decode(errors="replace")
        return {"reason": f"{type(error).__name__}: {said[-300:]}"}
    found: Record = json.loads(done.stdout.splitlines()[-1])
    if path.direct and found["warnings"]:
        return {"reason": found["warnings"][0][:300]}
    return found if found["error"] <= LIMIT else {"reason": f"wrong: a relative error of {found['error']:.1e}"}


def measure(dims: list[int], rounds: int, repeats: int) -> Iterator[Record]:
    """All records. Plans are made in a folder that is empty before and gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="plans-") as folder:
        os.environ[PLANS] = folder
        yield from _first_calls(dims, folder, 120.0)
        yield from _hosts("cuda", PATHS, rounds, repeats)
        yield from _graphs(SMALL, PATHS, rounds, repeats)
        yield from _graphs(LARGE, PATHS[:2] + PATHS[3:], rounds, 5)


def why_not() -> str:
    """Why nothing can be measured here; empty if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU here"
    found = torch.cuda.get_device_capability()
    return "" if found == (9, 0) else f"the GPU here has compute capability {found[0]}.{found[1]}"


def _asked_for(arguments: argparse.Namespace) -> Iterator[Record]:
    if arguments.hosts:
        from bench import bridge_hosts  # which is made from this

        return bridge_hosts.measure("cuda", max(arguments.rounds, 31), arguments.repeats)
    if not arguments.kinds:
        return measure(arguments.dims, arguments.rounds, arguments.repeats)
    from bench import bridge_kinds  # which is made from this

    return bridge_kinds.measure("cuda", min(arguments.rounds, 7), arguments.repeats)


def main() -> None:
    """Prints the records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=lambda text: [int(x) for x in text.split(",")], default=[64, 128],
                        help="head sizes of first calls (default: 64,128)")
    parser.add_argument("--kinds", action="store_true", help="the kinds of calls by both ways, in about 50 s")
    parser.add_argument("--hosts", action="store_true", help="the host's time alone, of PyTorch and the direct path, "
                        "eager and compiled, in about 45 s")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=30, help="calls a turn")
    parser.add_argument("--out", type=pathlib.Path, help="also append the records to a file of this folder, such as "
                        "bench/results")
    arguments = parser.parse_args()
    if reason := why_not():
        raise SystemExit(f"bench.bridge_paths measures on a GPU of compute capability 9.0 (H100, H200): {reason}. "
                         "Run it there, with jax[cuda13] and a PyTorch for CUDA 13.")
    where = environment.describe()
    for record in _asked_for(arguments):
        print(json.dumps(record), flush=True)
        if arguments.out:
            records.append(arguments.out / records.file_name(where), {"environment": where} | record)


if __name__ == "__main__":
    main()
