"""What conftest and .ci/task do beside the tests."""

import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import compiler
from jax._src.lib import xla_client

from tests import compilation, conftest


def test_programs_are_freed_before_there_are_too_many():
    """Regression: at 65,530 ranges of memory a compilation ended a test process with a segmentation fault."""
    program = jax.jit(lambda x: x + 1)
    program(jnp.ones(3))
    conftest.free_programs(most=10**9)
    assert program._cache_size() == 1
    conftest.free_programs(most=0)
    assert program._cache_size() == 0


def test_optimised_tests_run_no_program_of_other_tests():
    """Regression: JAX took up what another test had compiled without optimisations."""
    program = jax.jit(lambda x: x + 1)
    conftest.optimise(False)
    program(jnp.ones(3))
    conftest.optimise(True)
    assert program._cache_size() == 0


def test_only_optimised_tests_have_the_emitters_that_users_have():
    """All else that JAX says of a compilation stays."""
    options = lambda: compiler.get_compile_options(2, 1, device_assignment=[[0], [3]]).SerializeAsString()
    conftest.optimise(False)
    fast = options()
    conftest.optimise(True)
    slow = options()
    assert b"xla_cpu_disable_new_fusion_emitters" in fast and b"emitters" not in slow
    read = xla_client.CompileOptions.ParseFromString(fast)
    assert read.num_replicas == 2 and "{0 3}" in str(read.device_assignment)
    assert read.executable_build_options.debug_options.xla_backend_optimization_level == 0


def test_programs_for_a_gpu_try_out_no_matrix_products():
    """What a test asks for itself goes before."""
    class Gpu(types.SimpleNamespace):
        def __getattr__(self, name):  # what else JAX asks of a backend
            return getattr(jax.devices("cpu")[0].client, name)

    def options(**given):
        return dict(compiler.get_compile_options(1, 1, backend=Gpu(platform="gpu"), **given).env_option_overrides)
    assert options() == {"xla_gpu_autotune_level": 0}
    own = {"xla_gpu_autotune_level": 4, "xla_gpu_enable_triton_gemm": False}
    assert options(env_options_overrides=own) == own
    assert compiler.get_compile_options(1, 1, backend=jax.devices("cpu")[0].client).env_option_overrides == []


def test_a_jax_that_makes_options_elsewhere_runs_the_tests(monkeypatch):
    """They would all have ended in conftest.py."""
    monkeypatch.delattr(compiler, "get_compile_options")
    compilation.install()
    assert not hasattr(compiler, "get_compile_options")


def test_a_worker_that_runs_out_of_time_says_where_it_is(tmp_path):
    """Regression: on an H200 a test took too long, and all that was said was that its worker had crashed."""
    own = tmp_path / "test_slow.py"
    own.write_text("import time\nimport pytest\n\n\n@pytest.mark.timeout(1)\ndef test_slow():\n    time.sleep(60)\n")
    arguments = ["-n", "1", "-p", "tests.conftest", "-p", "no:cacheprovider", "-o", "timeout_method=thread", str(own)]
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(Path(conftest.__file__).parents[1])})
    assert done.returncode == 1, done.stdout
    assert "test_slow.py" in done.stderr and "in test_slow" in done.stderr, done.stderr


@pytest.mark.parametrize(("words", "everything"), [("", True), ("-k window -x", True), ("tests/ampere -x", False),
                                                   ("-x tests/test_docs.py::test_links", False)])
def test_make_runs_the_tests_that_args_names(words, everything):
    """Regression: `make test-newest-jax ARGS=PATH` ran all tests, and those of the path with them."""
    functions = 'source <(sed -n "/^read -ra/p; /^has()/p; /^run_pytest()/,/^}/p" .ci/task)'
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", f"{functions}; python=echo; run_pytest -m 'not gpu'"],
                          env=os.environ | {"ARGS": words}, cwd=Path(conftest.__file__).parents[1], text=True,
                          capture_output=True, check=True)
    said = done.stdout.splitlines()[-1].split()
    assert said[:2] == ["-m", "pytest"] and ("tests" in said) == everything, said
    assert said[-len(words.split()):] == words.split() or not words, said


@pytest.mark.parametrize(("codes", "wanted"), [
    ("5 5 0 5", 0), ("0 5 1 5", 1), ("2 5 0 0", 2), ("5 5 5 5", 5), ("0 0 0 0", 0)])
def test_tests_that_args_names_need_not_be_in_every_part(codes, wanted):
    """Regression: on a GPU `make test ARGS=tests/test_conftest.py` failed, for none of these tests is marked gpu."""
    functions = 'source <(sed -n "/^run_all()/,/^}/p" .ci/task)'
    program = f"""{functions}; say() {{ :; }}; codes=({codes})
        run_pytest() {{ local code=${{codes[0]}}; codes=("${{codes[@]:1}}"); return $code; }}
        run_all || exit $?"""
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", program], cwd=Path(conftest.__file__).parents[1])
    assert done.returncode == wanted
