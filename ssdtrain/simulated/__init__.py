"""A simulated accelerator, for proving the logic of streams on any machine."""

from ssdtrain.simulated.device import SimulatedDevice
from ssdtrain.simulated.driver import SimulatedDriver
from ssdtrain.simulated.order import UnorderedAccessError
from ssdtrain.simulated.streams import SimulationStuckError

__all__ = ["SimulatedDevice", "SimulatedDriver", "SimulationStuckError", "UnorderedAccessError"]
