"""What the user asks for: frozen, validated, from keywords, a mapping, JSON or the environment.

Knows nothing of tensors, files or engines. A policy is checked when it is made, so a typing error stops a run
before training starts.

Example:
    >>> ActivationPolicy(min_nbytes="4MiB", mode="all").min_nbytes
    4194304
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self, Unpack

from ssdtrain.policy.options import ActivationOptions, OptimizerOptions, ParameterOptions
from ssdtrain.policy.sizes import Nbytes, size_text

MIN_STAGING_NBYTES = 64 * 1024
_STAGING_SHARE = 8  # of a memory budget
_STAGING_NBYTES = 128 << 20  # unless it is set
_MAX_SECONDS = 1e9  # 31 years; clocks overflow beyond

# A path may have bytes that are no text, which pydantic would refuse.
_Path = Annotated[
    str,
    Field(min_length=1),
    WrapValidator(lambda path, check: path if isinstance(path, str) and path else check(path)),
]


def staging_under(memory_budget: int) -> int:
    """What staging takes of a budget where it was not set."""
    return min(_STAGING_NBYTES, max(MIN_STAGING_NBYTES, memory_budget // _STAGING_SHARE))


def _shown(name: str, value: object) -> str:
    text = size_text(value) if name.endswith("_nbytes") and isinstance(value, int) else ""
    return repr(value) if not text or text.isdigit() else repr(text)


class _Policy(BaseModel):
    """What all policies share: frozen, and a key that is not theirs is named."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="wrap")
    @classmethod
    def _without_links(cls, data: Any, check: Callable[[Any], Self]) -> Self:
        """Errors of the same type and text, without a link to the library's pages below each."""
        try:
            policy = check(data)
            policy._check_together()
            return policy
        except ValidationError as error:
            items = [(item["type"], item["msg"], item["loc"], item["input"]) for item in error.errors()]
        except ValueError as error:
            items = [("value_error", str(error), (), data)]
        plain: list[InitErrorDetails] = []
        for kind, text, where, value in items:
            custom = PydanticCustomError(kind, "{text}", {"text": text.removeprefix("Value error, ")})
            plain.append({"type": custom, "loc": where, "input": value})
        raise ValidationError.from_exception_data(cls.__name__, plain)

    def _check_together(self) -> None:
        """Raises ValueError where fields that are right by themselves do not go together."""

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        unknown = [key for key in data if key not in cls.model_fields] if isinstance(data, Mapping) else []
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), cls.model_fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            accepted = ", ".join(cls.model_fields)
            raise ValueError(f"Expected keys among {accepted}; got {unknown[0]!r}.{hint}")
        return data

    @classmethod
    def of(cls, policy: Self | Mapping[str, Any] | None) -> Self:
        """The policy meant by what a user passed: a policy, a mapping of its fields, or nothing.

        Raises:
            TypeError: something else was passed.
            pydantic.ValidationError: the mapping has an unknown key or a bad value.
        """
        if policy is None:
            return cls()
        if isinstance(policy, cls):
            return policy
        if isinstance(policy, Mapping):
            return cls.model_validate(dict(policy))
        kind = f"{'an' if cls.__name__[0] in 'AO' else 'a'} {cls.__name__}"
        is_module = hasattr(policy, "named_parameters")
        got = f"a model ({type(policy).__name__}): pass it as model=" if is_module else repr(policy)
        raise TypeError(f"Expected policy to be {kind} or a mapping of its fields, got {got}")

    def __repr__(self) -> str:
        """What differs from the defaults, as it may be written."""
        shown = {name: getattr(self, name) for name, field in type(self).model_fields.items()}
        changed = {name: value for name, value in shown.items() if value != type(self).model_fields[name].default}
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(name, v)}' for name, v in changed.items())})"

    __str__ = __repr__


