"""A simulated accelerator, for proving the logic of streams on any machine. Knows neither records nor files."""

from ssdtrain.devices.simulated.device import SimulatedDevice
from ssdtrain.devices.simulated.driver import SimulatedDriver
from ssdtrain.devices.simulated.order import UnorderedAccessError
from ssdtrain.devices.simulated.streams import SimulationStuckError

__all__ = ["SimulatedDevice", "SimulatedDriver", "SimulationStuckError", "UnorderedAccessError"]
