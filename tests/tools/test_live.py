"""The live view of the demo: a picture on a terminal, nothing elsewhere."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from ssdtrain.tools.demo.compare import RunResult, Standing
from ssdtrain.tools.demo.live_view import LiveView, picture
from ssdtrain.tools.demo.settings import DemoSettings


def standing() -> Standing:
    results = {
        "plain": RunResult("plain", ["0x1.8p+1", "0x1.0p+1"], [0.5]),
        "ssdtrain": RunResult("ssdtrain", ["0x1.8p+1"], []),
    }
    ours = {
        "peak_saved_nbytes": 1 << 20,
        "written_nbytes": 3 << 20,
        "read_nbytes": 0,
        "stall_seconds": 0.25,
        "plan": "",
    }
    so_far: dict[str, dict[str, Any]] = {"plain": {"peak_saved_nbytes": 4 << 20}, "ssdtrain": ours}
    return Standing(DemoSettings(".", steps=2), results, so_far)


def shown(*, is_terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=100, color_system=None)
    with LiveView(console) as view:
        view.show(standing())
        console.print("a line of progress")
    return stream.getvalue()


def test_a_terminal_shows_both_runs() -> None:
    text = shown(is_terminal=True)
    for part in (
        "plain",
        "ssdtrain",
        "1 of 2",
        "0 of 2",
        "0.50 s",
        "4.0 MiB",
        "1.0 MiB",
        "2.000000",
        "3.0 MiB written",
    ):
        assert part in text, part
    assert "a line of progress" in text


def test_a_pipe_gets_plain_lines_only() -> None:
    assert shown(is_terminal=False) == "a line of progress\n"


def test_it_can_be_drawn_before_anything_is_known() -> None:
    console = Console(file=io.StringIO(), width=100)
    empty = Standing(DemoSettings("."), {role: RunResult(role) for role in ("plain", "ssdtrain")}, {})
    console.print(picture(empty))
    assert "0 of" in console.file.getvalue()  # type: ignore[attr-defined]