class ActivationPolicy(_Policy):
    """How activations are offloaded. All sizes are bytes or texts such as ``"16MiB"``.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) an unknown key or a bad value, with what is accepted.
    """

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[ActivationOptions]) -> None: ...

    enabled: bool = True
    """False makes ``offload_activations`` a null context: no hooks, no file, no cost."""

    min_nbytes: Nbytes = Field(default=1 << 20, ge=0)
    """Saved tensors smaller than this stay in memory. 0 means all are offloaded; small ones cost more time per byte."""

    mode: Literal["auto", "all"] = "auto"
    """``"auto"`` keeps a tensor in memory when the drive is behind, so that training never waits for a write.
    ``"all"`` sends everything eligible and waits for the drive: lowest memory, step time at the drive's mercy."""

    only: Literal["marked", "checkpoint_inputs"] | None = None
    """What is offloaded, if not everything: tensors that ``offload.mark(tensor)`` was called with, or those and the
    inputs of activation checkpoints, reentrant or not."""

    keep_last: int = Field(default=0, ge=0)
    """How many of the tensors saved last stay, as backward needs them at once: a guess for mode ``"all"`` and steps
    without a plan. A plan knows better, and with a `memory_budget` this is not used."""

    staging_nbytes: Nbytes = Field(default=_STAGING_NBYTES, ge=MIN_STAGING_NBYTES)
    """Most host memory for bytes on their way to the drive, and the bound on bytes in flight. What exceeds it is waited
    for (``"all"``), queued where a plan sends it, else kept (``"auto"``). Used are 16 MiB, or a sixteenth of what is
    saved."""

    prefetch_nbytes: Nbytes = Field(default=128 << 20, ge=0)
    """Bound on bytes reloaded before backward asks for them; one larger record may be so alone. 0 turns prefetch off:
    every reload is then a stall. Not set, this bound and that of `staging_nbytes` on bytes in flight grow to twice the
    largest record of an accelerator, as far as its memory allows."""

    disk_nbytes: Nbytes | None = Field(default=None, ge=MIN_STAGING_NBYTES)
    """Cap on spill space over all directories. What does not fit stays in memory. None: what the drive has free."""

    memory_budget: Nbytes | None = Field(default=None, gt=0)
    """Stay under so many bytes of saved tensors in memory, staging included, at the least step time that allows it:
    what need not leave stays, and training waits for the drive where it must. None, in mode ``"auto"``: never waits,
    and the peak is as low as that allows."""

    decline_below_nbytes: Nbytes | None = Field(default=None, ge=0)
    """In mode ``"auto"`` without a budget nothing moves while fewer bytes of saved tensors than this are alive at once:
    what moving takes would be more than it frees. It begins with the step that saves more. None: ten times the buffers
    it begins with, 320 MiB; for an accelerator four times what comes back early, 64 MiB. 0: everything moves."""

    trim_memory: Literal["auto", "always", "never"] = "auto"
    """Whether memory that tensors on the CPU free is given back to the system: the C library would keep
    much of it. ``"auto"``: as often as a twentieth of the time allows. ``"always"``: whatever it takes, for the
    smallest process. Nothing to do with an accelerator's memory."""

    recompute: Literal["never", "auto", "all"] = "never"
    """Whether the model's blocks may run a second time in backward instead of keeping what they saved; needs `model`.
    ``"all"``: every block, only their inputs are offloaded: lowest memory, a third more compute. ``"auto"``: those that
    bring memory under `memory_budget` for less time than waiting for the drive would."""

    drive_writes_per_day: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Endurance of the drive as its maker gives it: how often a day it may be written in full. Caps what is written."""

    endurance_tbw: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Endurance in terabytes written, as its maker gives it. Caps what is written: it lasts `drive_life_years`."""

    drive_life_years: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """How long `endurance_tbw` is to last when training never stops."""

    host_nbytes: Nbytes | None = Field(default=None, ge=0)
    """Limit of the host tier: pinned host memory that holds tensors of an accelerator for good, those that backward
    needs first. None: nothing with a directory; without one, half of the memory that is free when it opens."""

    engine: Literal["auto", "io_uring", "threads", "python", "kvikio"] = "auto"
    """Who executes the file requests. ``"auto"`` takes the first that works on this machine and says why. ``"kvikio"``
    (``pip install "ssdtrain[gds]"``) moves GPU memory past the host where GPUDirect Storage is real."""

    io_timeout_seconds: float = Field(default=60.0, gt=0, le=_MAX_SECONDS, allow_inf_nan=False)
    """A request the drive has not answered for so long is reported, its directory not used any more, and nobody waits
    for it any longer: tensors stay in memory, and backward raises an error for bytes that are nowhere else."""

    record: _Path | None = None
    """Writes a record of the run to this file, for ``ssdtrain report``; an older record is replaced. ``{rank}`` and
    ``{local_rank}`` are filled in; without them only rank 0 records. None: no record, and no cost."""

    record_nbytes: Nbytes = Field(default=16 << 20, ge=64 << 10)
    """Limit of the record. Longer runs are recorded more coarsely; the first and the worst steps keep their details."""

    log_every: int = Field(default=0, ge=0)
    """Logs one line per so many steps on the logger ``ssdtrain``, level INFO. 0: none."""

    checksum: bool = False
    """Verify a checksum of every byte read back. Without it, corruption by the drive itself goes undetected."""

    def _check_together(self) -> None:
        """See there."""
        if self.disk_nbytes is not None and self.disk_nbytes < self.min_nbytes:
            raise ValueError(
                f"Expected disk_nbytes of at least min_nbytes ({self.min_nbytes}), got {self.disk_nbytes}: "
                "nothing could ever be offloaded. Raise disk_nbytes or lower min_nbytes"
            )
        if self.recompute == "auto" and (self.memory_budget is None or self.mode != "auto"):
            raise ValueError(
                "Expected memory_budget and mode 'auto' with recompute='auto', which recomputes what the budget needs; "
                f"got memory_budget={self.memory_budget} and mode={self.mode!r}. Set them, or recompute='all'"
            )

    @property
    def is_patient(self) -> bool:
        """Whether training waits for the drive rather than keep a tensor."""
        return self.mode == "all" or self.memory_budget is not None

    def with_staging_that_fits(self) -> ActivationPolicy:
        """The same with less staging, unless that was set: under a memory budget at most an eighth of it."""
        if self.memory_budget is None or "staging_nbytes" in self.model_fields_set:
            return self
        return self.model_copy(update={"staging_nbytes": staging_under(self.memory_budget)})

    @property
    def may_decline(self) -> bool:
        """Whether nothing moves where little is saved: nobody asked for what needs it."""
        return not self.is_patient and self.decline_below_nbytes != 0

    @property
    def idle_nbytes(self) -> int:
        """How much memory of finished reloads is kept for the next ones: none where memory counts more than time."""
        return 0 if self.memory_budget is not None else self.prefetch_nbytes

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ActivationPolicy:
        """Reads ``SSDTRAIN_MIN_NBYTES``, ``SSDTRAIN_MODE``, ...: one variable per field, absent ones default."""
        names = {field: f"SSDTRAIN_{field.upper()}" for field in cls.model_fields}
        return cls.model_validate({f: environment[n] for f, n in names.items() if n in environment})


