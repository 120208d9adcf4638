"""axolotl: a plugin, and a key of its configuration with what `ssdtrain.Section` says.

plugins:
- ssdtrain.integrations.axolotl.SsdtrainPlugin
ssdtrain:
directory: /mnt/nvme
optimizer: true
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, field_validator

from ssdtrain.api.section import Section
from ssdtrain.integrations import check_version, require

_base: Any = require("axolotl.integrations.base", "pip install axolotl==0.19.0")

__all__ = ["SsdtrainArgs", "SsdtrainPlugin"]


class SsdtrainArgs(BaseModel):
    """What the configuration may have for us; wrong keys and values end axolotl's validation."""

    ssdtrain: dict[str, Any] | None = None
    """A section, see `ssdtrain.Section`."""

    @field_validator("ssdtrain")
    @classmethod
    def _is_section(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            Section.of(value)
        return value


class SsdtrainPlugin(_base.BasePlugin):  # type: ignore[misc]
    """Gives axolotl's trainer the callback of `ssdtrain.integrations.transformers`."""

    def get_input_args(self) -> str:
        """Where our part of the configuration's schema is."""
        return "ssdtrain.integrations.axolotl.SsdtrainArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The callback, where the configuration has the key."""
        if not cfg.get("ssdtrain"):
            return []
        if cfg.get("activation_offloading"):
            raise ValueError(
                f"Expected one that offloads activations, got activation_offloading={cfg['activation_offloading']!r} "
                "beside ssdtrain: remove that key"
            )
        check_version("axolotl")
        from ssdtrain.integrations.transformers import Offload

        return [Offload(dict(cfg["ssdtrain"]))]
