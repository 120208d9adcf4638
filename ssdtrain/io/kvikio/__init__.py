"""The engine that hands tensor memory straight to kvikio: GPUDirect Storage where that is real, no slabs anywhere.

Same interface and promises as the other engines (`ssdtrain.io.engine` documents them), with two differences: a piece
counts as copied when its write is over, and device memory may be written from and read into, once its fence says so.
Knows addresses and files, no tensors. `probe` says whether bytes would really go past the host.
"""

from .engine import KvikioEngine, SpillFile
from .prefer import pays
from .probe import GpuDirect, probe

__all__ = ["GpuDirect", "KvikioEngine", "SpillFile", "pays", "probe"]
