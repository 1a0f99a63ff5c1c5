"""A pass as data, and the file in which it is kept.

The file, version 7; numbers are little-endian:

    bytes    what
    8        "PFPLAN\\r\\n"
    4        the version of the format
    4        the length of the header
    ...      the header: JSON in UTF-8, an object
               request     the text of the `Request` that it was made for
               implementation  of pallas_flash, whose kernels they are
               left        [implementation, reason]: those written for the GPU that were left for it, and why
               reasons     [implementation, reason]: all that cannot run the problem, and why
               buffers     {name: [shape, dtype, strides]}: every array by name; strides are null if it is dense, as all
                           are but inputs and results
               inputs      names of the arrays of a call that launches read, in their order
               given       names of those that operations read, and launches where they lie
               operations  what is computed before the launches, in order: [one of OPERATIONS, names of arrays and
                           numbers, parameters, name of the result]
               results     names of what the pass returns
               constants   {name: index of a blob}
               restored    names of arrays that are 0 when the launches begin, which update them and leave them 0
               steps       in the order of their launches, [index of a kernel, names of the arrays that it is given]
               kernels     [name, grid, block, smem_bytes, index of the cubin's blob, index of the parameters' blob,
                            patches, cluster]: each patch is [place, i], the 8 bytes at 8 * place of the
                            parameters being the address of the i-th array of the step
               blobs       their lengths in bytes
    ...      the blobs, one after the other
    32       SHA-256 of all that is before it

It is read as data, and nothing in it is run but by the GPU; operations are torch's own. A file that is not exactly this
is no plan.
"""

import hashlib
import json
import math
import struct
from typing import NamedTuple, TypedDict

__all__ = ["OPERATIONS", "Buffer", "Kernel", "Module", "Operation", "Parameter", "Program", "Step",
           "UnreadablePlanError", "read", "write"]

MAGIC = b"PFPLAN\r\n"
VERSION = 7
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "bool": 1}
OPERATIONS = frozenset((
    "abs", "isfinite", "add", "sub", "mul", "max", "min", "div", "and", "or", "xor", "not", "neg", "eq", "ne", "lt",
    "le", "gt", "ge",
    "shift_left", "shift_right", "where", "to", "reshape", "expand", "permute", "slice", "pad", "concatenate", "stack",
    "amax", "amin", "any", "all", "sum", "cummax", "take", "boundaries", "sequences", "bits", "clone"))
"""What is computed beside the launches: by element and reductions, mostly as torch and NumPy name them (`operations.py`
has their definitions). Integers are int32, and wrap around; floats keep their dtype."""
_VIEWS = {"reshape", "expand", "permute", "slice"}
_HEAD = struct.Struct("<8sII")
_DIGEST_BYTES = 32


class UnreadablePlanError(ValueError):
    """A file that is no plan of this version, or not the plan asked for."""


class Buffer(NamedTuple):
    """An array.

    Attributes:
      shape: of its axes.
      dtype: a key of ITEM_BYTES.
      strides: from one element to the next along each axis, in elements; None: it is dense, the last axis innermost.
    """

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...] | None = None

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Module(NamedTuple):
    """A kernel before it is compiled: what `MosaicGpuCompile` takes."""

    code: bytes


class Kernel(NamedTuple):
    """A launch of a compiled kernel.

    Attributes:
      name: of the function in the cubin.
      grid, block: their sizes along x, y and z.
      smem_bytes: dynamic shared memory of a block.
      cubin: machine code for one compute capability.
      parameters: the block of parameters, filled up to a multiple of 8 bytes.
      patches: (place, i): the 8 bytes at 8 * place are the address of the i-th array of the step.
      cluster: blocks of a cluster along x, y and z.
    """

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    smem_bytes: int
    cubin: bytes
    parameters: bytes
    patches: tuple[tuple[int, int], ...]
    cluster: tuple[int, int, int] = (1, 1, 1)


class Step[K](NamedTuple):
    """A launch: the kernel, and the arrays whose addresses it takes, by name. One that is updated is there twice."""

    kernel: K
    arrays: tuple[str, ...]


type Parameter = float | str | tuple[int, ...]


