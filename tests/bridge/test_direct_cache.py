"""Plans on disk: made once by whoever comes first, whole or not there, and made again where they are damaged.

What makes them is a stand-in that needs no compiler, of which each run leaves a mark.
"""

import concurrent.futures
import dataclasses
import fcntl
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridge.direct import FORWARD, PROGRAM
from torch_bridge.direct import cache, parent, plan, progress

ROOT = Path(__file__).parents[2]
MAKER = """
import json, os, sys, time, types
for name, place in dict(torch_bridge="torch_bridge", bridge="tests/bridge").items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [place]
from bridge.direct import PROGRAM
from torch_bridge.direct import plan
text = sys.stdin.readline().rstrip()
open(os.environ["MARKS"], "a").write("made\\n")
time.sleep(float(os.environ.get("SLOWLY", 0)))
print("what a library says", 17, "null", sep="\\n", flush=True)
os.write(2, b"\\xff, which is no text: ")
{}
"""
WRITES = """
open(sys.argv[2], "wb").write(plan.write(PROGRAM, text))
print(json.dumps(dict(step="half")), flush=True)
print(json.dumps(dict(done=True)))
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """How many plans were made; they lie in plans."""
    marks = tmp_path / "marks"
    monkeypatch.setenv("MARKS", str(marks))
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "plans"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(parent, "_failed", [])
    maker(monkeypatch, WRITES)
    return lambda: len(marks.read_text().split()) if marks.exists() else 0


def maker(monkeypatch, ending):
    monkeypatch.setattr(parent, "COMMAND", (sys.executable, "-c", MAKER.format(ending)))


def test_a_plan_is_made_once_and_found_afterwards(made):
    assert cache.find(FORWARD, 0) == PROGRAM == cache.find(FORWARD, 0)
    assert made() == 1
    assert cache.find(dataclasses.replace(FORWARD, pass_name="backward"), 0) == PROGRAM
    assert made() == 2
    assert {path.suffix for path in cache.directory().iterdir()} == {".plan"}, "nothing else is left"
    assert cache.directory().stat().st_mode & 0o077 == 0, "what others could write would run on the GPU"


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:-1], lambda content: content[:100] + b"?" + content[101:],
    lambda content: plan.write(PROGRAM, "{}"),
], ids=["empty", "cut off", "changed", "another's"])
def test_a_damaged_plan_is_made_again(made, damage):
    cache.find(FORWARD, 0)
    path = cache.path_of(FORWARD)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.find(FORWARD, 0) == PROGRAM and made() == 2
    assert plan.read(path.read_bytes(), FORWARD.text) == PROGRAM


def test_threads_make_it_once(made, monkeypatch):
    monkeypatch.setenv("SLOWLY", "0.2")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: cache.find(FORWARD, 0), range(4))) == [PROGRAM] * 4
    assert made() == 1


FINDER = """
import sys, types
sys.modules["torch_bridge"] = types.ModuleType("torch_bridge")
sys.modules["torch_bridge"].__path__ = ["torch_bridge"]
from torch_bridge.direct import cache, parent
from torch_bridge.direct.problem import Request
parent.COMMAND = (sys.executable, "-c", sys.argv[2])
print(len(cache.find(Request.of(sys.argv[1]), 0).steps), "jax" in sys.modules)
"""


def test_processes_make_it_once_and_import_no_jax(made, monkeypatch):
    monkeypatch.setenv("SLOWLY", "0.3")
    started = [subprocess.Popen([sys.executable, "-c", FINDER, FORWARD.text, MAKER.format(WRITES)], text=True,
                                stdout=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[0].split() for process in started] == [["3", "False"]] * 3
    assert made() == 1


def test_why_there_is_none_is_said(made, monkeypatch):
    maker(monkeypatch, 'print(json.dumps(dict(reason="needs another JAX")))')
    with pytest.raises(parent.NoPlanError, match=r"^needs another JAX$"):
        cache.find(FORWARD, 0)
    maker(monkeypatch, 'print(json.dumps(dict(step="lowered"))); sys.exit("the compiler broke")')
    with pytest.raises(parent.NoPlanError, match=r"forward of Problem.*code 1 after .*lowered.*\n.*the compiler broke"):
        cache.find(FORWARD, 0)
    maker(monkeypatch, "os.abort()")
    with pytest.raises(parent.NoPlanError, match="code -6 after nothing"):
        cache.find(FORWARD, 0)
    assert not list(cache.directory().iterdir()), "nothing is left of a plan that could not be made"


def test_a_problem_that_is_no_list_of_launches_is_asked_once(made, monkeypatch):
    """Each process started another that imported JAX to say so."""
    maker(monkeypatch, 'print(json.dumps(dict(reason="takes head dims up to 256, got d=512", problem=True)))')
    for _ in range(2):
        with pytest.raises(parent.NoLaunchesError, match=r"^takes head dims up to 256, got d=512$"):
            cache.find(FORWARD, 0)
    assert made() == 1


def test_a_compiler_that_always_fails_is_given_up(made, monkeypatch):
    """Every new problem would take seconds to say the same."""
    maker(monkeypatch, 'sys.exit("no ptxas")')
    for _ in range(parent.MAX_FAILURES):
        with pytest.raises(parent.NoPlanError, match=r"^the process that compiles"):
            cache.find(FORWARD, 0)
    for _ in range(2):
        with pytest.raises(parent.NoPlanError, match=r"^3 processes in a row that should compile.*(?s:.)*no ptxas"):
            cache.find(FORWARD, 0)
    assert made() == parent.MAX_FAILURES


def test_a_directory_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(cache.VARIABLE, "~/plans")
    assert cache.directory() == tmp_path / "plans"


def test_a_directory_that_cannot_be_written(made, tmp_path, monkeypatch):
    """The error was the system's alone, and did not say what to do. A file is in its place: root may write anywhere."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "plans"))
    with pytest.raises(parent.NoPlanError, match=r"be read and written, got .*file.*Name one in PALLAS_FLASH_PLANS"):
        cache.find(FORWARD, 0)
    assert made() == 0


