"""One NVIDIA GPU through its driver's library: memory, kernels, graphs, events.

Source: CUDA Driver API (versions 12 and 13), cuda.h.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hwmpq.artifact.cuda.program import Call, Memory
from hwmpq.errors import DeviceError, InputError
from hwmpq.launches import Launch

Array = NDArray[Any]
_LIBRARY = "libcuda.so.1"
#: Types of the arguments of what is called: pointer, int, unsigned, size_t, 64 bits.
_FUNCTIONS = {
    "cuInit": "u", "cuDriverGetVersion": "p", "cuGetErrorString": "ip",
    "cuDeviceGet": "pi", "cuDeviceGetName": "pii", "cuDeviceGetAttribute": "pii",
    "cuDeviceGetPCIBusId": "pii", "cuDevicePrimaryCtxRetain": "pi", "cuCtxSetCurrent": "p",
    "cuMemAlloc_v2": "pz", "cuMemFree_v2": "q", "cuMemcpyHtoDAsync_v2": "qpzp",
    "cuMemcpyDtoHAsync_v2": "pqzp", "cuStreamCreate": "pu", "cuStreamSynchronize": "p",
    "cuModuleLoadData": "pp", "cuModuleGetFunction": "ppp", "cuFuncSetAttribute": "pii",
    "cuLaunchKernel": "puuuuuuuppp", "cuStreamBeginCapture_v2": "pi", "cuStreamEndCapture": "pp",
    "cuGraphInstantiateWithFlags": "ppq", "cuGraphLaunch": "pp", "cuGraphDestroy": "p",
    "cuGraphExecDestroy": "p", "cuEventCreate": "pu", "cuEventRecord": "pp",
    "cuEventRecordWithFlags": "ppu", "cuEventSynchronize": "p", "cuEventElapsedTime": "ppp",
    "cuEventDestroy_v2": "p",
}  # fmt: skip
_TYPES = {
    "p": ctypes.c_void_p, "i": ctypes.c_int, "u": ctypes.c_uint, "z": ctypes.c_size_t,
    "q": ctypes.c_ulonglong,
}  # fmt: skip
#: CU_DEVICE_ATTRIBUTE_*: multiprocessors, bytes of L2, compute capability.
_MULTIPROCESSORS, _L2_BYTES, _MAJOR, _MINOR = 16, 38, 75, 76
#: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
#: CU_EVENT_RECORD_EXTERNAL.
_MOST_SHARED, _THREAD_LOCAL, _EXTERNAL = 8, 1, 1
NEXT = (
    "Take it to a machine with an NVIDIA GPU and its driver: `hwmpq profile --bundle` packs "
    "kernels to be timed there. `hwmpq verify ARTIFACT --emulated` runs one on this CPU."
)


class Gpu:
    """The GPU of that number. name; capability: (9, 0) of sm_90; l2_bytes; bus: its place, as NVML
    names it; driver: the newest CUDA that its driver knows, 13000 is 13.0."""

    suffix = ".cubin"

    def __init__(self, number: int = 0):
        """Raises DeviceError where there is none."""
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        _do("cuDeviceGet", ctypes.byref(device), number)
        self._device = device.value
        _do("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._context = context
        self._enter()
        _do("cuStreamCreate", ctypes.byref(stream), 0)
        self._stream = stream
        self.name, self.bus = self._text("cuDeviceGetName"), self._text("cuDeviceGetPCIBusId")
        self.capability = (self._attribute(_MAJOR), self._attribute(_MINOR))
        self.l2_bytes, self.multiprocessors = (
            self._attribute(a) for a in (_L2_BYTES, _MULTIPROCESSORS)
        )
        self.driver = _number("cuDriverGetVersion")

    def check(self, arch: str, of: Path) -> None:
        """Machine code runs on chips of its own generation that are no older."""
        major, minor = divmod(int(arch.removeprefix("sm_")), 10)
        if self.capability[0] != major or self.capability[1] < minor:
            raise InputError(
                f"{self.name} cannot run {of}", f"code for {arch}",
                f"code for sm_{self.capability[0]}{self.capability[1]}",
                "Compile it for a target that this GPU is of.",
            )  # fmt: skip

    def load(self, code: bytes, of: Path) -> _Module:
        self._enter()
        module = ctypes.c_void_p()
        status = _driver().cuModuleLoadData(ctypes.byref(module), code)
        if status:
            raise InputError(
                f"the GPU's driver does not take the machine code of {of}", _reason(status), None,
                f"It is made for CUDA 13; this driver knows CUDA {self.driver / 1000:g}: "
                "update the driver.",
            )  # fmt: skip
        return _Module(self, module)

    def allocate(self, nbytes: int) -> _Memory:
        self._enter()
        return _Memory(nbytes)

    def write(self, memory: Memory, array: Array) -> None:
        self._enter()
        _do("cuMemcpyHtoDAsync_v2", memory.pointer, array.ctypes.data, array.nbytes, self._stream)

    def read(self, memory: Memory, array: Array) -> None:
        self._enter()
        _do("cuMemcpyDtoHAsync_v2", array.ctypes.data, memory.pointer, array.nbytes, self._stream)
        self.wait()

    def wait(self) -> None:
        _do("cuStreamSynchronize", self._stream)

    def sequence(self, calls: Sequence[Call]) -> Call:
        self._enter()
        for call in calls:  # loads what is loaded on demand, which a recording would not bear
            call()
        self.wait()
        graph = _Graph(self._stream, calls)

        def replay() -> None:
            self._enter()
            graph.launch()

        return replay

    def seconds(self, call: Call, count: int) -> float:
        self._enter()
        begin, end = _Event(), _Event()
        begin.record(self._stream)
        for _ in range(count):
            call()
        end.record(self._stream)
        return end.since(begin)

    def seconds_between(self, calls: Sequence[Call]) -> list[float]:
        self._enter()
        events = [_Event() for _ in range(len(calls) + 1)]

        def stamp(event: _Event) -> Call:
            return lambda: event.record_in_graph(self._stream)

        stamped = [stamp(events[0])]
        for call, event in zip(calls, events[1:], strict=True):
            stamped += [call, stamp(event)]
        graph = _Graph(self._stream, stamped)
        for _ in range(2):  # the first warms up
            graph.launch()
            self.wait()
        return [after.since(before) for before, after in pairwise(events)]

    def _enter(self) -> None:
        """Work of this thread is this GPU's from now on."""
        _do("cuCtxSetCurrent", self._context)

    def _attribute(self, which: int) -> int:
        found = ctypes.c_int()
        _do("cuDeviceGetAttribute", ctypes.byref(found), which, self._device)
        return found.value

    def _text(self, function: str) -> str:
        told = ctypes.create_string_buffer(256)
        _do(function, told, len(told), self._device)
        return told.value.decode(errors="replace")


