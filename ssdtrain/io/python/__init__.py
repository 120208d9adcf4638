"""The engine in plain Python, where the extension is not built: requests, and workers that make and retry the calls.

Same interface and same promises (`ssdtrain.io.engine` documents them), with ordinary threads and less speed. Knows
addresses and files, no tensors. `BaseEngine` and `Workers` are what another engine in Python builds on.
"""

from .engine import BaseEngine, PythonEngine, check_sizes
from .requests import Chunk, Piece, Read, State, Write
from .spill_file import File, SpillFile
from .worker import EndOfFileError, Fence, FetchJob, Workers, view_of

__all__ = [
    "BaseEngine",
    "Chunk",
    "EndOfFileError",
    "Fence",
    "FetchJob",
    "File",
    "Piece",
    "PythonEngine",
    "Read",
    "SpillFile",
    "State",
    "Workers",
    "Write",
    "check_sizes",
    "view_of",
]