def test_a_directory_that_may_not_be_searched_keeps_nothing(made, monkeypatch):
    """Asked whether a file is in there, Python raises. Root may search everything, so that error is made here."""
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))
    assert not cache.is_kept(FORWARD)
    cache.find(FORWARD, 0)
    assert cache.is_kept(FORWARD)
    monkeypatch.setattr(Path, "exists", refuse)
    assert not cache.is_kept(FORWARD)


def test_what_is_made_meanwhile_is_waited_for_and_shown(made, monkeypatch, capsys):
    monkeypatch.setenv("SLOWLY", "1.2")
    pending = cache.Pending(FORWARD, 0)
    assert pending.result() == PROGRAM and made() == 1
    assert "compiling the forward" in capsys.readouterr().err
    maker(monkeypatch, 'sys.exit("broken")')
    pending = cache.Pending(dataclasses.replace(FORWARD, pass_name="backward"), 0)
    for _ in range(2):
        with pytest.raises(parent.NoPlanError, match="broken"):
            pending.result()


def test_one_is_made_meanwhile_at_a_time_and_none_is_waited_for_that_nobody_needs(made, monkeypatch):
    """Calls of many lengths, whose backwards never came, started a process each."""
    monkeypatch.setenv("SLOWLY", "60")
    requests = [dataclasses.replace(FORWARD, versions={"test": str(i)}) for i in range(4)]
    pending = [cache.Pending(request, 0) for request in requests]
    while not made():
        time.sleep(0.01)
    monkeypatch.setenv("SLOWLY", "0")
    assert pending[3].result() == PROGRAM and made() == 2 and not pending[0]._found.done()
    parent._end_children()
    with pytest.raises(parent.NoPlanError, match="code -9"):
        pending[0].result()
    assert [x.result() for x in pending[1:]] == [PROGRAM] * 3


LEAVES = """
import sys, threading, time, types
sys.modules["torch_bridge"] = types.ModuleType("torch_bridge")
sys.modules["torch_bridge"].__path__ = ["torch_bridge"]
from torch_bridge.direct import cache, parent
from torch_bridge.direct.problem import Request
parent.COMMAND = (sys.executable, "-c", sys.argv[2])
cache.Pending(Request.of(sys.argv[1]), 0)
while not parent._children:
    time.sleep(0.01)
((_, child),) = parent._children
print(child.pid)
"""


def test_a_process_that_ends_waits_for_no_plan_and_leaves_no_child(made, monkeypatch):
    """It waited until the plan of a backward was there that nobody asked for."""
    monkeypatch.setenv("SLOWLY", "60")
    done = subprocess.run([sys.executable, "-c", LEAVES, FORWARD.text, MAKER.format(WRITES)], text=True, timeout=20,
                          capture_output=True, check=True)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(done.stdout), 0)
            time.sleep(0.05)
    assert not list(cache.directory().glob(".new-*"))


def test_who_waits_for_another_process_is_told(made, monkeypatch, capsys):
    """Seven of the eight processes of a machine waited in silence."""
    monkeypatch.setenv("SLOWLY", "1.3")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.find, FORWARD, 0, quiet=True)
        while not (cache.directory() / f"{FORWARD.key}.lock").exists():
            time.sleep(0.01)
        assert cache.find(FORWARD, 0) == first.result() == PROGRAM
    assert made() == 1 and "compiling the forward" in capsys.readouterr().err


