"""The file list is the architecture: packages import only packages below them, type-only imports included."""

from __future__ import annotations

import ast
import re
import statistics
import tokenize
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from zlib import crc32

import pytest
from messages import texts_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ssdtrain"
FILES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = sorted({path.parent for path in FILES})

# From the bottom up: what stands here may import what stands before it.
LADDER = [
    "policy",
    "stats",
    "state_stats",
    "verdict",
    "planner",
    "model_blocks",
    "_C",
    "io",
    "devices",
    "tracing",
    "store",
    "scheduling",
    "run_log",
    "report",
    "loggers",
    "activations",
    "parameters",
    "optimizer",
    "api",
    "__init__",
    "integrations",
    "launch",
    "tools",
    "__main__",
]
WITHOUT_TORCH = [
    "policy",
    "stats",
    "state_stats",
    "verdict",
    "planner",
    "io",
    "scheduling",
    "run_log",
    "report",
]
MAY_KNOW_TORCH = ("io/kvikio/", "scheduling/consensus.py", "run_log/environment.py")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ADAPTER_LINES = 420, 60, 59
# By the name of a variable, after a file where it is meant only there: what may be set on it from another module.
SET_FROM_ELSEWHERE = {
    # Numbers that nobody has to be told of.
    "counters": ("*",),
    # Objects of PyTorch and of Bokeh, whose interface this is.
    "optimizer": ("state", "param_groups"),
    "inner": ("param_groups",),
    "parameter": ("grad", "data"),
    "tensor": ("data",),
    "probe": ("data",),
    "tiny": ("grad",),
    "shadow": ("state", "param_groups"),
    "y_range": ("start", "end"),
    "integrations/deepspeed/wrapper.py: results[0]": ("ssdtrain",),
    "integrations/accelerate.py: accelerator": ("ssdtrain",),
    # What an engine in Python builds on another one: the write is of a class of its own.
    "io/kvikio/engine.py: write": ("producer",),
    "part": ("checksum",),
    # A record is one object whose owners, under one lock, each change their part.
    "record": ("*",),
    "handle": ("epoch", "task"),
    "pending": ("is_ahead", "sources"),
    # What the thread that updates on the CPU makes of a job, which it alone has meanwhile.
    "optimizer/cpu/cpu_updates.py: entry": ("state", "result"),
    "optimizer/cpu/cpu_updates.py: job": ("changes",),
}
INTERFACE_DECLARED = (2, 3826995869)  # of the extension: its number, and a checksum of `_C.pyi`
TOP_LEVEL = {
    "setup.py",
    "ssdtrain",
    "csrc",
    "docs",
    "tests",
    "recipes",
    "README.md",
    "pyproject.toml",
    "Makefile",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CITATION.cff",
    "MANIFEST.in",
    "mkdocs.yml",
}


def module_of(path: Path) -> str:
    """``ssdtrain.io.engine``; a package is its ``__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = frozenset(module_of(path) for path in FILES) | {"ssdtrain._C"}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Modules of the package that a file imports, at run time or for type checkers."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom):
            module = _absolute(path, node)
            names = {f"{module}.{alias.name}" for alias in node.names if module.split(".")[0] == "ssdtrain"}
            found |= {name if name in MODULES else module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "ssdtrain"}
    return frozenset(found) - {module_of(path)}


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
    return ".".join([*above, *([node.module] if node.module else [])])


def rung_of(module: str) -> str:
    """What of the ladder a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_imports_go_down() -> None:
    for path in FILES:
        own = rung_of(module_of(path))
        assert own in LADDER, f"{name_of(path)} stands on no rung: give it a place in LADDER, or move it into a package"
        for module in imports_of(path):
            other = rung_of(module)
            assert LADDER.index(other) <= LADDER.index(own), f"{name_of(path)} imports {module}, which is above it"


