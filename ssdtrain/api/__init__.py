"""What users call: a function for each feature, and a session of all of them for trainers. Knows no trainer."""

from ssdtrain.api.functions import offload_activations, offload_optimizer, offload_parameters, parameter_offload

__all__ = ["offload_activations", "offload_optimizer", "offload_parameters", "parameter_offload"]