def test_a_plan_that_never_comes(made, monkeypatch):
    monkeypatch.setenv("SLOWLY", "60")
    monkeypatch.setattr(parent, "MAX_SECONDS", 0.3)
    with pytest.raises(parent.NoPlanError, match=r"more than 0.3 s"):
        cache.find(FORWARD, 0)


def test_a_child_that_has_ended_is_not_waited_for_though_its_pipe_is_open(made, monkeypatch):
    """A process that another thread forks while a child is started has its pipes open, and was waited for, too."""
    maker(monkeypatch, 'import subprocess; subprocess.Popen(["sleep", "12"])\n' + WRITES)
    start = time.monotonic()
    assert cache.find(FORWARD, 0) == PROGRAM
    assert time.monotonic() - start < 10


def test_an_interrupt_of_the_terminal_ends_no_child(made, monkeypatch):
    """Ctrl-C, and a notebook's button, reach every process of a group. What was made meanwhile failed, and its
    problem went through DLPack as long as the process lived.
    """
    maker(monkeypatch, "print(json.dumps(dict(reason=str(os.getpgid(0) == os.getpid()))))")
    with pytest.raises(parent.NoPlanError, match=r"^True$"):
        cache.find(FORWARD, 0)


def test_the_child_finds_the_packages_of_its_parent(tmp_path):
    """With PYTHONSAFEPATH the first folder of PYTHONPATH gave way to the package's own."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['alone'](); print(*sys.path, sep='\\n')"
    done = subprocess.run([sys.executable, "-P", "-c", code, parent.COMMAND[1]], capture_output=True, text=True,
                          check=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.stdout.splitlines()[:2] == [str(ROOT), str(tmp_path)]


def test_what_everyone_may_write_is_not_run(made):
    cache.find(FORWARD, 0)
    for mode in (0o777, 0o1777):
        cache.directory().chmod(mode)
        with pytest.raises(parent.NoPlanError, match=r"must not be writable by everyone.*got .*plans, drwxrwx.*chmod"):
            cache.find(FORWARD, 0)
    cache.directory().chmod(0o755)
    assert cache.find(FORWARD, 0) == PROGRAM and made() == 1


def test_nobody_else_writes_to_a_plan_whatever_the_umask(made):
    before = os.umask(0)
    try:
        cache.find(FORWARD, 0)
    finally:
        os.umask(before)
    assert cache.path_of(FORWARD).stat().st_mode & 0o777 == 0o644


def test_jaxs_settings_of_the_parent_have_no_part_in_a_plan(made, monkeypatch):
    """They are not in its key."""
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    maker(monkeypatch, 'print(json.dumps(dict(reason=str({k: v for k, v in os.environ.items() if k[:4] == "JAX_"}))))')
    with pytest.raises(parent.NoPlanError, match=r"^{'JAX_PLATFORMS': 'cpu'}$"):
        cache.find(FORWARD, 0)


def test_a_lock_is_given_back_though_a_forked_process_has_it_open(tmp_path, monkeypatch):
    """Whoever waits for it would wait until that process ends. A file that is not closed stands for the other's."""
    kept = []
    with monkeypatch.context() as patch:
        with cache._locked(tmp_path / "lock", progress.Progress("")):
            waiting = os.open(tmp_path / "lock", os.O_RDWR)
            with pytest.raises(BlockingIOError):
                fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
            patch.setattr(os, "close", kept.append)
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert len(kept) == 1
    for file in (waiting, *kept):
        os.close(file)


def test_where_plans_are_kept(monkeypatch):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.directory() == Path("/somewhere/pallas_flash/plans")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache.directory() == Path.home() / ".cache/pallas_flash/plans"
    monkeypatch.setattr(Path, "home", lambda: Path("~no-such-user").expanduser())
    with pytest.raises(parent.NoPlanError, match=r"has no home directory.*Name a directory in PALLAS_FLASH_PLANS"):
        cache.directory()
    monkeypatch.setenv(cache.VARIABLE, "/of/mine")
    assert cache.directory() == Path("/of/mine")


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_more_than_a_second_is_not_silent(capsys, monkeypatch, has_tqdm):
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress.Progress("compiling") as shown:
        shown.wait("soon")
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress.time, "monotonic", lambda: shown._next + 0.1)
        shown.wait("lowered")
    assert "pallas_flash: compiling" in capsys.readouterr().err


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_a_process_without_a_standard_error(made, monkeypatch, capsys, has_tqdm):
    """Python started with it closed, as daemons are: tqdm's error reached the caller, or lines the standard output."""
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", None)
    assert cache.find(FORWARD, 0) == PROGRAM and capsys.readouterr().out == ""


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_a_closed_standard_error_stops_nothing(made, monkeypatch, has_tqdm):
    """It was taken for a directory that cannot be written."""
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")
    if not has_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", Closed())
    assert cache.find(FORWARD, 0) == PROGRAM
