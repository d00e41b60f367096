import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Literal

import pytest
from ml_collections import ConfigDict

from moe_jax.runs import ConfigError, differing_keys, flatten, from_json, load_config, override, section, to_json
from moe_jax.runs.command import parse_command


@dataclasses.dataclass(frozen=True)
class Layer:
    width: int = 8


@dataclasses.dataclass(frozen=True)
class Evolution:
    generations: int
    rate: float = 0.1
    kind: Literal["ga", "nsga2"] = "ga"
    elitist: bool = True
    limit: int | None = None
    shape: tuple[int, ...] = (1, 2)
    pair: tuple[str, float] = ("a", 1.0)
    layer: Layer = Layer()
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.generations < 0:
            raise ValueError(f"generations must not be negative, got {self.generations}")


def example_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "evolution": {"generations": 20, "rate": 0.1, "kind": "ga", "elitist": True, "limit": None},
            "data": {"folders": (), "shape": (1, 2), "name": "text"},
        }
    )


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "7", 7),
        ("evolution.generations", "200", 200),
        ("evolution.rate", "1", 1.0),
        ("evolution.rate", "1e-3", 0.001),
        ("evolution.elitist", "False", False),
        ("evolution.limit", "5", 5),
        ("evolution.limit", "None", None),
        ("data.shape", "3,4,5", (3, 4, 5)),
        ("data.shape", "(3, 4)", (3, 4)),
        ("data.shape", "3", (3,)),
        ("data.folders", "code=src,notes=docs", ("code=src", "notes=docs")),
        ("data.folders", "", ()),
        ("data.name", "7", "7"),
    ],
)
def test_override_reads_the_type_of_the_value_it_replaces(key, text, value):
    config = example_config()
    changed = flatten(override(config, {key: text}))
    assert changed[key] == value and type(changed[key]) is type(value)
    assert config == example_config()
    assert {k: v for k, v in changed.items() if k != key} == {k: v for k, v in flatten(config).items() if k != key}


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("evolution.generatoins", "5", "config.evolution.generatoins.*did you mean 'generations'"),
        ("evolutoin.generations", "5", "config has no 'evolutoin'; did you mean 'evolution'"),
        ("seed.x", "5", "config.seed has no 'x'"),
        ("zzz", "5", "known: data, evolution, seed"),
        ("evolution", "5", "is a section"),
        ("evolution.generations", "1.5", "expects an integer, got '1.5'"),
        ("evolution.rate", "fast", "expects a number, got 'fast'"),
        ("evolution.elitist", "1", "expects true or false, got '1'"),
        ("data.shape", "a,b", "expects an integer, got 'a'"),
    ],
)
def test_override_refuses_with_one_line_that_helps(key, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        override(example_config(), {key: text})
    assert "\n" not in str(caught.value)


def test_section_builds_the_dataclass():
    values = ConfigDict({"generations": 3, "rate": 1, "limit": 4, "layer": {"width": 5}, "weights": {"a": 1}})
    expected = Evolution(3, rate=1.0, limit=4, layer=Layer(5), weights={"a": 1.0})
    built = section(Evolution, values)
    assert built == expected and type(built.rate) is float
    assert section(Evolution, {"generations": 3, "shape": [4, 5], "pair": ["b", 2]}).shape == (4, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"generations": 3, "elitsit": True}, "unknown key config.e.elitsit; did you mean 'elitist'"),
        ({"generations": 3, "layer": {"widht": 1}}, "unknown key config.e.layer.widht; did you mean 'width'"),
        ({}, "config.e.generations is missing"),
        ({"generations": 3.0}, "config.e.generations expects an integer, got 3.0"),
        ({"generations": True}, "config.e.generations expects an integer, got True"),
        ({"generations": 3, "rate": "0.1"}, "config.e.rate expects a number, got '0.1'"),
        ({"generations": 3, "elitist": 1}, "config.e.elitist expects true or false, got 1"),
        ({"generations": 3, "kind": "nsga"}, "config.e.kind has no choice 'nsga'; did you mean 'nsga2'"),
        ({"generations": 3, "limit": "x"}, "config.e.limit expects an integer, got 'x'"),
        ({"generations": 3, "shape": (1, "b")}, r"config.e.shape\[1\] expects an integer, got 'b'"),
        ({"generations": 3, "pair": ("a",)}, "config.e.pair expects tuple"),
        ({"generations": 3, "layer": 5}, "config.e.layer is a section"),
        ({"generations": -1}, "config.e: generations must not be negative"),
    ],
)
def test_section_refuses_with_one_line_that_helps(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        section(Evolution, values, "config.e")
    assert "\n" not in str(caught.value)


def test_json_round_trip_is_stable():
    config = example_config()
    assert from_json(to_json(config)).to_dict() == config.to_dict()
    assert to_json(from_json(to_json(config))) == to_json(config)
    backwards = ConfigDict(dict(reversed(config.to_dict().items())))
    assert to_json(backwards) == to_json(config)


def test_differing_keys():
    changed = override(example_config(), {"seed": "1", "data.name": "code"})
    assert differing_keys(example_config(), changed) == ["data.name", "seed"]
    assert differing_keys(example_config(), from_json(to_json(example_config()))) == []
    assert differing_keys(ConfigDict({"a": 1}), ConfigDict({"b": 1})) == ["a", "b"]


CONFIG = """
import ml_collections
def get_config():
    return ml_collections.ConfigDict({"seed": 3, "evolution": {"generations": 20}})
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_load_config_by_path_and_by_name(checkout):
    assert load_config("small") == load_config(checkout / "configs" / "small.py")
    assert load_config("small").evolution.generations == 20


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "does not exist; did you mean 'configs/small.py'"),
        ("x = 1", r"must define get_config\(\)"),
        ("def get_config(): return {}", r"must define get_config\(\)"),
        ("def get_config(): return 1 / 0", "failed with ZeroDivisionError"),
        ("def get_config(:", "failed with SyntaxError"),
    ],
)
def test_load_config_refuses(checkout, source, message):
    if source is not None:
        (checkout / "configs" / "smal.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        load_config("configs/smal.py")


def parse(*argv):
    return parse_command(argv, "configs/small.py", "python -m experiments.evolve", "Evolves.")


def test_command_names_the_folder_by_what_was_asked(checkout):
    assert parse().workdir == pathlib.Path("runs/evolve/small-seed3")
    longer = parse("--config.evolution.generations=200", "--config.seed", "4")
    assert longer.workdir == pathlib.Path("runs/evolve/small-seed4-evolution.generations=200")
    assert longer.config.evolution.generations == 200 and longer.config.seed == 4
    assert parse("--workdir=here", "--resume") == dataclasses.replace(
        parse(), workdir=pathlib.Path("here"), resume=True
    )


def test_an_experiment_may_have_choices_of_its_own(checkout):
    choices = {"engine": ("here", "ray")}
    command = parse_command(["--engine=ray"], "configs/small.py", "python -m experiments.evolve", "Evolves.", choices)
    assert command.choices == {"engine": "ray"} and command.workdir == parse().workdir
    assert parse_command([], "configs/small.py", "evolve", "Evolves.", choices).choices == {"engine": "here"}
    with pytest.raises(ConfigError, match="invalid choice: 'rya'"):
        parse_command(["--engine=rya"], "configs/small.py", "evolve", "Evolves.", choices)
    with pytest.raises(ConfigError, match="did you mean '--engine'"):
        parse_command(["--engin=ray"], "configs/small.py", "evolve", "Evolves.", choices)


def test_resume_takes_the_recorded_config(checkout):
    recorded = parse("--config.seed=9").config
    pathlib.Path("here").mkdir()
    pathlib.Path("here/config.json").write_text(to_json(recorded))
    assert parse("--workdir=here", "--resume").config == recorded
    assert parse("--workdir=here", "--resume", "--config=small").config.seed == 3


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--workdr=x", "unknown argument '--workdr=x'; did you mean '--workdir'"),
        ("--config.seed", "needs a value"),
        ("--config.sed=1", "did you mean 'seed'"),
        ("--workdir", "expected one argument"),
        ("stray", "unknown argument 'stray'"),
    ],
)
def test_command_refuses(checkout, argument, message):
    with pytest.raises(ConfigError, match=message):
        parse(argument)


SCRIPT = '''"""Evolves a thing.

  python -m evolve --config.seed=1
"""
from moe_jax.runs import Command, run_script

def main(command: Command) -> None:
    print(command.config.seed, command.workdir)

if __name__ == "__main__":
    raise SystemExit(run_script(main, "configs/small.py"))
'''


def test_a_script_from_the_shell(checkout):
    (checkout / "evolve.py").write_text(SCRIPT)
    root = pathlib.Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_COMPILATION_CACHE_DIR": str(checkout / "cache")}

    def run(*arguments):
        command = [sys.executable, "-m", "evolve", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=environment)

    good = run("--config.seed=5")
    assert (good.returncode, good.stdout) == (0, "5 runs/evolve/small-seed5\n")
    bad = run("--config.evolution.generatoins=5")
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.count("\n") == 1 and bad.stderr.startswith("error: unknown key config.evolution.generatoins")
    shown = run("--help")
    assert shown.returncode == 0
    for words in ("python -m evolve", "Evolves a thing.", "--workdir DIR", "evolution.generations = 20"):
        assert words in shown.stdout
