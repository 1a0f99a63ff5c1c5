"""A loaded plan as a function of torch's tensors: on their device, on torch's current stream, in torch's memory."""

from collections.abc import Sequence

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


def _places(program: Program[Kernel], numbers: dict[str, int],
            names: Sequence[str]) -> tuple[list[tuple[int, int]], int]:
    """Where arrays lie in one piece of memory: the number of each, and its offset; and the bytes of all."""
    found, end = [], 0
    for name in names:
        found.append((numbers[name], end))
        end += -(-program.buffers[name].num_bytes // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT
    return found, end


class Runner:
    """Runs a program on tensors.

    Constants, and what launches count in (`counters.py`), live as long as the runner. What is neither given nor
    returned lies in one allocation of torch's, which is free for others as soon as the launches are queued: torch gives
    it to work on the same stream.
    """

    def __init__(self, program: Program[Kernel], device: torch.device) -> None:
        numbers = {name: i for i, name in enumerate(program.buffers)}
        self.program, self._device, self._index = program, device, device.index or 0
        self._loaded = Loaded(program, self._index)
        self._inputs = [(numbers[name], buffer.shape, buffer.strides, DTYPES[buffer.dtype])
                        for name in program.inputs for buffer in (program.buffers[name],)]
        self._results = [(numbers[name], buffer.shape, buffer.strides, DTYPES[buffer.dtype])
                         for name in program.results for buffer in (program.buffers[name],)]
        self.num_kernels = program.num_kernels
        self._passed = tuple(numbers[name] for name in (*program.inputs, *program.results))
        self._given = [(name, program.buffers[name]) for name in program.given]
        read = {name for step in program.steps for name in step.arrays}
        self._read = [(i, numbers[name]) for i, name in enumerate(program.given) if name in read]  # by launches
        self._made = [(numbers[name], program.buffers[name].shape, DTYPES[program.buffers[name].dtype])
                      for name in program.made]
        self._constants = {
            name: torch.frombuffer(bytearray(value), dtype=DTYPES[kind.dtype]).view(kind.shape).to(device)
            for name, value in program.constants.items() for kind in (program.buffers[name],)}
        self._make = operations.Function(program.operations, program.given, self._constants, program.made)
        self._known = [0] * len(numbers)
        for name, tensor in self._constants.items():
            self._known[numbers[name]] = tensor.data_ptr()
        self._scratch, self._scratch_bytes = _places(program, numbers, program.scratch)
        self._restored, num_bytes = _places(program, numbers, program.restored)
        self._counters = Counters(num_bytes, device) if num_bytes else None
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
        addresses, bits = self._known.copy(), 0
        found = [*results] or [self._new(shape, wanted, dtype) for _, shape, wanted, dtype in self._results]
        passed = zip((*self._inputs, *self._results), (*tensors, *found), strict=True)
        for (i, shape, wanted, dtype), tensor in passed:
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device != self._device or not (
                    tensor.is_contiguous() if wanted is None else
                    strides.same_memory(shape, tensor.stride(), wanted)):
                raise self._misfit([*self.program.buffers][i], tensor)
            addresses[i] = address = tensor.data_ptr()
            bits |= address
        assert not bits % ALIGNMENT, [x.data_ptr() % ALIGNMENT for x in tensors]
        made = self._beside(given, addresses)
        for j, i in self._read:
            made.append(strides.sharable(given[j], ALIGNMENT))
            addresses[i] = made[-1].data_ptr()
        self._launch(addresses)
        del made  # until here: whoever is given their memory next works on the same stream, after the launches
        return found

    def _new(self, shape: tuple[int, ...], wanted: tuple[int, ...] | None, dtype: torch.dtype) -> torch.Tensor:
        if wanted is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        return torch.empty_strided(shape, wanted, dtype=dtype, device=self._device)

    def run(self, tensors: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
        """Writes the results into tensors that are there, for calls that are known to fit: shapes, dtypes and devices
        of all are those of the program, stored as its buffers and aligned.
        """
        addresses = self._known.copy()
        for i, tensor in zip(self._passed, (*tensors, *results)):
            addresses[i] = tensor.data_ptr()
        self._launch(addresses)

    def run_at(self, passed: Sequence[int]) -> None:
        """`run` of the tensors at these addresses, the inputs' before the results', on the thread's current device."""
        addresses = self._known.copy()
        for i, address in zip(self._passed, passed):
            addresses[i] = address
        self._launch_here(addresses)

    def _beside(self, given: Sequence[torch.Tensor], addresses: list[int]) -> list[torch.Tensor]:
        """What operations make for the launches, whose addresses are written down."""
        for (name, kind), tensor in zip(self._given, given, strict=True):
            if tensor.shape != kind.shape or tensor.dtype != DTYPES[kind.dtype] or tensor.device != self._device:
                raise self._misfit(name, tensor)
        made = self._make(given)
        for (i, shape, dtype), tensor in zip(self._made, made, strict=True):
            assert tensor.shape == shape and tensor.dtype == dtype, (tensor.shape, tensor.dtype, shape, dtype)
            addresses[i] = tensor.data_ptr()
            assert not addresses[i] % ALIGNMENT
        return made

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of an array of the program."""
        return self.program.buffers[name].shape

    def _launch(self, addresses: list[int]) -> None:
        if self._device.type != "cuda" or streams.device() == self._index:
            self._launch_here(addresses)
        else:
            with torch.cuda.device(self._index):
                self._launch_here(addresses)

    def _launch_here(self, addresses: list[int]) -> None:
        stream = streams.number(self._index)
        if self._scratch_bytes:
            scratch = self._empty((self._scratch_bytes,), (1,), torch.uint8)
            start = scratch.data_ptr()
            for i, offset in self._scratch:
                addresses[i] = start + offset
        if self._counters is not None:
            start, _held = self._counters.at(stream)
            for i, offset in self._restored:
                addresses[i] = start + offset
        self._loaded.launch(addresses, stream)

    def _misfit(self, name: str, tensor: torch.Tensor) -> ValueError:
        return ValueError(f"{name} must be {self.program.buffers[name]} on {self._device}, got {tuple(tensor.shape)} "
                          f"{tensor.dtype} with strides {tensor.stride()} on {tensor.device}. Pass the tensors of the "
                          "forward and its results.")

    def unload(self) -> None:
        """Unloads the modules (`Loaded.unload`)."""
        self._loaded.unload()
