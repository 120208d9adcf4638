"""What the user asks for: frozen, validated, from keywords, a mapping, JSON or the environment.

Knows nothing of tensors, files or engines.
"""

from ssdtrain.policy.fields import (
    MIN_STAGING_NBYTES,
    ActivationPolicy,
    OptimizerPolicy,
    ParameterPolicy,
    StatePolicy,
    staging_under,
)
from ssdtrain.policy.options import ActivationOptions, OptimizerOptions, ParameterOptions
from ssdtrain.policy.sizes import Nbytes, parse_nbytes, size_text

__all__ = [
    "MIN_STAGING_NBYTES",
    "ActivationOptions",
    "ActivationPolicy",
    "Nbytes",
    "OptimizerOptions",
    "OptimizerPolicy",
    "ParameterOptions",
    "ParameterPolicy",
    "StatePolicy",
    "parse_nbytes",
    "size_text",
    "staging_under",
]
