"""Both runs while they train, side by side on a terminal; where there is none, nothing.

Shows what the comparison tells of every step. Lines of progress go on appearing above it.
"""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ssdtrain.stats import nbytes_text
from ssdtrain.tools.demo.compare import ROLES, RunResult, Standing

_BAR_WIDTH = 24
_LEVELS = " ▁▂▃▄▅▆▇█"


class LiveView:
    """A picture of a `Standing` at the foot of a terminal."""

    def __init__(self, console: Console) -> None:
        """Shows nothing before `show`."""
        self._console = console
        self._live = Live(console=console, transient=True, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> LiveView:
        """Begins to draw."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def show(self, standing: Standing) -> None:
        """Draws where both runs are."""
        if self._live is not None:
            self._live.update(picture(standing))


def picture(standing: Standing) -> Group:
    """The two runs as columns: steps, time, memory, loss."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    for _ in ROLES:
        table.add_column(no_wrap=True)
    table.add_row("", *[Text(role, style="bold") for role in ROLES])
    results = [standing.results[role] for role in ROLES]
    steps = standing.settings.steps
    table.add_row("steps", *[_bar(len(result.step_seconds), steps) for result in results])
    table.add_row("", *[f"{len(result.step_seconds)} of {steps}" for result in results])
    table.add_row("step time", *[_times(result) for result in results])
    most = max([_peak(standing, role) for role in ROLES])
    table.add_row("saved tensors, peak", *[_bar(_peak(standing, role), most) for role in ROLES])
    table.add_row("", *[nbytes_text(_peak(standing, role)) if _peak(standing, role) else "" for role in ROLES])
    table.add_row("loss", *[_loss(result) for result in results])
    return Group(table, *_drive(standing))


def _bar(done: float, total: float) -> ProgressBar:
    return ProgressBar(total=total or 1, completed=done, width=_BAR_WIDTH)


def _peak(standing: Standing, role: str) -> int:
    return standing.so_far.get(role, {}).get("peak_saved_nbytes") or 0


def _times(result: RunResult) -> str:
    """The latest, and all as a line of small bars."""
    times = result.step_seconds[-_BAR_WIDTH:]
    if not times:
        return ""
    heights = [_LEVELS[round(seconds / max(times) * (len(_LEVELS) - 1))] for seconds in times]
    return f"{times[-1]:.2f} s {''.join(heights)}"


def _loss(result: RunResult) -> str:
    return f"{float.fromhex(result.losses[-1]):.6f}" if result.losses else ""


def _drive(standing: Standing) -> list[Text]:
    told = standing.so_far.get("ssdtrain", {})
    if "written_nbytes" not in told:
        return []
    line = (
        f"drive: {nbytes_text(told['written_nbytes'])} written, {nbytes_text(told['read_nbytes'])} read;"
        f" waited {told['stall_seconds']:.3f} s"
    )
    return [Text(line, style="dim"), *([Text(f"plan: {told['plan']}", style="dim")] if told["plan"] else [])]