class StatePolicy(_Policy):
    """How bytes that must not be lost are kept on a drive. All sizes are bytes or texts such as ``"16MiB"``.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) an unknown key or a bad value, with what is accepted.
    """

    enabled: bool = True
    """False leaves everything as it is: no hooks, no file, no cost."""

    min_nbytes: Nbytes = Field(default=64 << 10, ge=0)
    """Tensors smaller than this stay in memory: each costs a request of its own."""

    staging_nbytes: Nbytes = Field(default=64 << 20, ge=MIN_STAGING_NBYTES)
    """Host memory for bytes on their way to the drive, and the bound on bytes in flight."""

    disk_nbytes: Nbytes | None = Field(default=None, ge=MIN_STAGING_NBYTES)
    """Cap on spill space over all directories. None: what the drive has free."""

    host_nbytes: Nbytes | None = Field(default=None, ge=0)
    """Limit of the host tier: pinned host memory for tensors of an accelerator, used before the drive. None: nothing
    with a directory; without one, half of the memory that is free when it opens."""

    engine: Literal["auto", "io_uring", "threads", "python", "kvikio"] = "auto"
    """Who executes the file requests; see `ActivationPolicy.engine`."""

    io_timeout_seconds: float = Field(default=60.0, gt=0, le=_MAX_SECONDS, allow_inf_nan=False)
    """A request the drive has not answered for so long raises an error that names the tensor."""

    checksum: bool = True
    """Verify a checksum of every byte read back: what a drive changed raises an error instead of training on."""