class _Memory:
    def __init__(self, nbytes: int):
        found = ctypes.c_ulonglong()
        _do("cuMemAlloc_v2", ctypes.byref(found), nbytes)
        self.pointer = found.value
        weakref.finalize(self, _driver().cuMemFree_v2, self.pointer).atexit = False


class _Module:
    """Kernels in the GPU's memory, as long as the process lives."""

    def __init__(self, gpu: Gpu, module: ctypes.c_void_p):
        self._gpu, self._module = gpu, module

    def call(self, launch: Launch, pointers: Sequence[int]) -> Call:
        function = ctypes.c_void_p()
        _do("cuModuleGetFunction", ctypes.byref(function), self._module, launch.kernel.encode())
        if launch.shared_bytes:
            _do("cuFuncSetAttribute", function, _MOST_SHARED, launch.shared_bytes)
        values = (ctypes.c_ulonglong * len(pointers))(*pointers)
        places = [ctypes.addressof(values) + i * 8 for i in range(len(pointers))]
        given = (ctypes.c_void_p * len(pointers))(*places)
        x, y = launch.blocks

        def run() -> None:
            assert values  # what `given` points to lives as long as this function
            _do(
                "cuLaunchKernel", function, x, y, 1, launch.threads, 1, 1, launch.shared_bytes,
                self._gpu._stream, given, None,
            )  # fmt: skip

        return run


class _Graph:
    """Calls recorded once, to be launched as one."""

    def __init__(self, stream: ctypes.c_void_p, calls: Sequence[Call]):
        graph, whole = ctypes.c_void_p(), ctypes.c_void_p()
        _do("cuStreamBeginCapture_v2", stream, _THREAD_LOCAL)
        try:
            for call in calls:
                call()
        finally:
            _do("cuStreamEndCapture", stream, ctypes.byref(graph))
        _do("cuGraphInstantiateWithFlags", ctypes.byref(whole), graph, 0)
        _do("cuGraphDestroy", graph)
        self._stream, self._whole = stream, whole
        weakref.finalize(self, _driver().cuGraphExecDestroy, whole).atexit = False

    def launch(self) -> None:
        _do("cuGraphLaunch", self._whole, self._stream)


class _Event:
    def __init__(self) -> None:
        self._event = ctypes.c_void_p()
        _do("cuEventCreate", ctypes.byref(self._event), 0)
        weakref.finalize(self, _driver().cuEventDestroy_v2, self._event).atexit = False

    def record(self, stream: ctypes.c_void_p) -> None:
        _do("cuEventRecord", self._event, stream)

    def record_in_graph(self, stream: ctypes.c_void_p) -> None:
        """While calls are captured: a node that records at every launch of the graph."""
        _do("cuEventRecordWithFlags", self._event, stream, _EXTERNAL)

    def since(self, before: _Event) -> float:
        """Seconds between two events, once this one has come."""
        _do("cuEventSynchronize", self._event)
        milliseconds = ctypes.c_float()
        _do("cuEventElapsedTime", ctypes.byref(milliseconds), before._event, self._event)
        return milliseconds.value / 1e3


@cache
def gpu(number: int = 0) -> Gpu:
    """The GPU of that number, of those that the process may use. Raises DeviceError."""
    return Gpu(number)


def present() -> bool:
    """Is there a GPU with its driver?"""
    try:
        _driver()
    except DeviceError:
        return False
    return True


@cache
def _driver() -> Any:
    """Raises DeviceError where there is no driver, or it finds no GPU."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise DeviceError("no NVIDIA driver on this machine", error, None, NEXT) from None
    for name, letters in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [_TYPES[c] for c in letters], ctypes.c_int
    status = library.cuInit(0)
    if status:
        raise DeviceError("no NVIDIA GPU on this machine", f"cuInit gave {status}", None, NEXT)
    return library


def _do(name: str, *arguments: Any) -> None:
    """Raises DeviceError for what the driver refuses."""
    function: Callable[..., int] = getattr(_driver(), name)
    status = function(*arguments)
    if status:
        raise DeviceError(f"the GPU's driver refuses {name}", _reason(status))


def _reason(status: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} ({status})"


def _number(name: str) -> int:
    found = ctypes.c_int()
    _do(name, ctypes.byref(found))
    return found.value
