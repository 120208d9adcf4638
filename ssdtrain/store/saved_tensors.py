"""What the hooks need and no offload context: ranges of storages, in-place errors, hooks that leave everything alone.

Knows records and handles; moves nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

import torch

from ssdtrain.stats import Counters
from ssdtrain.store.record import Resident, SavedRecord

_ALIGNMENT = 512  # of a record's first byte: a view comes back as aligned as it was, so that kernels are the same
_HELD = "_held_by_ssdtrain"  # an attribute of the node, which goes with it
_is_traced = torch.compiler.is_compiling
_WHOLE_STORAGE_FRACTION = 4  # a view of at least a quarter of its storage takes the whole storage along


def is_resized(record: SavedRecord) -> bool:
    """Whether the source was freed behind autograd's back: whoever did that refills it before backward."""
    return record.storage is not None and record.storage.nbytes() != record.storage_nbytes


def widen(span: tuple[int, int], base_nbytes: int) -> tuple[int, int]:
    """The range a record takes: the whole storage of a view's base, unless the view is a small part of it.

    What shares a storage and is no view (`unsafe_chunk`, ``.data``) has a version counter of its own: the bytes around
    it may be changed in place while it is copied.
    """
    start, end = span
    if start < base_nbytes <= (end - start) * _WHOLE_STORAGE_FRACTION:
        return 0, base_nbytes
    return start - start % _ALIGNMENT, end


def modified(what: object, version: int, expected: int) -> RuntimeError:
    """What autograd itself would have raised; `what` is the tensor, or its view spec."""
    if isinstance(what, torch.Tensor):
        shape = "[nested]" if what.is_nested and what.layout is torch.strided else list(what.shape)
        what = f"{str(what.dtype).removeprefix('torch.')}{shape}"
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"{what} is at version {version}; expected version {expected} instead. Hint: find the in-place operation on a "
        "tensor that was saved for backward, and use its out-of-place form or clone the tensor first"
    )


class ItemByItem:
    """Keeps what a function was handed out until its node is over, where it reads `ctx.saved_tensors` item by item.

    Every such access unpacks all of them: without this, each would have all reloaded.
    """

    def __init__(self) -> None:
        """Knows no such function yet."""
        self.kinds: set[type] = set()  # of nodes

    def hold(self, storage: torch.UntypedStorage, *, is_again: bool) -> None:
        """Called where a node was handed out a storage; `is_again`: not for the first time in this backward."""
        node: Any = torch._C._current_autograd_node()
        if not isinstance(node, torch.autograd.function.BackwardCFunction):
            return
        if is_again:
            self.kinds.add(type(node))
        elif type(node) not in self.kinds:
            return
        held: dict[int, torch.UntypedStorage] | None = vars(node).get(_HELD)
        if held is None:
            held = vars(node)[_HELD] = {}
            node.register_hook(lambda *_, held=held: held.clear())
        held[storage._cdata] = storage


def is_computed_again() -> bool:
    """Whether a reentrant checkpoint runs now; see [Note: graphs made in backward] in `hooks`."""
    node = torch._C._current_autograd_node()
    return node is not None and "checkpoint" in node.name().lower()


def innermost_hooks() -> tuple[Any, Any] | None:
    """The pack and unpack hooks that are asked first in this thread, whoever installed them."""
    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


