"""Which device a tensor's memory belongs to, and why it may not be offloaded from there."""

from __future__ import annotations

import torch

from ssdtrain.devices.base import Device
from ssdtrain.devices.cuda import CudaDevice, index_in_use
from ssdtrain.devices.vector_math import settle_vector_math


class Devices:
    """The devices that one offload context has seen tensors of, by torch's name for them.

    Two threads that see a device first at once make one object too many, no harm.
    """

    def __init__(
        self, cpu: Device, *, has_host_tier_only: bool, known: dict[torch.device, Device | str] | None = None
    ) -> None:
        """`cpu`: the device of tensors in host memory (or one that simulates an accelerator there).

        `known`: those of others who share the engine, which both sides add to. With nothing but a host tier, what is in
        host memory already has nowhere to go.
        """
        settle_vector_math()  # before threads compute, the user's or ours: results do not depend on who was first
        self.cpu = cpu
        self._is_cpu_pointless = has_host_tier_only and cpu.driver is None
        self._known = known if known is not None else {}

    def of(self, tensor: torch.Tensor) -> Device | str:
        """The device of a strided tensor, or why nothing is offloaded from it."""
        if tensor.is_cpu:
            return "in host memory already" if self._is_cpu_pointless else self.cpu
        found = self._known.get(tensor.device)
        if found is None:
            found = self._known[tensor.device] = _device_of(tensor.device)
        return found if isinstance(found, str) else found.why_not() or found

    @staticmethod
    def gpu_index() -> int | None:
        """The GPU that is in use, for engines that can move its memory past the host."""
        return index_in_use()

    def trim(self) -> None:
        """Gives idle memory of every device back."""
        for device in (self.cpu, *self._known.values()):
            if not isinstance(device, str):
                device.trim()


def _device_of(device: torch.device) -> Device | str:
    if device.type != "cuda" or device.index is None:
        return f"device {device.type}"
    try:
        return CudaDevice(device.index)
    except RuntimeError as error:
        return f"device {device}: {error}"
