"""What README.md says is so: its Python blocks run, its files, packages, options and commands exist."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

from moe_jax.routing import RULES
from tests.test_layers import LEVEL

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = dict(
    re.findall(
        r"^## Write a new (\w+) in twenty lines\n.*?^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE
    )
)
COMMANDS = re.findall(r"^(?:python -m|moe-jax|pip) .*?(?=  +#|$)", README, flags=re.MULTILINE)


@pytest.fixture
def rules():
    """The table of rules, restored afterwards."""
    before = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(before)


def test_there_is_an_example_for_a_router_and_one_for_a_genome():
    assert list(EXAMPLES) == ["router", "genome"]
    assert README.count("```python") == 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, rules):
    exec(compile(EXAMPLES[name], f"README.md, {name}", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_defines_its_thing_in_twenty_lines_and_ends_in_a_check(name):
    statements = ast.parse(EXAMPLES[name]).body
    first = next(s for s in statements if isinstance(s, ast.FunctionDef))
    lines = [line for line in EXAMPLES[name].splitlines()[first.lineno - 1 : first.end_lineno] if line.strip()]
    assert len(lines) <= 20
    assert isinstance(statements[-1], ast.Assert)


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    named = re.findall(r"`((?:notebooks|configs|experiments)/[\w./]+)`", README)
    missing = [path for path in links + named if not (ROOT / path).exists()]
    assert links and named and not missing


def test_the_map_shows_every_package_in_its_row():
    rows = {
        name: int(row)
        for row, names in re.findall(r"^\| (\d) \| (.*?) \|", README, re.M)
        for name in names[1:-1].split("`, `")
    }
    members = {path.stem for path in (ROOT / "moe_jax").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rows == {name: LEVEL[name] for name in members if not name.startswith("_")}


def test_modules_of_the_commands_exist_and_their_options_are_known():
    modules = {match[1] for command in COMMANDS if (match := re.search(r"python -m (experiments\.\w+)", command))}
    assert len(modules) == 15
    assert all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in modules)
    known = {script: options_of(script) for script in ("experiments.evolve_topology", "experiments.train")}
    for script, of_script in known.items():
        options = {option for line in COMMANDS if script in line for option in re.findall(r"--[\w.]+", line)}
        assert options and options <= of_script
    inline = {option for text in re.findall(r"`(--config[^`]+)`", README) for option in re.findall(r"--[\w.]+", text)}
    assert inline and inline <= set().union(*known.values())


def options_of(script):
    """What an experiment's --help names."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", script, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout
    return set(re.findall(r"--[\w]+", shown)) | {f"--config.{key}" for key in re.findall(r"[\w.]+(?= = )", shown)}


def test_no_number_is_missing():
    assert re.findall(r"\{\{\w+\}\}", README) == []
