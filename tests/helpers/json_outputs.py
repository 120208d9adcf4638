"""What commands print with `--json` beside what the documentation says of it: every field, no other, of its type."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

from pydantic import ConfigDict, create_model

from ssdtrain.tools.cli.outputs import OUTPUTS


def documented(command: str, printed: str) -> Any:
    """What the last line of the output has.

    Raises:
        pydantic.ValidationError: a field is missing, is not documented, or has another type.
    """
    line = printed.splitlines()[-1]
    fields = {name: (hint, ...) for kind in OUTPUTS[command] for name, hint in get_type_hints(kind).items()}
    exact = ConfigDict(strict=True, extra="forbid")
    create_model(command, __config__=exact, **fields).model_validate_json(line)  # type: ignore[call-overload]
    return json.loads(line)
