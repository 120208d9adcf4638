"""Drives of one GPU: what they take per second, and how long they last.

Life is counted from the rated endurance. Ratings are made for random writes; large sequential ones wear a drive less,
which the paper puts at a factor of 2.5 (write amplification). That flash holds out 86 times longer when data need to be
kept for a day only, as the paper also counts, no drive on the market offers: it is not part of any default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True)
class Drives:
    """All drives that one GPU writes to.

    Raises:
        ValueError: nothing, or less than nothing.
    """

    num: int = 1
    """How many."""
    write_gbs: float = 6.0
    """GB/s of one drive, in the long run."""
    tbw: float | None = None
    """Rated endurance of one drive in terabytes written."""
    price: float | None = None
    """Of one drive, in any currency."""
    wear_factor: float = 1.0
    """How much more than its rating it takes."""

    def __post_init__(self) -> None:
        """Checks."""
        for name in ("num", "write_gbs", "tbw", "price", "wear_factor"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Expected {name} above 0, got {value}")

    @property
    def write_bandwidth(self) -> float:
        """Bytes per second."""
        return self.num * self.write_gbs * 1e9

    def life_days(self, bytes_per_second: float) -> float | None:
        """How long they last when so much is written all the time; None when the endurance is not known."""
        if self.tbw is None:
            return None
        if not bytes_per_second:
            return math.inf
        return self.num * self.tbw * 1e12 * self.wear_factor / bytes_per_second / _SECONDS_PER_DAY

    def price_per_day(self, bytes_per_second: float) -> float | None:
        """What wearing them out costs."""
        life = self.life_days(bytes_per_second)
        return None if self.price is None or life is None else self.num * self.price / life
