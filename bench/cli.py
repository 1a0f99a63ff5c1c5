"""The command line: python -m bench run | host | tune | report | peers.

  run      times problems of the catalogue, ours and peers side by side; one JSON line a measurement in bench/results/
  host     the host's share of a call, on a problem too small for a device
  tune     sweeps the legal schedules of one of our implementations on a problem
  report   writes the tables of README.md and docs/benchmarks.md, and the plots, from the records
  peers    downloads FlashAttention-3 and Tokamax into .peers/
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
PEERS_FOLDER = ROOT / ".peers"
PAGES = ("README.md", "docs/benchmarks.md")

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    words = lambda text: text.split(",")

    run = commands.add_parser("run", help="time problems, ours and peers side by side")
    run.add_argument("--problems", type=words, metavar="GLOB,...", help="names or tags (default: gpu; cpu with --cpu)")
    run.add_argument("--direction", type=words, default=["forward", "backward", "both"], metavar="NAME,...")
    run.add_argument("--rounds", type=int, default=9)
    run.add_argument("--burst-ms", type=float, default=10.0, help="milliseconds of calls in a row (default: 10)")
    run.add_argument("--jobs", type=int, default=1, metavar="N",
                     help="processes that compile side by side; one at a time has the device (default: 1)")
    run.add_argument("--cpu", action="store_true", help="on the CPU, whatever devices there are")
    run.add_argument("--memory", action="store_true", help="record memory only: nothing runs, nothing is timed")
    run.add_argument("--list", action="store_true", help="print problems and contestants, and stop")

    tune = commands.add_parser("tune", help="sweep legal schedules")
    tune.add_argument("kernel", choices=["forward", "backward"])
    tune.add_argument("--impl", help="which of ours (default: the one that would run here)")
    tune.add_argument("--problems", type=words, default=["matrix"], metavar="GLOB,...")
    tune.add_argument("--rounds", type=int, default=5)
    tune.add_argument("--burst-ms", type=float, default=10.0)
    tune.add_argument("--cross", type=words, default=[], metavar="FIELD,...",
                      help="all combinations of these fields (default: each field alone)")

    host = commands.add_parser("host", help="the host's share of a call")
    for command in (run, host):
        command.add_argument("--impl", type=words, default=["all"], metavar="NAME,...", help="which of ours")
        command.add_argument("--peers", type=words, default=["all"], metavar="NAME,...", help="which, all or none")
    for command in (run, host, tune):
        command.add_argument("--out", type=pathlib.Path, help="folder of the records (default: bench/results)")

    report = commands.add_parser("report", help="write tables and plots from records")
    report.add_argument("--results", type=pathlib.Path, help="folder of the records (default: bench/results)")
    report.add_argument("--pages", type=pathlib.Path, nargs="+", default=[ROOT / page for page in PAGES],
                        help=f"files with generated blocks (default: {' and '.join(PAGES)})")
    report.add_argument("--images", type=pathlib.Path, default=ROOT / "docs" / "images")

    peers = commands.add_parser("peers", help="download FlashAttention-3 and Tokamax")
    peers.add_argument("folder", type=pathlib.Path, nargs="?", default=PEERS_FOLDER)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs one command."""
    args = _parser().parse_args(argv)
    # Read by JAX when it starts: peers share the device's memory, and only --cpu leaves the GPU alone.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if getattr(args, "cpu", False):
        os.environ["JAX_PLATFORMS"] = "cpu"
    if (PEERS_FOLDER / "site").is_dir():
        sys.path.append(str(PEERS_FOLDER / "site"))
    {"run": _run, "host": _host, "tune": _tune, "report": _report, "peers": _peers}[args.command](args)


def _peers(args: argparse.Namespace) -> None:
    from bench import get_peers
    print(f"put this on PYTHONPATH (.peers/site is found without): {get_peers.get(args.folder)}")


def _report(args: argparse.Namespace) -> None:
    from bench import records, report
    for line in report.write(records.read(args.results or records.RESULTS), args.pages, args.images):
        print(line)