def test_no_circle_of_files() -> None:
    graph = {module_of(path): imports_of(path) for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_activations_and_state_do_not_know_each_other() -> None:
    for path in FILES:
        own = rung_of(module_of(path))
        others = {rung_of(module) for module in imports_of(path)}
        assert own != "activations" or not others & {"parameters", "optimizer"}
        assert own not in ("parameters", "optimizer") or "activations" not in others, name_of(path)


def test_scheduling_decides_and_store_moves() -> None:
    """Scheduling may name a record's class, which is what it decides about; never what moves it."""
    for path in (PACKAGE / "scheduling").glob("*.py"):
        assert {m for m in imports_of(path) if rung_of(m) == "store"} <= {"ssdtrain.store.record"}, path.name
    for path in (PACKAGE / "store").glob("*.py"):
        assert "scheduling" not in {rung_of(m) for m in imports_of(path)}, path.name


def test_only_io_touches_the_extension() -> None:
    hidden = ("ssdtrain._C", "ssdtrain.io.python", "ssdtrain.io.kvikio")
    for path in FILES:
        if any(module.startswith(hidden) for module in imports_of(path)):
            may = ("ssdtrain.io.open_engine", "ssdtrain.io.extension", *hidden)
            assert module_of(path).startswith(may), name_of(path)


def test_another_interface_of_the_extension_has_another_number() -> None:
    """An extension that was built before is told by its number, not by whatever fails in it."""
    from ssdtrain.io.extension import INTERFACE

    declared = crc32("".join(map(ast.unparse, tree_of(PACKAGE / "_C.pyi").body[1:])).encode())
    assert (INTERFACE, declared) == INTERFACE_DECLARED, "raise INTERFACE in io/extension.py and csrc/bindings.cpp"
    assert f'module.attr("INTERFACE") = {INTERFACE};' in (ROOT / "csrc" / "bindings.cpp").read_text()


@pytest.mark.parametrize("rung", WITHOUT_TORCH)
def test_these_know_no_tensors(rung: str) -> None:
    for path in FILES:
        if rung_of(module_of(path)) == rung and not name_of(path).startswith(MAY_KNOW_TORCH):
            assert "import torch" not in path.read_text(), name_of(path)


def test_cpp_knows_bytes_and_only_the_bindings_know_python() -> None:
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text()
        assert "#include <torch" not in text and "#include <ATen" not in text, path.name
        assert path.name == "bindings.cpp" or ("pybind11" not in text and "Python.h" not in text), path.name


def test_no_module_level_state() -> None:
    """Shared things live in one object that is passed down: no lists, dicts or counters at module level."""
    for path, node in [(file, node) for file in FILES for node in tree_of(file).body]:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict | ast.Set | ast.Call):
            name = ast.unparse(node.targets[0])
            is_constant = name.lstrip("_").isupper() or name in {"logger", "__all__"}
            assert is_constant or name[0].isupper() or name == "app", f"{name_of(path)}: {name}"


def test_every_package_says_what_it_knows() -> None:
    """A reader draws the architecture from the file list and the first line of each package."""
    for package in PACKAGES:
        text = ast.get_docstring(tree_of(package / "__init__.py")) or ""
        says = package == PACKAGE or re.search(r"\b[Kk]nows?\b", text)
        assert says, f"{package.relative_to(ROOT)}: say what it knows and what it does not know"


def test_the_house_is_small_enough_to_draw() -> None:
    entries = {p.name for p in PACKAGE.iterdir() if p.suffix in (".py", ".pyi") or (p / "__init__.py").exists()}
    assert len(entries) <= 24, sorted(entries)


def test_no_package_has_more_files_than_a_reader_remembers() -> None:
    for package in PACKAGES:
        files = [p.name for p in package.glob("*.py") if p.name != "__init__.py"]
        assert len(files) <= 10, f"{sorted(files)}: what would a stranger look for together? Give it a package"


