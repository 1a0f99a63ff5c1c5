"""What a plan is made for, as plain data: the problem, the GPU, and the versions of all that has a part in it."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

__all__ = ["AnyProblem", "CacheProblem", "Given", "Gpu", "OPERANDS", "Outer", "PassName", "Problem", "Request",
           "Window", "versions"]

PassName = Literal["forward", "backward", "backward_of_parts", "dbias", "decode"]
"""Of a `Problem` all but the last, as in `pallas_flash.launches.Passes`: `dbias` is the gradient of a bias; of the
backward of parts, gradients are parts of arrays as their operands are (`Problem.outer`), of the other one they are
dense. The last is the forward of a `CacheProblem`.
"""
Outer = tuple[int, int]
"""(heads, dim) of the dense array in the layout of which an operand is a part, from its first element on."""
OPERANDS = "q", "k", "v"
Window = tuple[int | None, int | None, int, bool]
"""left, right, offset and ends_aligned, as `arguments.Numbers` has them."""
Given = tuple[tuple[str, tuple[int, ...], str], ...]
"""Tensors of a call by their names in `arguments.Operands`, each with its shape and dtype."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The numbers of a `pallas_flash.AttentionSpec`, and how its arrays are stored.

    Each operand is a part of a dense array in the layout, `outer`: of all of its batch and length, and of some of its
    heads and columns. So it is in packed tensors, and an operand that is dense is the whole of its own. Other arrays
    are dense, but the gradients of a `backward_of_parts`, and those that are `given`, masks, a bias, lengths and ids:
    these are anyhow.
    """

    layout: Literal["BLHD", "BHLD"]
    dtype: Literal["bfloat16", "float16"]
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    d: int
    d_v: int
    window: Window
    scale: float | None
    softcap: float | None
    deterministic: bool
    outer: tuple[Outer, Outer, Outer]
    given: Given = ()  # what else says which pairs attend, a bias, a score function's arrays, and the seed of dropout
    dropout_p: float = 0.0
    score: str | None = None  # the name of a score function, a hash of what it computes
    score_ir: str | None = dataclasses.field(default=None, repr=False)  # the function itself (score_ir.py)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each operand in the layout, by name."""
        sizes = ((self.q_len, self.q_heads, self.d), (self.kv_len, self.kv_heads, self.d),
                 (self.kv_len, self.kv_heads, self.d_v))
        return {name: self._in_layout(*size) for name, size in zip(OPERANDS, sizes, strict=True)}

    def outer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of the dense array of which each operand is a part."""
        lengths = self.q_len, self.kv_len, self.kv_len
        return {name: self._in_layout(length, *outer)
                for name, length, outer in zip(OPERANDS, lengths, self.outer, strict=True)}

    def strides(self) -> dict[str, tuple[int, ...]]:
        """The strides of each operand, in elements: those of the dense array."""
        return _dense(self.outer_shapes())

    def _in_layout(self, length: int, heads: int, dim: int) -> tuple[int, ...]:
        return (self.batch, length, heads, dim) if self.layout == "BLHD" else (self.batch, heads, length, dim)


@dataclasses.dataclass(frozen=True)
class CacheProblem:
    """Attention of a few new queries at the end of sequences to the keys of a cache (`pallas_flash.cache`). All arrays
    are dense.
    """

    layout: Literal["BLHD", "BHLD"]
    dtype: Literal["bfloat16", "float16"]
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    capacity: int  # positions of a sequence; of pages, those that a row of the table shows
    d: int
    d_v: int
    pages: tuple[int, int] | None  # how many there are, and the positions of each; None: sequences lie one by one
    window: tuple[int | None, int | None]  # keys before and after a query's own position; None: no limit
    scale: float | None
    softcap: float | None
    given: Given  # lengths (batch,) int32; page_table (batch, pages), bias and sinks where there are any

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each operand in the layout, by name; of pages, that of all pages."""
        rows, length = (self.batch, self.capacity) if self.pages is None else self.pages
        sizes = ((self.batch, self.q_len, self.q_heads, self.d), (rows, length, self.kv_heads, self.d),
                 (rows, length, self.kv_heads, self.d_v))
        return {name: (b, n, h, d) if self.layout == "BLHD" else (b, h, n, d)
                for name, (b, n, h, d) in zip(OPERANDS, sizes, strict=True)}

    def strides(self) -> dict[str, tuple[int, ...]]:
        """The strides of each operand, in elements."""
        return _dense(self.shapes())


