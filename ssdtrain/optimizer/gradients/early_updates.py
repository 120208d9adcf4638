"""Updates that came in backward: whether `step()` would still make the same ones.

Knows parameters, their groups and gradients, neither state nor drives.

[Note: between backward and step]
An optimizer sees in `step()` what was changed since backward: another learning rate, a gradient that was replaced or
dropped, weights that were clamped or loaded. With `step_in_backward` the update has happened by then. So what it was
made of is remembered, and `step()` raises where that has changed. What is only read in between cannot be seen: weights
have their new values after backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only

from ssdtrain.optimizer.gradients.offloaded_gradient import UsedGradient

_PENDING = -1  # in place of a version
_HINT = (
    "the parameter was updated in backward. Change it before backward, or after step() and zero_grad(); or use "
    "offload_gradients instead"
)


class EarlyUpdates:
    """What the updates since the last step were made of."""

    def __init__(self) -> None:
        """There were none."""
        self._versions: dict[torch.Tensor, int] = {}
        self._options: dict[int, dict[str, Any]] = {}  # of the groups, by index
        self._was_looked_at = False  # state, since backward

    def note(
        self,
        parameters: Iterable[torch.Tensor],
        group_of: Mapping[torch.Tensor, int],
        groups: list[Any],
        is_pending: Callable[[torch.Tensor], bool],
    ) -> None:
        """These have just been updated in backward, with the options that their groups have.

        `is_pending`: whether the CPU still updates it. It gets its values later, from who looks for writes until then.
        """
        for parameter in parameters:
            self._versions[parameter] = _PENDING if is_pending(parameter) else parameter._version
            index = group_of[parameter]
            if index not in self._options:
                self._options[index] = {key: _kept(value) for key, value in groups[index].items() if key != "params"}

    def check(
        self, group_of: Mapping[torch.Tensor, int], groups: list[Any], name_of: Callable[[torch.Tensor], str]
    ) -> None:
        """See [Note: between backward and step].

        Raises:
            RuntimeError: `step()` would make other updates now.
        """
        if self._was_looked_at:
            raise RuntimeError(
                "Expected step() before optimizer.state with step_in_backward, got a look at it after a backward, "
                "which has updated it already: look at it after step(), or use offload_gradients"
            )
        for index, options in self._options.items():
            now = groups[index] if index < len(groups) else {}
            for key, value in options.items():
                if key in now and not _is_same(now[key], value):
                    raise RuntimeError(
                        f"Expected the options of backward in step() with step_in_backward, got {key}={now[key]!r} "
                        f"instead of {value!r} in group {index}: parameters were updated in backward. Change options "
                        "after step() and before the next backward: schedulers step after the optimizer"
                    )
        for parameter in group_of:
            self._check_parameter(parameter, name_of)

    def _check_parameter(self, parameter: torch.Tensor, name_of: Callable[[torch.Tensor], str]) -> None:
        version, is_used = self._versions.get(parameter), isinstance(parameter.grad, UsedGradient)
        if version is None:
            if is_used:
                raise RuntimeError(
                    "Expected a backward before step() with step_in_backward, got none: an earlier step has used and "
                    f"freed the gradient of {name_of(parameter)}. Call optimizer.zero_grad() after each step()"
                )
            return
        if not is_used:
            what = "another one in its place" if parameter.grad is not None else "none"
            raise RuntimeError(
                f"Expected the gradient of {name_of(parameter)} to stay until step(), got {what}: {_HINT}"
            )
        if version != _PENDING and parameter._version != version:
            raise RuntimeError(f"Expected {name_of(parameter)} to stay as it is until step(), got a write: {_HINT}")

    def note_look(self) -> None:
        """Somebody looks at state that `step()` is yet to change. Who only cleans up never comes to `step()`."""
        self._was_looked_at = bool(self._versions)

    def forget(self) -> None:
        """The step is over, or will never be."""
        self._versions, self._options, self._was_looked_at = {}, {}, False


def _kept(value: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), value)


def _is_same(value: Any, kept: Any) -> bool:
    """Tensors by their values, also those in tuples, such as a pair of betas; anything else by `==`."""
    (now, form), (then, other_form) = tree_flatten(value), tree_flatten(kept)
    return form == other_form and all([_is_same_leaf(a, b) for a, b in zip(now, then, strict=True)])


def _is_same_leaf(value: Any, kept: Any) -> bool:
    if isinstance(kept, torch.Tensor):
        return isinstance(value, torch.Tensor) and value.shape == kept.shape and torch.equal(value, kept.to(value))
    return value is kept or bool(value == kept)