def test_files_and_functions_are_short() -> None:
    for path in FILES:
        num_lines, most = len(path.read_text().splitlines()), MAX_FILE_LINES
        assert num_lines <= most, f"{name_of(path)} has {num_lines} lines: cut it by what a reader looks for"
        for name, lines in _functions(path):
            assert lines <= MAX_FUNCTION_LINES, f"{name_of(path)}: {name} has {lines} lines"


def test_adapters_of_trainers_are_short() -> None:
    """They translate what a trainer says and decide nothing: what needs more room belongs into the session."""
    for path in (PACKAGE / "integrations").rglob("*.py"):
        if not {"tensor_io", "compiler"} & set(path.parts):  # which are for no trainer
            assert _num_code_lines(path) <= MAX_ADAPTER_LINES, name_of(path)


def _num_code_lines(path: Path) -> int:
    """Without blank ones, comments and docstrings."""
    own: set[int] = set()
    with path.open() as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                own |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            own -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(own) - 1  # the end


def test_most_functions_are_seen_at_a_glance() -> None:
    lengths = [lines for path in FILES for _, lines in _functions(path)]
    assert statistics.median(lengths) <= 12
    assert statistics.quantiles(lengths, n=10)[-1] <= 30


def _functions(path: Path) -> list[tuple[str, int]]:
    found = [n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(n.name, (n.end_lineno or n.lineno) - n.lineno + 1) for n in found]


def test_nothing_is_set_on_an_object_of_another_module() -> None:
    """Who must be told of something is passed to a constructor; what changes later, its own module changes."""
    every = frozenset().union(*map(_attributes, FILES))
    for path in FILES:
        of_others = every - _attributes(path)
        for target in [t for node in ast.walk(tree_of(path)) for t in _targets(node)]:
            if isinstance(target, ast.Attribute) and target.attr in of_others:
                assert _may_be_set(path, target), f"{name_of(path)}:{target.lineno}: {ast.unparse(target)}"


def _may_be_set(path: Path, target: ast.Attribute) -> bool:
    owner = ast.unparse(target.value).rpartition(".")[2].lstrip("_")
    allowed = {*SET_FROM_ELSEWHERE.get(owner, ()), *SET_FROM_ELSEWHERE.get(f"{name_of(path)}: {owner}", ())}
    return owner == "self" or bool({target.attr, "*"} & allowed)


@cache
def _attributes(path: Path) -> frozenset[str]:
    """What objects of a module's classes have, as far as the classes say so themselves."""
    found = set()
    for node in [n for c in tree_of(path).body if isinstance(c, ast.ClassDef) for n in ast.walk(c)]:
        found |= {t.attr for t in _targets(node) if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self"}
        found |= {t.id for t in _targets(node) if isinstance(t, ast.Name) and isinstance(node, ast.AnnAssign)}
    return frozenset(found)


def _targets(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns to; counters that only go up are not meant."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple | ast.List) else [target])]


def test_top_level_is_what_the_readme_says() -> None:
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {t for t in tops if not t.startswith(".")} <= TOP_LEVEL


def test_every_error_and_warning_has_an_entry() -> None:
    """It contains the heading of an entry, or the words of a group; and what a group quotes is said somewhere."""
    page = ROOT / "docs" / "how-to" / "troubleshooting.md"
    text = page.read_text()
    groups = re.split(r"^### .+\n", text.split("\n## Errors by what you did\n")[1], flags=re.MULTILINE)[1:]
    quoted = [words for group in groups for words in re.findall(r"`([^`]+)`", group.strip().split("\n\n")[0])]
    texts, headings = texts_of(ROOT), re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert len(texts) > 250 and all(quoted) and min(len(group.strip().split("\n\n")) for group in groups) == 2
    new = sorted(text for text in texts if not any(words in text for words in headings + quoted))
    gone = [words for words in quoted if not any(words in text for text in texts)]
    assert new == [] and gone == [], f"add words of the new ones to a group of {page}, and take out what is gone"