class ParameterPolicy(StatePolicy):
    """How parameters are offloaded."""

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[ParameterOptions]) -> None: ...

    prefetch_nbytes: Nbytes = Field(default=256 << 20, ge=0)
    """Bound on bytes of blocks that are read before they are needed. 0: every block is waited for."""


class OptimizerPolicy(StatePolicy):
    """How optimizer state is offloaded."""

    if TYPE_CHECKING:

        def __init__(self, **options: Unpack[OptimizerOptions]) -> None: ...

    chunk_nbytes: Nbytes = Field(default=32 << 20, gt=0)
    """State that is updated at once. The step holds about three chunks in memory, and always at least one parameter's
    state."""

    step_in_backward: bool | Literal["together"] = False
    """Update each parameter in backward, as soon as its gradient is there, and free the gradient: all gradients are
    never in memory at once, and the drive works while backward computes. Not with gradient clipping, which needs all of
    them, a GradScaler or in a job of several processes: who reads a gradient that is freed gets an error, until
    ``zero_grad()``. With several backward passes per step wrap all but the last one in ``optimizer.accumulate()``, and
    those that are not for this optimizer (a generator's, say). ``"together"``: a backward may also reach parameters of
    other optimizers, each of which updates its own. Known are those that are offloaded."""

    offload_gradients: bool = False
    """Send each gradient to the drive as soon as backward has it, and back for its parameter's update: all of them are
    never in memory at once, also with accumulation and clipping. What stands in ``parameter.grad`` in between reads
    and changes the gradient on the drive: norms, checks, hooks and GradScaler work as without, and what they read or
    change is offloaded; ``clip_grad_norm_`` with the 2-norm costs nothing. Not in a job of several processes."""

    update_on: Literal["device", "cpu"] = "device"
    """Who does the arithmetic for parameters of an accelerator. ``"device"``: it does, and state goes there and
    back. ``"cpu"``: gradients and parameters are copied to pinned host memory, the optimizer takes its step there
    (best with ``fused=True``) in a thread of its own, and the new parameters are copied back; state is on the
    drive, or without a directory in host memory, and never on the device. The step holds about three chunks of
    state in host memory, their gradients and parameters, in memory that PyTorch pins and `host_nbytes` does not
    count. Results equal those of the same optimizer on the CPU, to the bit. With `step_in_backward` it works while
    backward computes. Parameters in host memory are updated there in any case."""

    master_weights: bool = False
    """With ``update_on="cpu"``, for bfloat16 and float16 parameters of an accelerator: keep a float32 copy with the
    state, update that and round it to the parameter. Results are those of a float32 optimizer. State dicts have it as
    ``"master_param"``; a parameter that somebody else has changed replaces it."""

    delayed_update: bool = False
    """With ``update_on="cpu"``: ``step()`` begins the update and returns; the next ``step()``, ``flush()`` or
    ``close()`` gives the parameters their new values, all at once. So forward and backward of step n + 1 compute beside
    the update of step n, with parameters from before it: results differ from those without, and equal to the bit those
    of a loop that updates one step late. The learning rate is the one at ``step()``, which takes the gradients. All
    gradients and parameters are in host memory meanwhile. Call ``flush()`` before a checkpoint, an evaluation and the
    end. Not with `step_in_backward`, `offload_gradients` or parameters in host memory."""

    def _check_together(self) -> None:
        """See there."""
        if self.master_weights and self.update_on != "cpu":
            raise ValueError("Expected update_on='cpu' with master_weights, got 'device': the CPU keeps them")
        if self.delayed_update and self.update_on != "cpu":
            raise ValueError("Expected update_on='cpu' with delayed_update, got 'device': the CPU works beside it")
        mode = next((m for m in ("step_in_backward", "offload_gradients") if getattr(self, m)), None)
        if self.delayed_update and mode:
            raise ValueError(f"Expected delayed_update or {mode}, got both: all gradients are taken at once, in step()")
        if self.step_in_backward and self.offload_gradients:
            raise ValueError("Expected step_in_backward or offload_gradients, got both: the first leaves no gradients")
