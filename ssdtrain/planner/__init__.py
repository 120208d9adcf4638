"""What goes where and when: a recorded step, a machine and a goal in, a plan out.

Knows numbers only: no torch, no I/O, no clock. The same input gives the same plan on every machine.

Example:
    >>> step = Step((Lifetime(1 << 20, saved=0.1, needed=0.9, released=1.0),), seconds=1.0)
    >>> plan = make_plan(step, Machine(disk=Tier(write_bandwidth=1e9, read_bandwidth=2e9)), Goal())
"""

from ssdtrain.planner.buffers import Buffers, reserve_nbytes
from ssdtrain.planner.decide import make_plan
from ssdtrain.planner.plan import SECONDS_PER_DAY, Goal, Plan
from ssdtrain.planner.probe import make_probe
from ssdtrain.planner.recompute import choose
from ssdtrain.planner.recorded_step import Lifetime, Machine, Step, Tier, Where

__all__ = [
    "SECONDS_PER_DAY",
    "Buffers",
    "Goal",
    "Lifetime",
    "Machine",
    "Plan",
    "Step",
    "Tier",
    "Where",
    "choose",
    "make_plan",
    "make_probe",
    "reserve_nbytes",
]
