"""Copies in main memory. In: tensors on any device; out: their present values, which later updates do not change."""

from collections.abc import Mapping

import torch
from torch import Tensor

from regpt2.base.console import warn


class HostCopies:
    """Buffers in pinned memory for the tensors of a GPU, made once and used again by the next `take`.

    A GPU writes into pinned memory by itself: all copies are queued at once, and waited for once. Into ordinary
    memory each copy goes through a small buffer of the driver's, and is waited for.
    """

    def __init__(self) -> None:
        self._can_pin = True
        self._buffers: dict[str, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A contiguous copy of each tensor; a GPU's are overwritten by the next `take` of the same names."""
        copies = {
            name: self._begin(name, tensor.detach())
            if tensor.device.type == "cuda"
            else tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        for stream in self._streams.values():
            stream.synchronize()
        return copies

    def _begin(self, name: str, tensor: Tensor) -> Tensor:
        """Ask for one copy, on a stream beside the one that trains."""
        stream = self._streams.get(tensor.device)
        if stream is None:
            stream = self._streams[tensor.device] = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = self._buffers[name] = self._new_buffer(tensor)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))  # the update before has to be over
        with torch.cuda.stream(stream):
            return buffer.copy_(tensor, non_blocking=True)

    def _new_buffer(self, tensor: Tensor) -> Tensor:
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._can_pin)
        except RuntimeError as error:  # the system has no more of such memory
            if not self._can_pin:
                raise
            self._can_pin = False
            warn(f"checkpoints are copied more slowly: no pinned memory ({str(error).splitlines()[0]}).")
            return self._new_buffer(tensor)
