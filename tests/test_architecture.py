"""Imports go one way (docs/architecture.md)."""

import ast
from pathlib import Path

import rexrag

ROOT = Path(rexrag.__file__).parent
LAYERS = (
    {"types", "errors", "io", "http", "stats", "plugins"},
    {"config"},
    {"method", "agent", "data", "retrieval"},
    {"theory", "engine"},
    {"training"},
    {"verl", "evaluation", "experiments"},
    {"report"},
    {"api"},
    {"cli", "__main__"},
)
"""From the ground up: a module imports from its own layer and from those below it."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rexrag"):
            inside = node.module.removeprefix("rexrag").lstrip(".")
            found |= {inside} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("rexrag.") for a in node.names if a.name.startswith("rexrag.")}
    return found - {"__version__"}


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module.split(".")[0] in names)


def test_imports_go_one_way():
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted(ROOT.rglob("*.py"))
        if (here := path.relative_to(ROOT).with_suffix("").parts[0]) != "__init__"
        for module in imports(path)
        if layer(module) > layer(here)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_method_needs_nothing_but_torch_and_types():
    allowed = {"torch", "rexrag", "__future__", "math", "typing", "dataclasses", "collections", "itertools"}
    allowed |= {"hashlib", "json", "argparse", "sys"}
    for path in [*(ROOT / "method").rglob("*.py"), *(ROOT / "theory").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert {str(name).split(".")[0] for name in names} <= allowed, path.name


def test_no_formula_of_the_mixture_outside_method():
    """logaddexp and log-space mixtures belong to method/ alone."""
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] not in ("method", "theory"):
            assert "logaddexp" not in path.read_text(encoding="utf-8"), path
