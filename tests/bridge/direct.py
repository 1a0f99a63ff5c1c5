"""Requests of the tests of the direct path, and a program that needs no compiler."""

from torch_bridge.direct.plan import Buffer, Kernel, Program, Step
from torch_bridge.direct.problem import CacheProblem, Gpu, Problem, Request

H200 = Gpu("NVIDIA H200", (9, 0), 132, 232_448)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912)
VERSIONS = {"product": "of a test", "driver": "13000"}
SMALL = Problem(layout="BHLD", dtype="bfloat16", batch=1, q_heads=4, kv_heads=2, q_len=200, kv_len=256, d=64, d_v=64,
                window=(None, 0, 0, False), scale=None, softcap=None, deterministic=False,
                outer=((4, 64), (2, 64), (2, 64)))
FORWARD = Request(SMALL, "forward", H200, VERSIONS)
CACHE = CacheProblem(layout="BHLD", dtype="bfloat16", batch=2, q_heads=8, kv_heads=2, q_len=1, capacity=512, d=64,
                     d_v=64, pages=None, window=(None, None), scale=None, softcap=None,
                     given=(("lengths", (2,), "int32"),))
DECODE = Request(CACHE, "decode", H200, VERSIONS)

ADD = Kernel("add", (7, 2, 1), (128, 1, 1), 1024, b"\x7fELF machine code", bytes(range(24)), ((0, 0), (2, 1)))
SCALE = ADD._replace(name="scale", cubin=b"other code", patches=((1, 1), (0, 0)), cluster=(8, 1, 1))
PROGRAM = Program(
    buffers={"x": Buffer((2, 3), "bfloat16", (8, 1)), "table": Buffer((4,), "int32"), "sums": Buffer((5, 7), "float32"),
             "more": Buffer((3,), "float16"), "y": Buffer((2, 3), "bfloat16")},
    inputs=("x",), results=("y",), constants={"table": bytes(range(16))},
    steps=(Step(ADD, ("x", "sums")), Step(SCALE, ("sums", "more")), Step(ADD, ("table", "y"))), implementation="hopper",
    reasons=(("ampere", "one thing"), ("ampere", "another")))
"""x -> y over sums and more, with a table; the same kernel twice."""
