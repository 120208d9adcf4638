"""ms-swift: a callback by name.

    SSDTRAIN_DIR=/mnt/nvme swift sft --external_plugins ssdtrain_plugin.py --callbacks ssdtrain ...

`ssdtrain_plugin.py` is one line, `import ssdtrain.integrations.swift`, which makes the name known. ms-swift makes its
callbacks itself: what they do is said in the environment, see `ssdtrain.Section.from_environment`.
"""

from __future__ import annotations

from typing import Any

from ssdtrain.integrations import check_version, require
from ssdtrain.integrations.transformers import Offload

_callbacks: Any = require("swift.callbacks.mapping", "pip install ms-swift==4.6.0")

__all__ = ["SwiftOffload"]


class SwiftOffload(Offload):
    """The callback of `ssdtrain.integrations.transformers`, made as ms-swift makes its own."""

    def __init__(self, args: Any, trainer: Any) -> None:
        """Does as the environment says."""
        super().__init__()
        found = [name for name in getattr(args, "callbacks", None) or [] if name == "activation_cpu_offload"]
        if found:
            raise ValueError("Expected ssdtrain or activation_cpu_offload, got both: remove one from --callbacks")


check_version("ms-swift")
_callbacks.callbacks_map["ssdtrain"] = SwiftOffload
