"""A child forked after JAX has started cannot compute with it: it must raise, not wait for ever."""

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

JAX_CALL = """
import jax.numpy as jnp, pallas_flash
def call():
    if not hasattr(call, "x"):  # not in a child forked after use: on a GPU that would hang before we are called
        call.x = jnp.ones((1, 8, 2, 4))
    return float(pallas_flash.{function}(call.x, call.x, call.x).sum())
"""
CALLS = {
    "flash_attention": JAX_CALL.format(function="flash_attention"),
    "dot_product_attention": JAX_CALL.format(function="dot_product_attention"),
    "dot_product_attention, a mask and no batch": """
import jax.numpy as jnp, pallas_flash
def call():
    if not hasattr(call, "arrays"):
        call.arrays = jnp.ones((8, 2, 4)), jnp.ones((8, 8), bool)
    x, mask = call.arrays
    return float(pallas_flash.dot_product_attention(x, x, x, mask=mask).sum())
""",
    "flax": """
import jax.numpy as jnp
from pallas_flash.flax import dot_product_attention
def call():
    if not hasattr(call, "arrays"):
        call.arrays = jnp.ones((1, 8, 2, 4)), jnp.ones((1, 1, 8, 8))
    x, mask = call.arrays
    return float(dot_product_attention(x, x, x, mask=mask).sum())
""",
    "bridge": """
import torch, torch_bridge
def call():
    x = torch.ones(1, 2, 8, 4)
    return torch_bridge.scaled_dot_product_attention(x, x, x).sum().item()
""",
    "bridge, backward": """
import torch, torch_bridge
x = torch.ones(1, 2, 8, 4, requires_grad=True)
def call():
    if not hasattr(call, "out"):
        call.out = torch_bridge.scaled_dot_product_attention(x, x, x).sum()
    torch.autograd.grad(call.out, x, retain_graph=True)
    return call.out.item()
""",
}
IN_A_CHILD = """
def in_a_child(function):
    import os, time, warnings
    warnings.simplefilter("ignore")  # JAX's and Python's own, about forks
    pid = os.fork()
    if pid == 0:
        status = 9
        try:
            status = function()
        except RuntimeError as error:
            ours = all(x in str(error) for x in ("must not run", "spawn", "multiprocessing_context"))
            torchs = "Unable to handle autograd's threading in combination with fork" in str(error)  # where it has CUDA
            status = 3 if ours or torchs else 4
        finally:
            os._exit(status)
    for _ in range(600):
        if (ended := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.1)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"
"""


def run(*parts):
    done = subprocess.run([sys.executable, "-c", "".join(map(textwrap.dedent, parts))], capture_output=True, text=True,
                          timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("name", CALLS)
def test_a_call_in_a_child_forked_after_use_raises(name):
    """It hung for ever."""
    run(IN_A_CHILD, CALLS[name], """
        assert call() == 64
        child = lambda: in_a_child(lambda: (call(), 0)[1])
        assert child() == 3, child()
        assert in_a_child(child) == 3, "the child of a child"
        assert call() == 64, "the parent goes on"
        """)


@pytest.mark.parametrize("name", CALLS)
def test_a_fork_before_jax_starts_is_fine(name):
    run(IN_A_CHILD, CALLS[name], """
        def child():
            try:
                assert call() == 64
            except RuntimeError:
                return 5
            return in_a_child(lambda: (call(), 0)[1])  # forked after use, in its turn
        assert in_a_child(child) == 3
        assert call() == 64
        """)


def test_a_jax_that_others_started_counts_before_the_bridge_has_used_it():
    run(IN_A_CHILD, CALLS["bridge"], """
        import jax, sys
        assert jax.numpy.ones(8).sum() == 8 and "pallas_flash" not in sys.modules
        assert in_a_child(lambda: (call(), 0)[1]) == 3
        """)


def test_workers_of_a_data_loader():
    """How users meet it: a worker that asks a model. The message leads to what works."""
    run("""
        import torch, torch_bridge, warnings
        from torch.utils.data import DataLoader, Dataset

        class Asked(Dataset):
            def __len__(self):
                return 2
            def __getitem__(self, i):
                x = torch.ones(1, 2, 8, 4)
                return torch_bridge.scaled_dot_product_attention(x, x, x).sum()

        if __name__ == "__main__":
            warnings.simplefilter("ignore")
            Asked()[0]
            try:
                list(DataLoader(Asked(), num_workers=1, multiprocessing_context="fork", timeout=100))
            except RuntimeError as error:
                assert 'multiprocessing_context="spawn"' in str(error), error
            else:
                raise AssertionError("nothing was raised")
        """)
