"""The engine in plain Python: the reference for `ssdtrain._C`, and what runs where that is not built.

Same interface and same promises (`ssdtrain.engine` documents them), with ordinary threads and less speed. Knows
addresses and files, no tensors.
"""

from .engine import PythonEngine
from .requests import Read, Write
from .spill_file import SpillFile

__all__ = ["PythonEngine", "Read", "SpillFile", "Write"]
