"""Memory of GPUs of one host that processes open for each other, by CUDA's driver."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import final

import torch

from mtp_engine.errors import EngineError

_LAZILY = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    """CUipcMemHandle"""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


@final
class SharedMemory:
    """Zeros on this process's GPU, and those of the others."""

    def __init__(self, size: int, device: torch.device, publish: Callable[[bytes], None]) -> None:
        """size: bytes. publish: hands what the others `open` to them. Raises EngineError."""
        self._device, self._own, self._opened = device, ctypes.c_uint64(), list[int]()
        torch.zeros(1, device=device)  # see that there is a context
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._call("cuMemAlloc_v2", ctypes.byref(self._own), ctypes.c_size_t(size))
        self._call("cuMemsetD8_v2", self._own, ctypes.c_ubyte(0), ctypes.c_size_t(size))
        torch.cuda.synchronize(device)
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), self._own)
        publish(bytes(handle))

    @property
    def address(self) -> int:
        return self._own.value

    def open(self, published: bytes) -> int:
        """Where another's memory is for this process. Raises EngineError."""
        address = ctypes.c_uint64()
        self._call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _Handle.from_buffer_copy(published),
            ctypes.c_uint(_LAZILY),
        )
        self._opened.append(address.value)
        return address.value

    def close(self) -> None:
        """Once nothing that uses it runs any more. Closing twice does no harm."""
        opened, own, self._opened, self._own = self._opened, self._own, [], ctypes.c_uint64()
        with suppress(RuntimeError, EngineError):  # of a GPU that has failed nothing is left
            torch.cuda.synchronize(self._device)
            for address in opened:
                self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))
            if own.value:
                self._call("cuMemFree_v2", own)

    def _call(self, name: str, *given: object) -> None:
        with torch.cuda.device(self._device):
            if code := getattr(self._driver, name)(*given):
                raise EngineError(
                    f"the GPUs cannot share memory ({name} gives error {code}): use --attention torch, which is slower"
                )
