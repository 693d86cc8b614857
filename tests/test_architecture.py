"""Imports go one way (docs/architecture.md)."""

import ast
from pathlib import Path

import rexrag

ROOT = Path(rexrag.__file__).parent
BASE = {"types", "errors", "config", "config_io", "io", "__init__"}
DATA = {"method", "agent", "retrieval", "data"}
ALLOWED = {
    "types": set(),
    "errors": set(),
    "config": BASE - {"config_io"},
    "config_io": BASE,
    "io": BASE,
    "method": BASE,
    "agent": BASE | {"retrieval.base"},
    "retrieval": BASE,
    "data": BASE | {"agent", "retrieval.base"},
    "engine": BASE | DATA,
    # verl owns the loop, so its adapter stands where `train` stands for the local engine.
    "engine.verl": BASE | DATA | {"engine", "step", "train", "setup", "runs", "evaluate"},
    "report": BASE,
    "step": BASE | DATA | {"engine.base"},
    "diagnostics": BASE | {"step", "method", "engine.base"},
    "traces": BASE | DATA | {"step"},
    "runs": BASE,
    "intervals": BASE,
    "comparison": BASE | {"intervals"},
    "experiment": BASE | {"presets", "comparison", "prospects", "runs"},
    "tracking": BASE,
    "prospects": BASE | DATA | {"engine", "intervals", "setup"},
    "presets": BASE,
    "doctor": BASE | {"engine", "retrieval"},
    "evaluate": BASE | DATA | {"engine.base", "intervals"},
    "evaluation": BASE | DATA | {"engine", "evaluate", "intervals", "presets", "runs", "setup"},
    "setup": BASE | DATA | {"engine"},
    "ask": BASE | DATA | {"engine", "setup"},
    "warmup": BASE | DATA | {"engine", "setup"},
    "train": BASE
    | DATA
    | {"engine", "step", "diagnostics", "traces", "runs", "evaluate", "intervals", "setup"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rexrag"):
            inside = node.module.removeprefix("rexrag").lstrip(".")
            found |= {inside} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("rexrag.") for a in node.names if a.name.startswith("rexrag.")}
    return found - {"__version__"}


def test_imports_go_one_way():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        here = "engine.verl" if parts[:2] == ("engine", "verl") else parts[0]
        if here in {"cli", "__main__", "__init__"}:
            continue
        for module in imports(path):
            top = module.split(".")[0]
            allowed = ALLOWED[here] | {here.split(".")[0]}
            if top not in allowed and ".".join(module.split(".")[:2]) not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_method_needs_nothing_but_torch_and_types():
    allowed = {"torch", "rexrag", "__future__", "math", "typing", "dataclasses", "collections", "itertools"}
    allowed |= {"hashlib", "json", "argparse"}
    for path in (ROOT / "method").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert {str(name).split(".")[0] for name in names} <= allowed, path.name


def test_no_formula_of_the_mixture_outside_method():
    """logaddexp and log-space mixtures belong to method/ alone."""
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] != "method":
            assert "logaddexp" not in path.read_text(encoding="utf-8"), path
