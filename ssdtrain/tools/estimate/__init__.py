"""What a training run needs, before it runs: activation bytes, bandwidth to hide them, memory, drive life.

Knows arithmetic only: no torch, no I/O. Sources: Korthikanti et al. 2022 (arXiv 2205.05198) for activation bytes,
the SSDTrain paper (arXiv 2408.10013) for bandwidth and life.
"""

from ssdtrain.tools.estimate.choices import ON_GPU, Choice, Host, best, choices, gpus_that_fit, host_of
from ssdtrain.tools.estimate.drives import Drives
from ssdtrain.tools.estimate.gpu import GPUS, Gpu, gpu_of
from ssdtrain.tools.estimate.layer import layer_flops, layer_nbytes, layer_parameters
from ssdtrain.tools.estimate.run import Estimate, estimate
from ssdtrain.tools.estimate.shape import KINDS, SHARDINGS, Shape

__all__ = [
    "GPUS",
    "KINDS",
    "ON_GPU",
    "SHARDINGS",
    "Choice",
    "Drives",
    "Estimate",
    "Gpu",
    "Host",
    "Shape",
    "best",
    "choices",
    "estimate",
    "gpu_of",
    "gpus_that_fit",
    "host_of",
    "layer_flops",
    "layer_nbytes",
    "layer_parameters",
]
