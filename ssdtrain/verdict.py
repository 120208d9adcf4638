"""Whether an offload did anything, and if not, one sentence: what there was, what moved, why no more, what to do.

Counters in, a sentence or None out. Knows no tensors, and not when anything is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ssdtrain.policy import ActivationPolicy
from ssdtrain.state_stats import StateCounters
from ssdtrain.stats import Counters, nbytes_text

DISABLED = "policy enabled=False: nothing is offloaded"

_ENOUGH = 0.01  # of the bytes that could move
_FEW_NBYTES = 16 << 20  # of saved tensors at once: not worth a smaller `min_nbytes`
_NO_GAIN = ("weight", "refilled by its owner", "empty", "no memory of its own")  # in memory anyway
_SMALL = "smaller than min_nbytes"
TOO_LITTLE = "too little to gain"
"""Why records stayed of which too few were alive at once."""
_NOT_PLAIN = "only plain strided tensors are offloaded"

_REMEDIES = {
    "saved during backward": "what a reentrant checkpoint computes again is saved there: use "
    "torch.utils.checkpoint(use_reentrant=False), or policy recompute='all'",
    "in host memory already": "pass a directory: without one only tensors of an accelerator move, to host memory",
    "no engine open in this process": "make the offload, or enter it, in the process that trains, and close it after",
    "engine python moves host memory only": "build the extension, which moves tensors of accelerators",
    "CUDA graph capture": "replayed graphs save where nothing may move: train without capturing forward",
    "drive behind": "the drive is slower than training; mode='all' waits for it, `ssdtrain bench` measures it",
    "drive stuck": "look after the drive, or pass another directory",
    "no directory left": "look after the drive, or pass another directory",
    "no spill space": "free some space, raise disk_nbytes, or pass another directory",
    "host tier full": "raise host_nbytes, or pass a directory",
    "among the last saved": "the policy's keep_last has them stay: lower it",
    "not chosen": "mark() what is to be offloaded, checkpoint for only='checkpoint_inputs', or leave `only` out",
    "outlives its graph": "somebody holds these when backward is over, so nothing would be freed: hold them no longer",
    "tensor subclass": "its class does not say what it is made of: give it __tensor_flatten__ and __tensor_unflatten__",
    "nested": _NOT_PLAIN,
    "not strided": _NOT_PLAIN,
    "quantised": _NOT_PLAIN,
    "conjugate or negative view": _NOT_PLAIN,
    "functorch": _NOT_PLAIN,
    "carries attributes": "backward may ask the very object for them: save a clone() of it, which has none",
    "outside the blocks": "name more modules with blocks=[...]",
    "shared between blocks": "name one module that holds all who share it with blocks=[...]",
    "shares its memory with another tensor": "give each parameter memory of its own",
}


@dataclass(frozen=True)
class Training:
    """What is known of a training besides the counters."""

    is_over: bool
    """Whether the run is over; else its first step is."""
    num_entered: int
    """How often the context was entered."""
    num_steps: int
    """Steps of optimizers since it was entered, or, if it never was, since it was made."""
    unseen: str = ""
    """Why the hooks see nothing, where that was seen."""


def on_activations(counters: Counters, policy: ActivationPolicy, training: Training) -> str | None:
    """The sentence about saved activations; None where there is nothing to be said."""
    when = "in the whole run" if training.is_over else "in the first step"
    if not training.num_entered:
        steps = f", while optimizers took {training.num_steps} steps" if training.num_steps else ""
        return (
            f"an offload of activations was made and never entered{steps}: nothing was saved in it and nothing moved; "
            "write `with offload_activations(...):` round forward, or do not make it"
        )
    if not counters.num_saved:
        return _on_nothing_saved(when, training)
    left = {reason: (entry[0], entry[1]) for reason, entry in counters.skips.items() if reason not in _NO_GAIN}
    left_nbytes = sum(nbytes for _, nbytes in left.values())
    moved = counters.offloaded_nbytes
    if moved and moved >= _ENOUGH * (moved + left_nbytes):
        return None
    says = f"{_amount(moved, moved + left_nbytes)} was offloaded {when}: autograd saved {counters.num_saved} tensors, "
    if not left:
        return f"{says}{_why_none_was_left(counters)}: there is nothing to gain, leave ssdtrain out"
    if counters.is_declining and counters.pays_at_nbytes:  # else there was not even one that could move
        if not training.is_over or counters.plan:
            return None  # not known yet, or it was said
        return (
            f"nothing was offloaded {when}: {why_declined(counters)}, by itself where a step saves so much; "
            "policy decline_below_nbytes=0 has them move anyway"
        )
    main, (num, nbytes) = _main(left)
    if main == "planned to stay" and policy.memory_budget is not None:
        return None  # as was asked: what need not leave stays
    says += f"{nbytes_text(moved)} left memory, and in memory stayed {_list(left)}; "
    if main == _SMALL:
        peak = counters.peak_saved_nbytes
        little = f"at most {nbytes_text(peak)} is saved at once, which is little to gain: leave ssdtrain out, or "
        return says + (little if peak < _FEW_NBYTES else "") + _remedy(main, (num, nbytes))
    if main == "planned to stay":
        plan = f" ({counters.plan})" if counters.plan else ""
        return f"{says}the plan gains nothing by moving more{plan}: see offload.plan, or ask for memory_budget=..."
    return says + _remedy(main, (num, nbytes))


def why_declined(counters: Counters) -> str:
    """The sentence about too little that is saved for moving to pay."""
    saved, pays_at = nbytes_text(counters.without_nbytes), nbytes_text(counters.pays_at_nbytes)
    return f"saved tensors are {saved}: nothing to gain; offloading begins to pay at about {pays_at} here"


def _on_nothing_saved(when: str, training: Training) -> str | None:
    if not training.num_steps:
        return None  # an evaluation, or no forward yet
    if training.unseen:
        return f"nothing was offloaded {when}: autograd showed no saved tensor to the hooks, since {training.unseen}"
    if not training.is_over:
        return None  # a later forward will tell
    return (
        f"nothing was offloaded {when}: optimizers took {training.num_steps} steps, and autograd showed the hooks no "
        "saved tensor: forward ran outside the context, in another thread, or inside saved-tensor hooks of others; "
        "enter the context round forward, innermost, in the thread that runs it"
    )


def _why_none_was_left(counters: Counters) -> str:
    num_in_memory = sum(counters.skips.get(reason, (0,))[0] for reason in _NO_GAIN)
    if num_in_memory >= counters.num_saved:
        return "all of which are weights, or others that are in memory anyway"
    return "and backward wanted what could have left before it did, since what is saved last is needed first"


def on_parameters(counters: StateCounters) -> str | None:
    """The sentence about parameters that are being offloaded."""
    left = {reason: (entry[0], entry[1]) for reason, entry in counters.stays.items()}
    what, none = "the parameters was offloaded", "the module has none, leave offload_parameters out"
    return _on_state(counters, left, what, none)


def on_optimizer(counters: StateCounters, name: str, left: Mapping[str, tuple[int, int]]) -> str | None:
    """The sentence about the state of an optimizer that has taken a step. `left`: what stayed, by reason."""
    what = "the optimizer state was offloaded in the first step"
    none = f"{name} keeps none as it is set, so there is nothing to gain; leave offload_optimizer out"
    return _on_state(counters, left, what, none)


def _on_state(counters: StateCounters, left: Mapping[str, tuple[int, int]], what: str, none: str) -> str | None:
    """What to say of too little that left: `none` where nothing is `left` either."""
    total = counters.away_nbytes + sum(nbytes for _, nbytes in left.values())
    if counters.num_away and counters.away_nbytes >= _ENOUGH * total:
        return None
    says = f"{_amount(counters.away_nbytes, total)} of {what}"
    return f"{says}: in memory stay {_list(left)}; {_remedy(*_main(left))}" if left else f"{says}: {none}"


def _amount(moved: int, total: int) -> str:
    return "nothing" if not moved else f"next to nothing ({nbytes_text(moved)} of {nbytes_text(total)})"


def _list(left: Mapping[str, tuple[int, int]]) -> str:
    largest = sorted(left.items(), key=lambda item: -item[1][1])
    texts = [f"{count} x {reason} ({nbytes_text(nbytes)})" for reason, (count, nbytes) in largest[:3]]
    return ", ".join(texts) + (f" and {len(left) - 3} other reasons" if len(left) > 3 else "")


def _main(left: Mapping[str, tuple[int, int]]) -> tuple[str, tuple[int, int]]:
    return max(left.items(), key=lambda item: item[1][1])


def _remedy(reason: str, stayed: tuple[int, int]) -> str:
    if reason == _SMALL:  # half of the mean size: most of the bytes are offloaded
        largest = max(1, stayed[1] // max(1, stayed[0]) // 2)
        return f"pass policy={{'min_nbytes': {1 << (largest.bit_length() - 1)}}} to have most of them offloaded"
    if reason.startswith("device "):
        return "only tensors on the CPU and on CUDA devices are offloaded"
    return _REMEDIES.get(reason, "see print(stats)")
