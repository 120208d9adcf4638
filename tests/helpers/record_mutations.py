"""Random changes of a run record, by a seed: of its bytes, and of the values in its blocks with checksums put right.

python tests/helpers/record_mutations.py RECORD --count 1500  # what `report` and `plan --trace` make of them
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import struct
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from ssdtrain.report import chrome_trace, describe
from ssdtrain.report.page import render
from ssdtrain.run_log import read_run
from ssdtrain.run_log.format import first_line, pack
from ssdtrain.tools.cli.replay import plan_of
from ssdtrain.tools.estimate import Drives

EVIL = "</script><script>alert(1)</script>"
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 10**6, 10**12, 10**18, 10**30, -(10**18), 10**400, 0.5, -0.5, 1e-300, 1e308,
    float("nan"), float("inf"), -float("inf"), "", "x", "7", EVIL, "\x1b[31m", "\ud800", "{", [], [[]], [1], {},
    {"a": 1}, {"kind": "run"}, ["x"] * 3, [0] * 9,
]  # fmt: skip


def blocks_of(path: Path) -> list[dict[str, Any]]:
    """As plain JSON, unchecked."""
    data, found = path.read_bytes(), []
    at = data.index(b"\n") + 1
    while at + 8 <= len(data):
        nbytes, _ = struct.unpack_from("<II", data, at)
        found.append(json.loads(zlib.decompress(data[at + 8 : at + 8 + nbytes])))
        at += 8 + nbytes
    return found


def record_of(blocks: list[Any]) -> bytes:
    return first_line() + b"".join([pack(block) for block in blocks])


def mutated(blocks: list[dict[str, Any]], draw: random.Random) -> bytes:
    """Another record, which may be one still."""
    if draw.random() < 0.2:
        return _bytes_changed(bytearray(record_of(blocks)), draw)
    changed: list[Any] = copy.deepcopy(blocks)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        _change_somewhere(changed, draw)
    return record_of(changed)


def _bytes_changed(data: bytearray, draw: random.Random) -> bytes:
    for _ in range(draw.choice([1, 1, 3])):
        at = draw.randrange(len(data))
        match draw.randrange(4):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + draw.randrange(1, 50)]
            case 2:
                data[at:at] = draw.randbytes(draw.randrange(1, 50))
            case _:
                del data[at:]
                return bytes(data) or b"s"
    return bytes(data) or b"s"


def _change_somewhere(blocks: list[Any], draw: random.Random) -> None:
    """Goes down at random, and changes, doubles, moves or removes what it finds there."""
    holder: Any = blocks
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.85:
            holder = holder[key]
            continue
        break
    match draw.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[draw.randrange(len(holder))]))
        case 2 if isinstance(holder, list):
            draw.shuffle(holder)
        case 3 if isinstance(holder, dict):
            holder[str(draw.choice(VALUES)).encode(errors="replace").decode()] = holder.pop(key)
        case 4 if isinstance(holder[key], int):
            holder[key] += draw.choice([-1, 1, 1000, -(10**9)])
        case _:
            holder[key] = copy.deepcopy(draw.choice(VALUES))


def outcome_of(path: Path, *, is_drawn: bool) -> str:
    """What reading it comes to: ``"read"``, or ``"refused"`` in one line. Whatever else is raised is a fault."""
    try:
        run = read_run(path)
    except ValueError as error:
        message = str(error)
        is_good = message.isprintable() and str(path) in message
        return "refused" if is_good else f"badly refused: {message!r}"
    described = describe(run)
    json.dumps(described, allow_nan=False)
    json.dumps(chrome_trace(run), allow_nan=False)
    if is_drawn:
        page = render(described)
        assert "<script>alert" not in page
        page.encode()
    try:
        plan_of(path, Drives(1, 1.0), 1.0, "64KiB")
    except ValueError:
        return "read, not planned"
    return "read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-page", dest="is_fast", action="store_true", help="do not draw the page, which is slow")
    options = parser.parse_args()
    blocks, outcomes, slowest = blocks_of(options.record), Counter[str](), (0.0, -1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.ssdtrain"
        for seed in range(options.seed, options.seed + options.count):
            path.write_bytes(mutated(blocks, random.Random(seed)))
            began = time.perf_counter()
            try:
                outcomes[outcome_of(path, is_drawn=not options.is_fast)] += 1
            except Exception as error:
                outcomes[f"FAULT {type(error).__name__}"] += 1
                print(f"seed {seed}: {type(error).__name__}: {error}"[:300], flush=True)
            slowest = max(slowest, (time.perf_counter() - began, seed))
    print(dict(outcomes), f"slowest {slowest[0]:.2f} s, seed {slowest[1]}")


if __name__ == "__main__":
    main()
