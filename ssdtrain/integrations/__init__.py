"""Other frameworks: each module here translates between one of them and ssdtrain, and is imported by name.

Knows public names only. Nothing here is imported by `import ssdtrain`: a framework that is not used costs nothing
and need not be installed.
"""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import version
from types import MappingProxyType, ModuleType

TESTED_VERSIONS = MappingProxyType(
    {
        "deepspeed": ("0.19.8",),
        "megatron-core": ("0.16.1",),
        "transformers": ("5.24.0",),
        "accelerate": ("1.15.0",),
        "lightning": ("2.6.6",),
        "pytorch_lightning": ("2.6.6",),
        "axolotl": ("0.19.0",),
        "ms-swift": ("4.6.0",),
    }
)
"""Versions of each framework that the tests ran with."""

READ_VERSIONS = MappingProxyType(
    {
        "torchtitan": ("0.3.0", "`Trainer.forward_backward_step`; a subclass's `Config` is a dataclass with slots"),
        "torchtune": (
            "0.6.1, 0.7.0 (bd2a0fc)",
            "`activations_handling_ctx` of its recipes, after `setup`",
        ),
        "composer": ("0.32.1, 0.33.0.dev0 (6405188)", "`Callback`'s events take `(state, logger)`; `State.optimizers`"),
        "pytorch-ignite": ("0.5.5, 0.6.0 (de08e79)", "`Engine(process_function).run(data)`"),
        "megatron-bridge": (
            "0.3.1",
            "`CallbackManager.add` takes what has `on_train_start` and the like",
        ),
        "axolotl": ("0.19.0", "`BasePlugin.get_input_args`, `add_callbacks_post_trainer(cfg, trainer)`"),
        "ms-swift": ("4.6.0", "`callbacks_map[name](args, trainer)`, filled by `--external_plugins`"),
        "llamafactory": ("0.9.5", "`llamafactory.cli`, and `llamafactory.launcher` in each process; `use_unsloth_gc`"),
        "unsloth-zoo": ("0373fcc", "what it puts in the place of PyTorch's checkpoint and of its autograd function"),
    }
)
"""Of packages that the tests do not install: the version, or commit, in whose source was read what is used of it."""

TESTED_TORCH = ("2.9.1", "2.11.0", "2.13.0", "2.14.1")
"""Versions of PyTorch tried, oldest first; which tests ran with which stands in the documentation."""


def require(package: str, install: str) -> ModuleType:
    """The module of a framework.

    Raises:
        ImportError: it is not installed; the message has the command, `install`.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"Expected {package} to be importable for ssdtrain.integrations.{package}, got: {error}. "
            f"Install the version tested: {install}"
        ) from error


def check_version(package: str, found: str | None = None) -> None:
    """Warns about a version that the tests have not run with; `found` is what is installed unless given."""
    found = version(package) if found is None else found
    tested = TESTED_VERSIONS[package]
    if found.partition("+")[0] not in tested:
        warnings.warn(
            f"Expected {package} {' or '.join(tested)}, which ssdtrain is tested with, got {found}: it may well work; "
            f"compare losses of a few steps with and without ssdtrain, or install {package}=={tested[-1]}",
            RuntimeWarning,
            stacklevel=2,
        )