def _contestants(args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Ours and the peers that are installed; the others get a line."""
    import bench.plain
    import bench.torch_contestants  # noqa: F401  (both add themselves to the peers)
    from bench import contestants
    ours, peers = contestants.find(args.impl, list(contestants.OURS)), contestants.find(args.peers, contestants.PEERS)
    for peer in peers:
        if peer.missing():
            print(f"without {peer.label}: {peer.missing()}")
    return ours, [peer for peer in peers if not peer.missing()]


def _bar(total: int) -> tuple[Callable[[], Any], Callable[[str], Any], Callable[[str], Any]]:
    """A progress bar: functions that advance it, print a line above it, and name what is being done."""
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda: None, print, print
    bar = tqdm(total=total, unit="round", dynamic_ncols=True)
    return bar.update, bar.write, lambda text: bar.set_description(text)


def _out(args: argparse.Namespace, environment: dict[str, Any]) -> pathlib.Path:
    from bench import records
    return (args.out or records.RESULTS) / records.file_name(environment)


def _run(args: argparse.Namespace) -> None:
    from bench import environment, jobs, run
    from pallas_flash.testing import problems
    ours, peers = _contestants(args)
    passes = _passes(args)
    if args.list:
        for problem in dict.fromkeys(problem for chosen, _, _ in passes for problem in chosen):
            print(f"{problem.name:24} {problem.spec()}  ({problem.source})")
        print("ours:", ", ".join(c.name for c in ours), " peers:", ", ".join(c.name for c in peers))
        return
    if not args.memory and (reason := environment.busy()):
        print(f"warning: {reason}", file=sys.stderr)
    common, lock = {"environment": environment.describe()}, jobs.DeviceLock()
    if any(options.timed for _, _, options in passes):
        with lock:
            common["matmul_flops"] = run.matmul_peak()
    path = _out(args, common["environment"])
    tasks = [jobs.Task(problem.name, directions, options) for chosen, directions, options in passes
             for problem in chosen]
    advance, say, name = _bar(sum(len(task.directions) * task.options.rounds * task.options.timed for task in tasks))
    left_out = _leaver(path, common, say)
    events = {"round": lambda _: advance(), "left out": lambda reason: left_out(*reason),
              "records": lambda measured: _write(path, measured, say)}
    if args.jobs > 1:
        setting = jobs.Setting([c.name for c in ours] or ["none"], [c.name for c in peers] or ["none"], common)
        missing = jobs.share(tasks, args.jobs, lambda kind, content: events[kind](content), jobs.measure, setting)
    else:
        missing, hooks = {}, run.Hooks(lambda *reason: events["left out"](reason), advance, lock)
        for problem, directions, options in tasks:
            name(problem)
            for measured in run.measure(problems.find(problem), ours, peers, directions, options, common, hooks):
                events["records"](measured)
    say(f"records: {path}")
    if missing:
        raise SystemExit("".join(f"not measured to the end: {name}: {reason}\n" for name, reason in missing.items()))


def _write(path: pathlib.Path, measured: list[dict[str, Any]], say: Callable[[str], Any]) -> None:
    from bench import records
    for record in measured:
        records.append(path, record)
    for line in _summary(measured):
        say(line)


def _leaver(path: pathlib.Path, common: dict[str, Any], say: Callable[[str], Any]) -> Callable[..., None]:
    """Says who is left out; of a feature it is a record too who cannot run it, and why."""
    from bench import records
    from pallas_flash.testing import problems

    def leave(problem: str, direction: str, label: str, reason: str) -> None:
        if problems.find(problem).plain:
            records.append(path, common | dict(kind="left out", problem=problem, direction=direction, label=label,
                                               reason=reason))
        _left_out(say, problem, direction, label, reason)
    return leave


def _passes(args: argparse.Namespace) -> list[tuple[list[Any], list[str], Any]]:
    """(problems, directions, options) to run one after the other."""
    from bench import run
    from pallas_flash.testing import problems
    timed = run.Options(args.rounds, args.burst_ms / 1000)
    memory = (["forward", "both"], timed._replace(timed=False))  # a backward alone would have to run the forward
    chosen = problems.select(args.problems or ["speed" if args.cpu else "gpu"])
    if not chosen:
        raise SystemExit(f"no problem like {args.problems}; python -m bench run --list --problems '*' shows all")
    if args.memory:
        return [(chosen, *memory)]
    passes = [(chosen, args.direction, timed)]
    return passes if args.problems or not args.cpu else [*passes, (problems.select(["cpu"]), *memory)]


def _left_out(say: Callable[[str], Any], problem: str, direction: str, label: str, reason: str) -> None:
    """Says of each contestant once for what reason it is left out, with the first problem where it was."""
    if (label, reason) not in _SAID:
        _SAID.add((label, reason))
        say(f"without {label} ({problem}, {direction}): {reason}")


_SAID: set[tuple[str, str]] = set()


def _summary(measured: list[dict[str, Any]]) -> Iterator[str]:
    for record in measured:
        text = f"  {record['problem']:22} {record['direction']:8} {record['label']:22}"
        if "median_us" in record:
            text += f" {record['median_us']:10.1f} us {record['tflops']:7.3g} TFLOP/s"
            text += f", {record['chained']} in a chain" if record["chained"] else ""
            text += f", not in a chain: {record['not_chained']}" if "not_chained" in record else ""
            text += "".join(f"  {ratio['median']:.3f} x {mine}'s time" for mine, ratio in record["ratio_to"].items())
        if record["extra_bytes"] is not None:
            text += f"  {record['extra_bytes'] / 2**20:9.1f} MiB"
        yield text


def _host(args: argparse.Namespace) -> None:
    from bench import environment, host, records
    ours, peers = _contestants(args)
    common = {"environment": environment.describe()}
    for record in host.measure([*ours, *peers], common):
        records.append(_out(args, common["environment"]), record)
        print(f"{record['label']:24} {record['direction']:8} {record['host_us']:8.1f} us a call")


def _tune(args: argparse.Namespace) -> None:
    from bench import environment, records, tune
    from pallas_flash.testing import problems
    common = {"environment": environment.describe()}
    path = _out(args, common["environment"])
    for problem in problems.select(args.problems):
        target = tune.Target(_tuned(args.impl, problem), args.kernel, problem)
        candidates = tune.candidates(target, args.cross)
        advance, say, name = _bar(len(candidates))
        name(f"{target.implementation} {args.kernel} {problem.name}")
        found = tune.sweep(target, candidates, args.rounds, args.burst_ms / 1000, common, say, advance)
        for record in found:
            records.append(path, record)
        for line in tune.rows(found):
            say(line)


def _tuned(name: str | None, problem: Any) -> str:
    """The implementation to tune: the one named, or the one that runs a problem here."""
    from bench import tune
    from pallas_flash import device, dispatch
    name = name or dispatch.decide(problem.spec(), device.current()).implementation.name
    if name not in tune.TUNABLE:
        raise SystemExit(f"{name} has one schedule only; others can be tried of {', '.join(tune.TUNABLE)}")
    return str(name)
