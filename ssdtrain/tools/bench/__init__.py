"""What a drive can do, measured through the engines that training uses, beside the drive's own ceiling.

Knows engines and drives, no training. Every file is a spill file, unlinked when it is opened: nothing is left
behind, whatever happens.
"""

from ssdtrain.tools.bench.advice import Advice, advise
from ssdtrain.tools.bench.drive import Options, Report, Row, bench_drive

__all__ = ["Advice", "Options", "Report", "Row", "advise", "bench_drive"]
