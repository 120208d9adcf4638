"""The documentation: code that runs, links that lead somewhere, statements that the package agrees with."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import same_bits
from typer.testing import CliRunner

import ssdtrain
from ssdtrain import launch, policy, verdict
from ssdtrain.api.section import Section
from ssdtrain.integrations.arguments import add_arguments, asked_for
from ssdtrain.tools.cli import app

ROOT = Path(ssdtrain.__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
GENERATED = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]
WITH_CODE = [page for page in PAGES if "```python\n" in page.read_text()]


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.linear(x))


class Mean(torch.nn.Module):
    """The loss."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().mean()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What the reader of a page has: a model, an optimizer, a loader."""
    blocks = [Block() for _ in range(4)]
    model = torch.nn.Sequential(torch.nn.Sequential(*blocks), Mean())
    optimizer = torch.optim.AdamW(model.parameters())
    names = {"model": model, "optimizer": optimizer, "loader": [torch.randn(4, 64)] * 2, "torch": torch}
    yield names | {"ssdtrain": ssdtrain}
    for value in names.values():
        if isinstance(value, ssdtrain.ActivationOffload | ssdtrain.OffloadedOptimizer):
            value.close()


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_runs(page: Path, world: dict[str, Any], tmp_path: Path) -> None:
    """The blocks of a page in turn, on a folder instead of the drive."""
    for drive in ("nvme0", "nvme1"):
        (tmp_path / drive).mkdir()
    for block in blocks_of(page):
        code = block.replace("/mnt/nvme", f"{tmp_path}/nvme").replace(f'{tmp_path}/nvme"', f'{tmp_path}"')
        code = code.replace(f"{tmp_path}/nvme/", f"{tmp_path}/").replace('record="run', f'record="{tmp_path}/run')
        exec(compile(code, name_of(page), "exec"), world)


def test_a_run_that_is_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The script of the page, in a process of its own for each start: twice, and once with twice as many steps."""
    (script,) = blocks_of(ROOT / "docs" / "how-to" / "resume.md")
    ends = []
    for name, code, starts in (("twice", script, 2), ("once", script.replace("first + 4", "first + 8"), 1)):
        (tmp_path / name).mkdir()
        for _ in range(starts):
            command = [sys.executable, "-c", code.replace("/mnt/nvme", str(tmp_path / name))]
            subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
        ends.append(torch.load(tmp_path / name / "run.pt"))
    twice, once = (torch.utils._pytree.tree_flatten(end) for end in ends)
    assert twice[1] == once[1] and len(twice[0]) > 64
    assert all(
        same_bits(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(twice[0], once[0], strict=True)
    )
    assert ends[0]["step"] == 8


def test_a_policy_is_written_as_the_table_says() -> None:
    """Every line that is no Python means the same: mode "all", where there is optimizer state in chunks of 64 MiB."""
    page = (ROOT / "docs" / "reference" / "policies.md").read_text().split("## Where you write them\n")[1]
    rows = {name.split(" (")[0]: line for name, line in re.findall(r"^\| (.+?) \| `(.+)` \|$", page, re.MULTILINE)}
    variables = dict(word.split("=", 1) for word in shlex.split(rows["[the environment](environment.md)"]))
    launched, rest = launch.options(shlex.split(rows["`ssdtrain.launch`"]))
    parser = add_arguments(argparse.ArgumentParser())
    megatron = asked_for(parser.parse_args(shlex.split(rows["Megatron"])))
    sections = [
        Section.from_environment(variables),
        Section.from_environment(launched),
        Section.of(yaml.safe_load(rows["YAML"])["ssdtrain"]),
        Section.of(json.loads(f"{{{rows['the JSON of DeepSpeed']}}}")["ssdtrain"]),
    ]
    policies = [section.policy for section in sections if section is not None]
    assert len(policies) == 4 and rest == [] and megatron is not None
    assert [found.mode for found in (*policies, megatron[1])] == ["all"] * 5
    chunks = [section.optimizer.chunk_nbytes for section in sections if section is not None and section.optimizer]
    assert chunks == [64 << 20] * 3
    assert [section.directories for section in sections if section is not None] == [("/mnt/nvme",)] * 4


def masked(text: str) -> dict[str, str]:
    """The lines of a report by what they begin with; numbers and units are the same everywhere."""
    text = re.sub(r" \(estimated without ssdtrain: .*?\)", "", text.strip())  # where the heap was looked at
    lines = re.sub(r"[\d.]+( [KMGT]?i?B| %|%)?\b|[\d.]+", "#", text).splitlines()
    return {re.split(r":| {2,}|(?<=step) peak", line.removeprefix("  "))[0]: line for line in lines}


def test_what_it_did_is_shown_as_it_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The samples of the page have the words that are printed, and every line is explained."""
    text = (ROOT / "docs" / "how-to" / "what-it-did.md").read_text()
    samples = re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    explained = set(re.findall(r"^\| `([a-z ]+)` \|", text, re.MULTILINE))
    record = str(tmp_path / "run.ssdtrain")
    code = blocks_of(ROOT / "docs" / "how-to" / "what-it-did.md")[0]
    exec(code.replace("/mnt/nvme", str(tmp_path)).replace("run.ssdtrain", record), {})
    stats, _, plan = capsys.readouterr().out.partition("\nplan:")
    report = CliRunner().invoke(app, ["report", record], env={"COLUMNS": "200"}).output
    for sample, printed in zip(samples[:2], (stats, f"plan:{plan}"), strict=True):
        shown, real = masked(sample), masked(printed)
        assert {*shown, *real} - explained <= {""}, "a line that goes on has no name"
        alike = shown.keys() & real.keys() - {"cost", "left", "plan", "engine", "drive"}  # as the machine allows
        assert len(alike) >= 3 and {label: shown[label] for label in alike} == {label: real[label] for label in alike}
    assert len(samples[2].splitlines()) == len(report.splitlines()) == 3 and report.startswith("Saved tensors and our")


