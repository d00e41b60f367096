"""Imports point down only, members of one row do not know each other, heavy optional packages load on demand."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "moe_jax"
LAYERS = [
    {"types", "trees", "errors"},
    {"ops", "hosts"},
    {"routing", "dispatch", "losses"},
    {"nn"},
    {"models"},
    {"checkpoints", "data", "analysis", "runs"},
    {"training"},
    {"adapters", "compression", "evolution", "query"},
    {"serving", "devtools", "report"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
HEAVY = {"torch", "transformers", "fastapi", "ray", "optuna", "submitit", "tokamax", "tensorboard", "mlflow", "wandb"}
FILES = sorted(ROOT.rglob("*.py"))


def imported_modules(tree: ast.AST, package: str) -> set[str]:
    """Returns the absolute dotted names that the syntax tree of a module in `package` imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def forbidden_imports(source: str, path: pathlib.Path) -> list[str]:
    """Lists the house members that a module must not import: above it, or its neighbours."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    own = parts[1]
    names = imported_modules(ast.parse(source), ".".join(parts[:-1]))
    members = {name.split(".")[1] for name in names if name.startswith("moe_jax.")} & LEVEL.keys()
    return sorted(m for m in members - {own} if LEVEL[m] >= LEVEL[own])


def top_level_imports(source: str) -> set[str]:
    """Returns the first name of everything imported outside of functions."""
    statements = ast.parse(source).body
    while nested := [s for s in statements if isinstance(s, (ast.If, ast.Try, ast.With, ast.ClassDef))]:
        statements = [s for s in statements if s not in nested]
        statements += [child for s in nested for child in ast.iter_child_nodes(s) if isinstance(child, ast.stmt)]
    imports = [s for s in statements if isinstance(s, (ast.Import, ast.ImportFrom))]
    return {name.split(".")[0] for s in imports for name in imported_modules(s, "")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(path):
    source = path.read_text()
    if path != ROOT / "__init__.py":
        assert path.relative_to(ROOT).parts[0].removesuffix(".py") in LEVEL, (
            "a new house member needs its row in LAYERS"
        )
        assert forbidden_imports(source, path) == []
    assert top_level_imports(source) & HEAVY == set()


def test_the_rules_catch_what_they_forbid():
    path = ROOT / "routing" / "softmax.py"
    assert forbidden_imports("from moe_jax.nn.router import Router", path) == ["nn"]
    assert forbidden_imports("from moe_jax import dispatch", path) == ["dispatch"]
    assert forbidden_imports("def f():\n    from ..training import step", path) == ["training"]
    assert forbidden_imports("import moe_jax.ops\nfrom . import top_k\nfrom moe_jax.types import Array", path) == []
    assert top_level_imports("try:\n    import torch\nexcept ImportError:\n    torch = None") == {"torch"}
    assert top_level_imports("def f():\n    import torch") == set()


def test_importing_moe_jax_loads_no_more_than_jax_and_flax():
    loaded = []
    for line in ("import jax, flax", "import moe_jax"):
        program = f"import sys\n{line}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
        loaded.append(set(result.stdout.split()))
    assert loaded[1] - loaded[0] <= {"moe_jax"}
