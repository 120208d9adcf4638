"""The files of a safetensors checkpoint: which tensor is where, and what can be written so that it can be read back.

Knows files, names and dtypes, and nothing of where a tensor's bytes are. The package `safetensors` reads; it cannot
write without holding everything, so the few bytes of its format are made here: the length of a JSON header, the header,
the tensors (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

_INDEX = "model.safetensors.index.json"
_METADATA = "__metadata__"
_MAX_HEADER_NBYTES = 100_000_000  # of the package that reads
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_READABLE = {*_NAMES.values(), "F8_E4M3", "F8_E5M2", "C64"}  # can be copied into any other


# -- out ---------------------------------------------------------------------------------------------------------------


def header_of(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """What stands before the bytes of these tensors.

    Raises:
        ValueError: it could not be read back: a name, a text of the metadata, a dtype or a kind of tensor.
    """
    header: dict[str, Any] = {_METADATA: _checked_texts({"format": "pt", **metadata})}
    start = 0
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_NBYTES:
        raise ValueError(
            f"Expected names and metadata of at most {_MAX_HEADER_NBYTES} bytes, which readers of safetensors take, got"
            f" {len(text)}: shorten the metadata"
        )
    return struct.pack("<Q", len(text)) + text


def _checked_texts(metadata: Mapping[str, str]) -> dict[str, str]:
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ValueError(
                f"Expected texts as keys and values of the metadata, which is all that safetensors reads, got "
                f"{key!r}: {value!r}; pass str(...) or json.dumps(...) of it"
            )
        _check_text(f"{key}{value}", f"the metadata {key!r}")
    return dict(metadata)


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"Expected {what} in characters that have UTF-8, got {error.reason}") from error


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    _check_text(name, f"the name {name!r}")
    if name == _METADATA:
        raise ValueError(f"Expected names other than {_METADATA}, which safetensors keeps for texts: rename the tensor")
    if torch.nn.parameter.is_lazy(tensor):
        raise ValueError(f"Expected tensors with a shape, got an uninitialised one: {name}; run the module once before")
    is_plain = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    if not is_plain or tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(
            f"Expected dense tensors, got {type(tensor).__name__} of layout {tensor.layout}: {name}; safetensors has "
            "bytes of plain tensors only: convert it, or save state_dict() with torch.save"
        )
    if tensor.dtype not in _NAMES:
        raise ValueError(
            f"Expected dtypes that safetensors has, got {tensor.dtype} of {name}; cast it, or save state_dict() with "
            "torch.save"
        )


# -- in ----------------------------------------------------------------------------------------------------------------


def files_of(path: Path) -> dict[str, Path]:
    """Which file has each name.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file, or the index of several, is malformed.
    """
    if path.is_dir():
        path = next((p for p in (path / _INDEX, path / "model.safetensors") if p.exists()), path / "model.safetensors")
    if not path.exists():
        raise FileNotFoundError(f"Expected a safetensors checkpoint, got nothing at {path}")
    if path.suffix == ".json":
        return _indexed(path)
    with opened(path) as file:
        return dict.fromkeys(file.keys(), path)


def _indexed(path: Path) -> dict[str, Path]:
    """What an index says. Its files are beside it or below: it was often downloaded."""
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected a JSON index of safetensors files, got {error}: {path}") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise ValueError(f'Expected an index with a "weight_map" of names and files, got none: {path}')
    found = {}
    for name, file in places.items():
        if not isinstance(file, str) or not file or "\0" in file:
            raise ValueError(f"Expected the name of a file for {name!r}, got {file!r} in {path}")
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise ValueError(f"Expected files in the directory of the index, got {file!r} for {name!r} in {path}")
        found[name] = path.parent / file
    for file in dict.fromkeys(found.values()):
        if not file.exists():
            raise FileNotFoundError(f"Expected every file of {path}, got nothing at {file}: copy or download it too")
    return found


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{duplicate!r} twice")
    return found


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of the package `safetensors`.

    Raises:
        ImportError: the package is not installed.
        ValueError: it is no regular file, or malformed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError('Expected the package safetensors: pip install "ssdtrain[safetensors]"') from error
    if not path.is_file():
        raise ValueError(f"Expected a safetensors file, got something else at {path}")
    try:
        with path.open("rb") as opened:  # whose name may be no UTF-8, which the package does not take
            reader = safe_open(f"/proc/self/fd/{opened.fileno()}", framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"Expected a whole safetensors file, got: {error}; in {path}: copy or download it again"
        ) from error
    with reader as file:
        yield file


def check_entry(file: Any, path: Path, name: str, shape: list[int], own_name: str) -> None:
    """Whether an opened file has a tensor of this name that fits.

    Raises:
        ValueError: it has none, or one of another shape or of a dtype that cannot be cast.
    """
    try:
        entry = file.get_slice(name)
    except Exception as error:  # safetensors' own, which the module does not import
        raise ValueError(f"Expected {name} in {path}, as the index says, got: {error}; download both again") from error
    if entry.get_shape() != shape:
        raise ValueError(f"Expected {own_name} of shape {shape}, got {entry.get_shape()} in the checkpoint, {path}")
    if entry.get_dtype() not in _READABLE:
        raise ValueError(f"Expected dtypes that can be cast, got {entry.get_dtype()} of {name} in {path}")
