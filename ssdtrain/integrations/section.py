"""The "ssdtrain" section of another framework's configuration; it is the same in all of them."""

from ssdtrain.api.section import ACTIVATION_KEYS, KEYS, Section

__all__ = ["ACTIVATION_KEYS", "KEYS", "Section"]
