"""DeepSpeed: a section in its JSON turns ssdtrain on. Knows DeepSpeed's engines and configuration.

    "ssdtrain": {"enabled": true, "activations": {"directory": "/local_nvme", "mode": "auto"}}

The keys of "activations" are "directory" and the fields of `ActivationPolicy`; `{local_rank}` in a directory is filled
in. One import is all a script needs:

    import ssdtrain.integrations.deepspeed  # from here on `deepspeed.initialize` honours the section

The import puts a wrapper in the place of `deepspeed.initialize`, once; `uninstall()` takes it away again. A script that
cannot be edited is started by `python -m ssdtrain.launch train.py ...`. A script that said `from deepspeed import
initialize` before the import has the original: it calls `ssdtrain.integrations.deepspeed.initialize` instead, which
takes the same arguments. `engine.ssdtrain.stats` says what happened, and so does a line in DeepSpeed's log every
`steps_per_print` steps. The same section works in the DeepSpeed configurations of Accelerate, of Hugging Face's Trainer
and of Lightning.
"""

from typing import Any

from ssdtrain.integrations import check_version, require

deepspeed: Any = require("deepspeed", "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8")

from ssdtrain.integrations.deepspeed.engine import EngineOffload  # noqa: E402  it needs deepspeed
from ssdtrain.integrations.deepspeed.wrapper import initialize, install, uninstall  # noqa: E402

__all__ = ["EngineOffload", "initialize", "install", "uninstall"]

check_version("deepspeed", deepspeed.__version__)
install()