class Operation(NamedTuple):
    """What torch computes before the launches.

    Attributes:
      name: one of OPERATIONS.
      inputs: arrays by name, and numbers; -Infinity, as Python's JSON has it, is one.
      parameters: what else it is told: axes, sizes, a dtype.
      output: the name of what it makes.
    """

    name: str
    inputs: tuple[str | float, ...]
    parameters: tuple[Parameter, ...]
    output: str


class Program[K](NamedTuple):
    """A pass: its arrays by name, and its launches in their order. Results of operations that launches read are among
    the buffers, others are not. What is restored is 0 before the launches and after them; launches that may run at the
    same time need memory of their own for it. The kernels are those of an `implementation` of pallas_flash, for which
    others that were written for the GPU were `left`: (name, reason). All that cannot run the problem have `reasons`.
    """

    buffers: dict[str, Buffer]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    constants: dict[str, bytes]
    steps: tuple[Step[K], ...]
    given: tuple[str, ...] = ()
    operations: tuple[Operation, ...] = ()
    implementation: str = ""
    restored: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()

    @property
    def reasons_by_name(self) -> dict[str, list[str]]:
        """The reasons against each implementation that has some."""
        found: dict[str, list[str]] = {}
        for name, reason in self.reasons:
            found.setdefault(name, []).append(reason)
        return found

    @property
    def made(self) -> tuple[str, ...]:
        """The results of operations that launches read."""
        return tuple(operation.output for operation in self.operations if operation.output in self.buffers)

    @property
    def num_kernels(self) -> int:
        """Of PyTorch's kernels that operations queue, about: views queue none, and some of the others more than one."""
        return sum(operation.name not in _VIEWS for operation in self.operations)

    @property
    def scratch(self) -> tuple[str, ...]:
        """The arrays that launches alone write, and that do not go to the caller."""
        outside = {*self.inputs, *self.results, *self.constants, *self.given, *self.made, *self.restored}
        return tuple(name for name in self.buffers if name not in outside)


def write(program: Program[Kernel], request: str) -> bytes:
    """The content of the file."""
    blobs: list[bytes] = []

    def kept(blob: bytes) -> int:
        blobs.append(blob)
        return len(blobs) - 1

    kernels = list(dict.fromkeys(step.kernel for step in program.steps))
    header = dict(
        request=request, buffers=program.buffers, inputs=program.inputs, results=program.results, given=program.given,
        operations=program.operations, implementation=program.implementation, restored=program.restored,
        left=program.left, reasons=program.reasons,
        constants={name: kept(value) for name, value in program.constants.items()},
        steps=[(kernels.index(step.kernel), step.arrays) for step in program.steps],
        kernels=[(k.name, k.grid, k.block, k.smem_bytes, kept(k.cubin), kept(k.parameters), k.patches,
                  k.cluster)
                 for k in kernels])
    text = json.dumps(header | {"blobs": [len(blob) for blob in blobs]}).encode()
    content = b"".join((_HEAD.pack(MAGIC, VERSION, len(text)), text, *blobs))
    return content + hashlib.sha256(content).digest()


def read(content: bytes, request: str) -> Program[Kernel]:
    """The program of a file's content.

    Raises:
      UnreadablePlanError: it is damaged, of another version, or was made for another request.
    """
    header, blobs = _parts(content)
    try:
        if header["request"] != request:
            raise UnreadablePlanError(f"a plan for {header['request']}, not for {request}")
        program = _program(header, blobs)
        _check(program)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        if isinstance(error, UnreadablePlanError):
            raise
        raise UnreadablePlanError(f"the header of the plan is not what version {VERSION} says: {error!r}") from error
    return program


class _Header(TypedDict):
    """What the header of a plan holds; JSON has lists in the place of tuples."""

    request: str
    buffers: dict[str, tuple[list[int], str, list[int] | None]]
    inputs: list[str]
    results: list[str]
    given: list[str]
    operations: list["_Fields"]
    implementation: str
    restored: list[str]
    left: list[tuple[str, str]]
    reasons: list[tuple[str, str]]
    constants: dict[str, int]
    steps: list[tuple[int, list[str]]]
    kernels: list[tuple[str, list[int], list[int], int, int, int, list[tuple[int, int]], list[int]]]
    blobs: list[int]


_Fields = tuple[str, list[str | int], list[int | str | list[int]], str]
"""Those of an operation."""


