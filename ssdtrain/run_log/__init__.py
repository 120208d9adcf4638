"""What a run did, step by step, in a file of bounded size that survives a crash; and how it is read back.

Knows steps, requests and counters, but no tensors, and not how a run is shown. `Recorder` writes, `read_run` reads.
"""

from ssdtrain.run_log.format import RecordError
from ssdtrain.run_log.reader import Detail, Run, read_run
from ssdtrain.run_log.recorder import Recorder

__all__ = ["Detail", "RecordError", "Recorder", "Run", "read_run"]
