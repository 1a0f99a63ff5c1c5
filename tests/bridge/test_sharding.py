"""DTensors and FSDP, in processes of their own on CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", [1, 2])
def test_dtensors_and_fsdp(size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "JAX_PLATFORMS": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [subprocess.Popen([sys.executable, ROOT / "tests/bridge/sharded_worker.py", str(rank), str(size),
                                   str(port)], env=environment, stderr=subprocess.PIPE, text=True)
                 for rank in range(size)]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=250)
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            process.kill()