def _parts(content: bytes) -> tuple[_Header, list[bytes]]:
    """The header and the blobs of a file that is whole."""
    if len(content) < _HEAD.size + _DIGEST_BYTES:
        raise UnreadablePlanError(f"a plan has at least {_HEAD.size + _DIGEST_BYTES} bytes, not {len(content)}")
    magic, version, length = _HEAD.unpack_from(content)
    if magic != MAGIC or version != VERSION:
        raise UnreadablePlanError(f"a plan begins with {MAGIC!r} and version {VERSION}, not {magic!r} and {version}")
    end = len(content) - _DIGEST_BYTES
    if hashlib.sha256(content[:end]).digest() != content[end:]:
        raise UnreadablePlanError("the checksum is that of other content: the file is damaged or cut off")
    try:
        header: _Header = json.loads(content[_HEAD.size:_HEAD.size + length])
        lengths = [int(n) for n in header["blobs"]]
    except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise UnreadablePlanError(f"the header of the plan is no JSON object with blobs: {error!r}") from error
    start = _HEAD.size + length
    if min(lengths, default=0) < 0 or start + sum(lengths) != end:
        raise UnreadablePlanError("the blobs have other lengths than the header says")
    blobs = []
    for n in lengths:
        blobs.append(content[start:start + n])
        start += n
    return header, blobs


def _program(header: _Header, blobs: list[bytes]) -> Program[Kernel]:
    def sizes(values: list[int]) -> tuple[int, int, int]:
        x, y, z = values
        return int(x), int(y), int(z)

    kernels = [Kernel(str(name), sizes(grid), sizes(block), int(smem_bytes), blobs[cubin], blobs[parameters],
                      tuple((int(place), int(i)) for place, i in patches), sizes(cluster))
               for name, grid, block, smem_bytes, cubin, parameters, patches, cluster in header["kernels"]]
    buffers = {name: Buffer(tuple(map(int, shape)), str(dtype), None if strides is None else tuple(map(int, strides)))
               for name, (shape, dtype, strides) in header["buffers"].items()}
    return Program(
        buffers=buffers,
        inputs=tuple(header["inputs"]), results=tuple(header["results"]),
        constants={name: blobs[i] for name, i in header["constants"].items()},
        steps=tuple(Step(kernels[i], tuple(arrays)) for i, arrays in header["steps"]),
        given=tuple(header["given"]),
        operations=tuple(map(_operation, header["operations"])), implementation=str(header["implementation"]),
        restored=tuple(header["restored"]), left=_pairs(header["left"]), reasons=_pairs(header["reasons"]))


def _pairs(given: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((str(name), str(reason)) for name, reason in given)


def _operation(fields: _Fields) -> Operation:
    name, inputs, parameters, output = fields
    return Operation(str(name), tuple(inputs), tuple(tuple(x) if isinstance(x, list) else x for x in parameters),
                     str(output))


def _check(program: Program[Kernel]) -> None:
    """Raises UnreadablePlanError where a launch would read or write at an address that nobody gave it."""
    outside = (*program.inputs, *program.results, *program.given, *program.constants, *program.restored)
    rules = [all(name in program.buffers for name in outside), _are_operations(program),
             all(len(value) == program.buffers[name].num_bytes for name, value in program.constants.items()),
             # Results are new memory.
             {*program.results}.isdisjoint({*program.inputs, *program.constants, *program.given, *program.made}),
             {*program.restored}.isdisjoint({*program.inputs, *program.results, *program.constants, *program.given,
                                             *program.made}),
             all(buffer.strides is None or (name in (*program.inputs, *program.results) and min(buffer.strides) >= 0
                                            and len(buffer.strides) == len(buffer.shape))
                 for name, buffer in program.buffers.items())]
    for kernel, arrays in program.steps:
        rules += [all(name in program.buffers for name in arrays), len(kernel.parameters) % 8 == 0,
                  all(0 <= place < len(kernel.parameters) // 8 and 0 <= i < len(arrays)
                      for place, i in kernel.patches)]
    if not all(rules):
        raise UnreadablePlanError("the launches of the plan do not fit its arrays")


def _are_operations(program: Program[Kernel]) -> bool:
    """Whether each operation is known, and reads what is given, constant or made before it by a name of its own."""
    known = {*program.given, *program.constants}
    for name, inputs, _, output in program.operations:
        if name not in OPERATIONS or output in known or not {x for x in inputs if isinstance(x, str)} <= known:
            return False
        known.add(output)
    return True