def _dense(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The strides of dense arrays, in elements, by name."""
    return {name: (b * c * d, c * d, d, 1) for name, (_, b, c, d) in shapes.items()}


AnyProblem = Problem | CacheProblem


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as `pallas_flash.device.Device` has it."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    smem_bytes: int


@dataclasses.dataclass(frozen=True)
class Request:
    """One pass of a problem, for one kind of GPU, by these versions: all that a plan depends on.

    Attributes:
      implementation: one of pallas_flash that is named; None: the choice is automatic.
    """

    problem: AnyProblem
    pass_name: PassName
    gpu: Gpu
    versions: dict[str, str]
    implementation: str | None = None

    @functools.cached_property
    def text(self) -> str:
        """The request as canonical JSON: equal for equal requests, in every process."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def key(self) -> str:
        """The name of its plan: 64 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @classmethod
    def of(cls, text: str) -> Self:
        """The request again from its text."""
        fields = json.loads(text)
        problem = fields["problem"]
        problem["window"] = tuple(problem["window"])
        problem["given"] = tuple((name, tuple(shape), dtype) for name, shape, dtype in problem["given"])
        gpu = fields["gpu"]
        gpu["capability"] = tuple(gpu["capability"])
        return cls(_problem_of(fields["pass_name"], problem), fields["pass_name"], Gpu(**gpu), fields["versions"],
                   fields["implementation"])


def _problem_of(pass_name: PassName, fields: dict[str, Any]) -> AnyProblem:
    if pass_name == "decode":
        pages = fields["pages"]
        return CacheProblem(**fields | {"pages": None if pages is None else tuple(pages)})
    return Problem(**fields | {"outer": tuple(map(tuple, fields["outer"]))})


@functools.cache
def versions(driver: int) -> dict[str, str]:
    """What else machine code and parameters depend on: the sources of this project, JAX, ptxas and the driver.

    Args:
      driver: what cuDriverGetVersion says. The file that the kernel module offers adds the release: the layout of a
        tensor map is the driver's own.
    """
    kernel_module = Path("/proc/driver/nvidia/version")
    return {"product": _digest_of_sources(), "ptxas": _ptxas(), "driver": str(driver),
            "driver_release": kernel_module.read_text() if kernel_module.exists() else "",
            **{name: _installed(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")}}


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _digest_of_sources() -> str:
    """A digest of the Python sources that have a part in a plan. A version number stays the same while they change."""
    spec = importlib.util.find_spec("pallas_flash")  # of a package at the top: it is not imported
    assert spec is not None and spec.origin is not None
    digest = hashlib.sha256()
    product, here = Path(spec.origin).parent, Path(__file__).parent
    paths = [path for root in (product, here) for path in sorted(root.rglob("*.py"))]
    for path in (*paths, here.parent / "rules.py"):  # which says what the mask of a call is
        content = path.read_bytes()
        root = product if path.is_relative_to(product) else here.parent
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _ptxas() -> str:
    """Each ptxas that JAX would prefer to its wheel's: on PATH, and in the usual places of a toolkit."""
    on_path = shutil.which("ptxas")
    found = [*([on_path] if on_path else []), "/usr/local/cuda/bin/ptxas", "/opt/cuda/bin/ptxas"]
    states = ((os.path.realpath(path), os.stat(path)) for path in found if os.path.exists(path))
    return "; ".join(f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states)