WRONG = """
policy = ssdtrain.ActivationPolicy(min_bytes="4MiB")
ssdtrain.offload_activation("/mnt/nvme")
ssdtrain.offload_activations(3.5)
"""


def test_code_has_the_types_that_it_is_given(tmp_path: Path) -> None:
    """`make lint` has PyTorch's types too, and another checker. What is wrong is found."""
    runpy.run_path(str(ROOT / "docs" / "code.py"))["main"](tmp_path)
    settings = "[mypy]\ncheck_untyped_defs = True\nfollow_imports = silent\nignore_missing_imports = True\n"
    settings += "[mypy-torch.*,pydantic.*,pydantic_core.*,typer.*,rich.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(settings)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary"]
    options: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | {"MYPYPATH": str(ROOT)}, "text": True}
    assert subprocess.run([*command, "."], stdout=subprocess.PIPE, check=False, **options).stdout == ""
    (tmp_path / "wrong.py").write_text(f"import ssdtrain\n{WRONG}")
    found = subprocess.run([*command, "wrong.py"], stdout=subprocess.PIPE, check=False, **options).stdout
    assert re.findall(r"^wrong.py:(\d+): error", found, re.MULTILINE) == ["3", "4", "5"], found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)}: {target}"
        assert not anchor or anchor in anchors_of(file), f"{name_of(page)}: {target}"


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_reason_has_an_entry() -> None:
    page = ROOT / "docs" / "how-to" / "troubleshooting.md"
    reasons = {*verdict._REMEDIES, *verdict._NO_GAIN, verdict._SMALL, verdict.TOO_LITTLE, "planned to stay"}
    assert {reason for reason in reasons if reason.lower().replace(" ", "-") not in anchors_of(page)} == set()