class HookScope(ContextDecorator):
    """A pair of saved-tensor hooks, on in the thread that entered until that thread leaves, whatever others do.

    PyTorch takes off the innermost pair, whoever leaves. Here it is the own pair, also from under hooks that were
    entered later and are left later.
    """

    def __init__(
        self,
        pack: Callable[[torch.Tensor], Any],
        unpack: Callable[[Any], torch.Tensor],
        note: Callable[[str], None] | None = None,
    ) -> None:
        """Installs nothing yet. `note` is told when the hooks stay off."""
        self._note = note
        self._hooks = pack, unpack
        self._entered: list[tuple[threading.Thread, Callable[..., Any]]] = []  # who, as often as they do; the pack hook

    def __enter__(self) -> None:
        """The hooks are on in this thread; where changes in place are allowed those that allow them stay on instead."""
        hooks = innermost_hooks() if allows_mutation() else None
        if hooks is None:
            hooks = self._hooks
        elif self._note is not None:
            self._note("nothing is offloaded inside allow_mutation_on_saved_tensors, which keeps what may be changed")
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
        self._entered.append((threading.current_thread(), hooks[0]))

    def __exit__(self, *error: object) -> None:
        """They are off; hooks of others are as they were.

        Raises:
            RuntimeError: this thread did not enter, and nothing was changed; or the hooks are off already.
        """
        entry = next((e for e in reversed(self._entered) if e[0] is threading.current_thread()), None)
        if entry is None:
            raise not_entered("saved-tensor hooks", [thread for thread, _ in self._entered])
        self._entered.remove(entry)
        if not take_off(entry[1]):
            if innermost_hooks() is not None:  # left on by whoever took these off: one pair for every exit
                torch._C._autograd._pop_saved_tensors_default_hooks()
            raise RuntimeError(
                "Expected saved-tensor hooks to be on until their context is left, got them taken off by a context "
                "that was entered earlier and left earlier: what was saved since went to its hooks. Leave contexts in "
                "the reverse order"
            )


def not_entered(what: str, threads: list[threading.Thread]) -> RuntimeError:
    """The error of whoever leaves what this thread did not enter; `threads` did, and it stays on there."""
    own = threading.current_thread().name
    if not threads:
        return RuntimeError(
            f"Expected {what} that were entered, got a second __exit__, or one without __enter__, in thread {own!r}: "
            "leave once for every time you enter"
        )
    names = ", ".join(sorted({repr(thread.name) for thread in threads}))
    return RuntimeError(
        f"Expected {what} to be left in the thread that entered, {names}, got __exit__ in thread {own!r}: autograd's "
        "hooks belong to a thread. They are still on there: leave them there"
    )


def allows_mutation() -> bool:
    """Whether what is saved now in this thread may be changed in place: PyTorch's own hooks copy it before.

    They see only what they have packed themselves.
    """
    hooks = innermost_hooks()
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_swap_with_cloned.")


def take_off(pack: Callable[[torch.Tensor], Any]) -> bool:
    """Takes one pair of hooks off in this thread, also from under others; whether it was on."""
    above: list[tuple[Any, Any]] = []
    while (top := innermost_hooks()) is not None and pack != top[0]:
        above.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    if top is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for hooks in reversed(above):
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
    return top is not None


def keep_resident() -> HookScope:
    """Inside, saved tensors are left alone: they stay in memory, also in a surrounding `offload_activations`.

    Raises:
        RuntimeError: it is left in a thread that did not enter.

    Example:
        >>> with offload_activations("/mnt/nvme"):
        ...     hidden = body(batch)
        ...     with keep_resident():
        ...         loss = head(hidden)  # needed first by backward
    """
    counters = Counters()

    def pack(tensor: torch.Tensor) -> Resident:
        if _is_traced():
            from ssdtrain.store.not_compiled import aside

            return aside(Resident, tensor, 0, counters)  # type: ignore[no-any-return]
        return Resident(tensor, 0, counters)

    return HookScope(pack, unpack_resident)


def unpack_resident(handle: Resident) -> torch.Tensor:
    """The tensor, unless it was changed meanwhile."""
    if handle.tensor._version != handle.version:
        raise modified(handle.tensor, handle.tensor._version, handle.version)
    return handle.tensor


def hooks_may_be_entered() -> bool:
    """False inside `torch.autograd.graph.disable_saved_tensors_hooks`, which PyTorch tells by this name alone."""
    may: bool = torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    return may
