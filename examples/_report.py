"""How the training examples report: two training runs compared, plotted, and written as JSON."""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

COMPARED_STEPS = 100
"""Training amplifies rounding, so two right runs drift apart: only so many steps are held to the tolerance."""

WARM_UP = 3
"""Steps before the clock starts: the first compiles, and those after it may still load kernels and record them."""

TOLERANCE = {"float32": 1e-2, "bfloat16": 1e-1}
"""Largest difference allowed between the losses of two runs, in nats a token, by the type of the activations."""


@dataclass
class Run:
    """One training run: losses in nats a token, speed without the steps that warm up."""

    attention: str
    losses: list[float] = field(default_factory=list)
    held_out_loss: float = float("nan")
    tokens_per_second: float = float("nan")

    def measure(self, args: argparse.Namespace, start: float) -> None:
        """Sets the speed, at the end of the last step, before anything else is compiled or done; `start` is
        `time.perf_counter()` at the end of the warm-up.
        """
        timed = args.steps - WARM_UP
        if timed > 0:
            self.tokens_per_second = timed * args.batch * args.context / (time.perf_counter() - start)


def max_difference(a: Run, b: Run, steps: int | None = None) -> float:
    """Largest difference between the losses of the same step, over the first `steps` of them."""
    return float(np.max(np.abs(np.subtract(a.losses[:steps], b.losses[:steps]))))


def compare(a: Run, b: Run, dtype: str) -> str:
    """A line on how far apart two runs are; AssertionError if that is more than rounding explains."""
    early = max_difference(a, b, COMPARED_STEPS)
    steps = min(COMPARED_STEPS, len(a.losses))
    line = f"largest difference of losses: {early:.1e} in the first {steps} steps, {max_difference(a, b):.1e} in all"
    assert early < TOLERANCE[dtype], f"{line}, expected less than {TOLERANCE[dtype]} in the first {steps}"
    return line


def save_plot(path: str, runs: list[Run], title: str) -> None:
    """The loss of every run over the steps and, of two runs, their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [3, 1] if len(runs) == 2 else [1]
    figure, axes = pyplot.subplots(
        len(rows), sharex=True, squeeze=False, figsize=(7, 5), height_ratios=rows, layout="constrained"
    )
    for run, style in zip(runs, [dict(linewidth=3, alpha=0.5), *[dict(linewidth=1, linestyle="--")] * len(runs)]):
        axes[0, 0].plot(run.losses, label=f"{run.attention} (held-out text: {run.held_out_loss:.3f})", **style)
    axes[0, 0].set(title=title, ylabel="loss, nats per character")
    axes[0, 0].legend(frameon=False)
    if len(runs) == 2:
        difference = np.abs(np.subtract(runs[0].losses, runs[1].losses))
        axes[1, 0].semilogy(np.where(difference > 0, difference, np.nan), ".", color="black", markersize=2)
        axes[1, 0].set(ylabel="|difference|")
    axes[-1, 0].set(xlabel="step")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"loss plot: {path}")


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def save_json(path: str, args: argparse.Namespace, device: str, runs: list[Run]) -> None:
    """Appends one JSON line a run, which `python -m bench report` takes for a record: where and when, the settings of
    the model and its training, the speed, the losses.
    """
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "save_plot")}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch") if _is_installed(name)}
    environment = {"time": now, "device": device, "versions": versions}
    with open(path, "a", encoding="utf-8") as file:
        for run in runs:
            file.write(json.dumps({"kind": "training", "environment": environment, **settings, **asdict(run)}) + "\n")


def finish(runs: list[Run], args: argparse.Namespace, device: str) -> None:
    """Prints each run, saves what the options ask for, and compares the losses of the first with the others'."""
    for run in runs:
        print(
            f"{run.attention}: {run.tokens_per_second:,.0f} tokens/s after {WARM_UP} steps, "
            f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f} nats per character, "
            f"on held-out text {run.held_out_loss:.3f}"
        )
    if args.json:
        save_json(args.json, args, device, runs)
    save_plot(args.save_plot, runs, f"GPT of {args.layers} layers, context {args.context}, {args.dtype}, with {device}")
    for other in runs[1:]:
        print(f"{runs[0].attention} and {other.attention}: {compare(runs[0], other, args.dtype)}")