@pytest.mark.parametrize("heading", "Fallbacks Errors".split())
def test_messages_of_the_page_are_those_of_the_package(heading: str) -> None:
    text = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    package = "\n".join(path.read_text() for path in (ROOT / "ssdtrain").rglob("*.py"))
    said = re.findall(r"^### (.+)$", section, re.MULTILINE)
    assert said and [words for words in said if words not in package] == []


def test_every_fallback_has_an_entry() -> None:
    """Whatever the package notes in words of its own contains the heading of an entry."""
    section = (
        (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text().split("\n## Fallbacks\n")[1].split("\n## ")[0]
    )
    headings = re.findall(r"^### (.+)$", section, re.MULTILINE)
    said = [text for path in (ROOT / "ssdtrain").rglob("*.py") for text in noted(ast.parse(path.read_text()))]
    assert len(said) > 15 and [text for text in said if not any(words in text for words in headings)] == []


def noted(tree: ast.Module) -> Iterator[str]:
    """Texts that are noted where they are written, with {} for what is filled in."""
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in ("note", "_note", "note_fallback", "fall_back"):
            text = call.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            if any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in parts):
                yield "".join([str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts])


def test_every_field_of_a_policy_is_described() -> None:
    page = (ROOT / "docs" / "reference" / "policies.md").read_text()
    assert [name for name in policy.ActivationPolicy.model_fields if f"`{name}`" not in page] == []


@pytest.mark.parametrize("command", ["demo", "doctor", "bench", "plan", "report"])
def test_every_option_is_listed(command: str) -> None:
    """`python docs/generate.py` writes the page; how options are printed differs between versions of typer."""
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    section = page.split(f"\n## ssdtrain {command}\n")[1].split("\n## ")[0]
    printed = CliRunner().invoke(app, [command, "-h"]).output
    assert set(re.findall(r"--[a-z][a-z-]+", printed)) == set(re.findall(r"--[a-z][a-z-]+", section))


@pytest.mark.parametrize("name", sorted(GENERATED.keys() - {"command-line.md"}))
def test_generated_pages_are_those_of_the_package(name: str) -> None:
    """Of the other one only the options are compared: versions of typer print them differently."""
    written = (ROOT / "docs" / "reference" / name).read_text()
    assert written == GENERATED[name](), "run `python docs/generate.py`"


def test_defaults_of_the_table_of_policies_are_those_of_the_package() -> None:
    page = (ROOT / "docs" / "reference" / "policies.md").read_text()
    table = page.split("\n## ActivationPolicy at a glance\n")[1].split("\n## ")[0]
    rows = [row.split(" | ")[:2] for row in table.splitlines() if row.startswith("| `")]
    pairs = [zip(*[re.findall(r"`(.+?)`", cell) for cell in cells], strict=True) for cells in rows]
    given = {name: ast.literal_eval(default) for row in pairs for name, default in row}
    assert set(given) == set(policy.ActivationPolicy.model_fields)
    own = policy.ActivationPolicy()
    read = {name: getattr(policy.ActivationPolicy(**{name: value}), name) for name, value in given.items()}
    assert read == {name: getattr(own, name) for name in given}


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.ipynb")), ids=name_of)
def test_notebooks_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first cell to the last, and each shows what is kept in the file: text, or the value of its last line."""
    world: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
    for cell in cells:
        tree, value = ast.parse("".join(cell["source"])), None
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name_of(path), "exec"), world)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name_of(path), "eval"), world)
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert kinds == ["stream"] * bool(capsys.readouterr().out) + ["execute_result"] * (value is not None)
    assert world["stats"].offloaded_nbytes > 0


def test_links_of_notebooks_lead_somewhere() -> None:
    for path in (ROOT / "docs").rglob("*.ipynb"):
        texts = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"]
        targets = re.findall(r"\]\(([^)\s#]+)", "".join(texts))
        pages = [path.parent / target for target in targets]
        assert pages and [p for p in pages if p.suffix != ".html" or not p.with_suffix(".md").exists()] == []
