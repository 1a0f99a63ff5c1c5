"""A loaded plan as a function of torch's tensors: on their device, on torch's current stream, in torch's memory."""

import operator
from collections.abc import Callable, Sequence

import torch

from torch_bridge import streams, strides
from torch_bridge.direct import allocation, operations
from torch_bridge.direct.counters import Counters
from torch_bridge.direct.launch import ALIGNMENT, Loaded
from torch_bridge.direct.plan import Kernel, Program

__all__ = ["DTYPES", "Runner"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int32": torch.int32,
          "bool": torch.bool}
_SCRATCH_ALIGNMENT = 256


def _places(program: Program[Kernel], names: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """Where arrays begin in one piece of memory; and the bytes of all."""
    found, end = [], 0
    for name in names:
        found.append(end)
        end += -(-program.buffers[name].num_bytes // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT
    return tuple(found), end


def _in_order(program: Program[Kernel], names: Sequence[str]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """Takes the addresses of arrays in the order of names, and gives those of all buffers in theirs, in one call. What
    is given and no launch reads has none: it gets another's.
    """
    places = {name: i for i, name in enumerate(names)}
    assert {name for step in program.steps for name in step.arrays} <= places.keys(), (program.steps, names)
    return operator.itemgetter(*(places.get(name, 0) for name in program.buffers))


class Runner:
    """Runs a program on tensors.

    Constants, and what launches count in (`counters.py`), live as long as the runner. What is neither given nor
    returned lies in one allocation of torch's, which is free for others as soon as the launches are queued: torch gives
    it to work on the same stream.
    """

    def __init__(self, program: Program[Kernel], device: torch.device) -> None:
        self.program, self._device, self._index = program, device, device.index or 0
        self._loaded = Loaded(program, self._index)
        self._passed = [(name, buffer.shape, buffer.strides, DTYPES[buffer.dtype])
                        for name in (*program.inputs, *program.results) for buffer in (program.buffers[name],)]
        self._results = self._passed[len(program.inputs):]
        self.num_kernels = program.num_kernels
        self._given = [(name, program.buffers[name]) for name in program.given]
        by_launches = {name for step in program.steps for name in step.arrays}
        self._read = [i for i, name in enumerate(program.given) if name in by_launches]
        self._made = [(program.buffers[name].shape, DTYPES[program.buffers[name].dtype]) for name in program.made]
        self._constants = {
            name: torch.frombuffer(bytearray(value), dtype=DTYPES[kind.dtype]).view(kind.shape).to(device)
            for name, value in program.constants.items() for kind in (program.buffers[name],)}
        self._make = operations.Function(program.operations, program.given, self._constants, program.made)
        self._fixed = tuple(x.data_ptr() for x in self._constants.values())
        self._scratch, num_bytes = _places(program, program.scratch)
        self._scratch_memory = ((num_bytes,), (1,), torch.uint8) if num_bytes else None
        self._restored, num_bytes = _places(program, program.restored)
        self._counters = Counters(num_bytes, device) if num_bytes else None
        self._in_order = _in_order(program, (
            *program.inputs, *program.results, *program.made, *(program.given[i] for i in self._read),
            *program.constants, *program.scratch, *program.restored))
        self._empty = allocation.maker(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the constants are there for every stream

    def __call__(self, tensors: Sequence[torch.Tensor], given: Sequence[torch.Tensor] = (),
                 results: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """The results, in new memory unless they are there, for tensors that are stored as the program's buffers and
        aligned as `Loaded.launch` says.

        Args:
          given: what operations, and launches where they may, read; stored anyhow.
          results: tensors into which they are written; none: new ones are made.

        Raises:
          ValueError: a tensor has another shape, dtype or device than the kernels were compiled for, or is stored
            otherwise: they would read something else, or past its end.
        """
        found = [*results] or [self._new(shape, wanted, dtype) for _, shape, wanted, dtype in self._results]
        addresses, bits = [], 0
        for (name, shape, wanted, dtype), tensor in zip(self._passed, (*tensors, *found), strict=True):
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device != self._device or not (
                    tensor.is_contiguous() if wanted is None else
                    strides.same_memory(shape, tensor.stride(), wanted)):
                raise self._misfit(name, tensor)
            addresses.append(tensor.data_ptr())
            bits |= addresses[-1]
        assert not bits % ALIGNMENT, [x.data_ptr() % ALIGNMENT for x in tensors]
        beside = self._beside(given)
        self._launch([*addresses, *(x.data_ptr() for x in beside)])
        del beside  # until here: whoever is given their memory next works on the same stream, after the launches
        return found

    def _new(self, shape: tuple[int, ...], wanted: tuple[int, ...] | None, dtype: torch.dtype) -> torch.Tensor:
        if wanted is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        return torch.empty_strided(shape, wanted, dtype=dtype, device=self._device)

    def run(self, tensors: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
        """Writes the results into tensors that are there, for calls that are known to fit: shapes, dtypes and devices
        of all are those of the program, stored as its buffers and aligned.
        """
        self._launch([x.data_ptr() for x in (*tensors, *results)])

    def run_at(self, passed: Sequence[int]) -> None:
        """`run` of the tensors at these addresses, the inputs' before the results', on the thread's current device;
        then those of what operations make and launches read of what is given, if there is any.
        """
        addresses, stream = [*passed, *self._fixed], streams.number(self._index)
        if self._scratch_memory is not None:
            scratch = self._empty(*self._scratch_memory)
            start = scratch.data_ptr()
            addresses += [start + offset for offset in self._scratch]
        if self._counters is not None:
            start, _held = self._counters.at(stream)
            addresses += [start + offset for offset in self._restored]
        self._loaded.launch(self._in_order(addresses), stream)

    def _beside(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What operations make for the launches, and what these read of what is given."""
        for (name, kind), tensor in zip(self._given, given, strict=True):
            if tensor.shape != kind.shape or tensor.dtype != DTYPES[kind.dtype] or tensor.device != self._device:
                raise self._misfit(name, tensor)
        made = self._make(given)
        for (shape, dtype), tensor in zip(self._made, made, strict=True):
            assert tensor.shape == shape and tensor.dtype == dtype, (tensor.shape, tensor.dtype, shape, dtype)
            assert not tensor.data_ptr() % ALIGNMENT
        return made + [strides.sharable(given[i], ALIGNMENT) for i in self._read]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of an array of the program."""
        return self.program.buffers[name].shape

    def _launch(self, passed: Sequence[int]) -> None:
        """`run_at`, on the device of the plan."""
        if self._device.type != "cuda" or streams.device() == self._index:
            self.run_at(passed)
        else:
            with torch.cuda.device(self._index):
                self.run_at(passed)

    def _misfit(self, name: str, tensor: torch.Tensor) -> ValueError:
        return ValueError(f"{name} must be {self.program.buffers[name]} on {self._device}, got {tuple(tensor.shape)} "
                          f"{tensor.dtype} with strides {tensor.stride()} on {tensor.device}. Pass the tensors of the "
                          "forward and its results.")

    def unload(self) -> None:
        """Unloads the modules (`Loaded.unload`)."""
        self._loaded.unload()
