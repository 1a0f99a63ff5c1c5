"""`python -m pallas_flash check`, on a CPU that stands for a GPU: what it says of right, wrong and failing kernels."""

import dataclasses
import re
import subprocess

import jax.numpy as jnp
import pytest

from pallas_flash import check, device, masks

SMALL = check.Call("causal, small", 16, 24, 2, options=dict(mask=masks.Causal()))


@pytest.fixture
def fake_a100(monkeypatch):
    """A card on which `xla` stands for kernels, and one small call and benchmark for all."""
    monkeypatch.setattr(device, "default", lambda: device.A100)
    monkeypatch.setattr(check, "KERNELS", ("xla",))
    monkeypatch.setattr(check, "CALLS", (SMALL,))


def test_right_kernels(fake_a100, capsys):
    assert check.main(["--quick"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert (lines[0], lines[-2:]) == ("```text", ["all right", "```"])
    assert lines[1] == "NVIDIA A100-SXM4-80GB, compute capability 8.0, 108 SMs"
    assert all(any(line.startswith(start) for line in lines) for start in ("driver ", "ptxas ", "jax ", "jaxlib "))
    (errors,) = (line for line in lines if SMALL.name in line)
    assert len(errors.split(": ")[1].split()) == len(check.RESULTS)
    assert errors.strip() in err and "paste" in err


def test_times(fake_a100, capsys, monkeypatch):
    monkeypatch.setattr(check, "CALLS", ())
    monkeypatch.setattr(check, "BENCHMARKS", (check.Call("causal", 8, 16), check.Call("too large", 4, 16)))
    monkeypatch.setattr(check, "TOKENS", 32)
    monkeypatch.setattr(check, "COLUMNS", 16)
    monkeypatch.setattr(check, "BURST", 0.001)

    def attend(q, k, v, **_):
        if q.shape[-1] == 4:
            raise MemoryError("of the GPU")
        return q + k * v

    monkeypatch.setattr(check.attention, "flash_attention", attend)
    assert check.main([]) == 0
    first, second = capsys.readouterr().out.splitlines()[-4:-2]
    assert re.fullmatch(r"  d 8, length 16: [\d.]+ \([\d.]+\) \| [\d.]+ \([\d.]+\)", first)
    assert second == "  d 4, length 16: MemoryError: of the GPU"


def test_wrong_numbers_are_said(fake_a100, capsys, monkeypatch):
    def results(implementation, call, arrays):
        out, lse, dq, dk, dv = (jnp.ones(3) for _ in check.RESULTS)
        return out, lse, dq, dk * (1.05 if implementation == "xla" else 1), dv

    monkeypatch.setattr(check, "_results", results)
    assert check.main(["--quick"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and "TFLOP/s" not in out and "FAILED" in out.splitlines()[-2]


def test_gradients_that_must_repeat_are_computed_twice(fake_a100, capsys, monkeypatch):
    runs = []

    def results(implementation, call, arrays):
        runs.append(implementation)
        return [jnp.ones(3) + 1e-6 * len(runs)] * len(check.RESULTS)

    calls = SMALL, dataclasses.replace(SMALL, options=SMALL.options | dict(deterministic=True))
    monkeypatch.setattr(check, "CALLS", calls)
    monkeypatch.setattr(check, "_results", results)
    assert check.main(["--quick"]) == 1
    assert runs == ["xla", "reference", "xla", "xla", "reference"]
    out = capsys.readouterr().out
    assert out.count("DOES NOT REPEAT") == 1 and "WRONG" not in out


def test_not_finite_is_wrong():
    x = jnp.ones(4)
    assert check._errors([x, x.at[1].set(jnp.nan)], [x, x], "bfloat16") == [0.0, float("inf")]


def test_what_raises_is_a_line(fake_a100, capsys, monkeypatch):
    """The rest is still checked."""
    def results(implementation, call, arrays):
        if call is not SMALL:
            raise ValueError("no such layout\nmore")
        return [jnp.ones(3)] * len(check.RESULTS)

    monkeypatch.setattr(check, "CALLS", (dataclasses.replace(SMALL, name="bad"), SMALL))
    monkeypatch.setattr(check, "_results", results)
    assert check.main(["--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line == "  bad: ValueError: no such layout" for line in lines)
    assert any(line.startswith(f"  {SMALL.name}: 0.") for line in lines)


def test_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(device, "default", lambda: device.CPU)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert check.main([]) == 1
    assert "nothing to check: there is no NVIDIA GPU" in capsys.readouterr().out


def test_where_jax_does_not_start(capsys, monkeypatch):
    """The plugin ends the process where it finds no driver: a child, not this one."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -11, "", "no driver\n"))
    assert check.main([]) == 1
    assert "JAX does not start (exit code -11: no driver)" in capsys.readouterr().out


@pytest.mark.parametrize(("gpu", "names"), [
    (device.A100, ["ampere"]), (device.RTX_5090, ["ampere"]), (device.H200, ["hopper", "ampere"]),
    (dataclasses.replace(device.A100, name="Tesla T4", capability=(7, 5)), [])], ids=lambda x: getattr(x, "name", ""))
def test_which_kernels_are_checked(gpu, names):
    found, reasons = check._kernels(gpu)
    assert found == names
    assert len(reasons) == 2 - len(names)


def test_a_card_that_no_kernel_runs_on(capsys, monkeypatch):
    monkeypatch.setattr(check, "_missing", lambda: None)
    monkeypatch.setattr(device, "default", lambda: dataclasses.replace(device.A100, name="T4", capability=(7, 5)))
    assert check.main([]) == 1
    out = capsys.readouterr().out
    assert "no kernel runs on this card" in out and out.splitlines()[-2] == "nothing was checked"


def test_other_arguments_are_refused():
    with pytest.raises(SystemExit):
        check.main(["--implementation", "reference"])


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_on_this_card(capsys, monkeypatch):
    """A part of the calls: all of them took longer than 300 seconds beside twelve other processes, and the test process
    was ended. What each feature computes, test_gpu checks.
    """
    monkeypatch.setattr(check, "CALLS", [check.CALLS[0], check.CALLS[4]])
    assert check.main(["--quick", "--implementation", "ampere"]) == 0, capsys.readouterr().out
