"""Safetensors in and out, one tensor after the other: the whole is never in memory.

The package `safetensors` reads; it cannot write without holding everything, so the few bytes of its format are written
here: the length of a JSON header, the header, the tensors (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ssdtrain.io.paths import absolute_path
from ssdtrain.parameters.offload import homes_of

_INDEX = "model.safetensors.index.json"
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def load_safetensors(module: torch.nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Gives a module the values of a safetensors checkpoint, one tensor at a time.

    With `offload_parameters` before, on a module built on the meta device, nothing but one tensor is ever in memory
    beside what stays there: a model larger than memory comes to be. Tensors are cast to the module's dtypes.

    Args:
        module: offloaded or not; what is on the meta device moves to the CPU.
        path: a file, an index of several (``model.safetensors.index.json``), or a directory with either.
        strict: whether names that the module or the checkpoint lacks are errors.

    Raises:
        ImportError: the package safetensors is not installed.
        FileNotFoundError: there is no such checkpoint.
        ValueError: names or shapes do not fit, or a buffer on the meta device is not in the checkpoint.

    Example:
        >>> with torch.device("meta"):
        ...     model = Model(config)
        >>> ssdtrain.offload_parameters(model, "/mnt/nvme")
        >>> ssdtrain.load_safetensors(model, "model.safetensors")
    """
    files = _files(Path(absolute_path(path, "a safetensors checkpoint")))
    wanted = _tensors(module)
    names = _aliases(wanted)
    missing = [name for name, others in names.items() if not any(other in files for other in others)]
    known = {other for others in names.values() for other in others}
    unknown = [name for name in files if name not in known]
    if strict and (missing or unknown):
        raise ValueError(
            f"Expected a checkpoint with the names of the module, got one without {_some(missing)} and with "
            f"{_some(unknown)} beyond them: pass strict=False to load what fits"
        )
    homeless = [n for n, tensor in module.named_buffers() if tensor.is_meta and n not in files]
    if homeless:
        raise ValueError(
            f"Expected every buffer in the checkpoint, got none for {_some(homeless)}: build buffers on the CPU, only "
            "parameters on the meta device"
        )
    found = {name: next((other for other in others if other in files), None) for name, others in names.items()}
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(_open(file)) for file in set(files.values())}
        for name, other in found.items():
            if other is not None:
                _check_shape(name, wanted[name], opened[files[other]].get_slice(other).get_shape())
        for name, other in found.items():
            if other is not None:
                _fill(module, name, wanted[name], opened[files[other]].get_tensor(other))


def save_safetensors(
    module: torch.nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a module's state dict to a safetensors file, one tensor at a time.

    The file appears when it is complete. A tensor with several names is written once, under the first.

    Args:
        module: offloaded or not.
        path: the file; an older one is replaced.
        metadata: texts for the header.

    Raises:
        ValueError: a dtype that safetensors does not have.
        OSError: the file cannot be written.

    Example:
        >>> ssdtrain.save_safetensors(model, "model.safetensors", {"step": "1000"})
    """
    path = absolute_path(path, "a safetensors file")
    every = _tensors(module)
    for home in homes_of(every.values()):
        home.check_whole()
    tensors = {name: every[name] for name in _aliases(every)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"Expected dtypes that safetensors has, got {tensor.dtype} of {name}")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = Path(f"{path}.partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors.values():
                with _in_memory(module, tensor):
                    file.write(_bytes_of(tensor))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _bytes_of(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under all their names."""
    found: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """The first name of every tensor, and all of its names."""
    by_id: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        by_id.setdefault(id(tensor), []).append(name)
    return {names[0]: names for names in by_id.values()}


def _check_shape(name: str, tensor: torch.Tensor, shape: list[int]) -> None:
    if list(tensor.shape) != list(shape):
        raise ValueError(f"Expected {name} of shape {list(tensor.shape)}, got {list(shape)} in the checkpoint")


def _fill(module: torch.nn.Module, name: str, tensor: torch.Tensor, value: torch.Tensor) -> None:
    homes = homes_of([tensor])
    if homes:
        homes[0].fill(tensor, value)
    elif not tensor.is_meta:
        with torch.no_grad():
            tensor.copy_(value)
    elif isinstance(tensor, torch.nn.Parameter):
        fresh = torch.nn.Parameter(value.to(tensor.dtype, copy=True), requires_grad=tensor.requires_grad)
        torch.utils.swap_tensors(tensor, fresh)
    else:
        owner, _, key = name.rpartition(".")
        module.get_submodule(owner)._buffers[key] = value.to(tensor.dtype, copy=True)


def _in_memory(module: torch.nn.Module, tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    homes = homes_of([tensor])
    return homes[0].in_memory([tensor], to_change=False) if homes else contextlib.nullcontext()


def _files(path: Path) -> dict[str, Path]:
    """Which file has each name."""
    if path.is_dir():
        path = next((p for p in (path / _INDEX, path / "model.safetensors") if p.exists()), path / "model.safetensors")
    if not path.exists():
        raise FileNotFoundError(f"Expected a safetensors checkpoint, got nothing at {path}")
    if path.suffix == ".json":
        return {name: path.parent / file for name, file in json.loads(path.read_text())["weight_map"].items()}
    with _open(path) as file:
        return dict.fromkeys(file.keys(), path)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError('Expected the package safetensors: pip install "ssdtrain[safetensors]"') from error
    with safe_open(path, framework="pt") as file:
        yield file


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "none"
