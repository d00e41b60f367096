import os
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from moe_jax.cli import main
from moe_jax.cli.runs import describe_age
from moe_jax.routing import RULES
from moe_jax.runs import RunFolder


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder `runs` with a finished and a failed run, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with RunFolder("runs/evolve/small-seed0", ConfigDict({"seed": 0})) as run:
        run.report_progress("heal", 12)
        run.write_results({"headline": {"loss": 1.23456, "experts": 9}})
        run.finish()
    with pytest.raises(FloatingPointError), RunFolder("runs/evolve/small-seed1", ConfigDict({"seed": 1})) as run:
        run.report_progress("train", 7)
        raise FloatingPointError("loss is NaN at step 8")
    return tmp_path


def test_runs_shows_every_run_newest_first(root, capsys):
    assert main(["runs"]) == 0
    header, failed, finished = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["run", "status", "stage", "step", "changed", "result"]
    assert failed[:4] == ["runs/evolve/small-seed1", "failed", "train", "7"]
    assert "loss is NaN at step 8" in " ".join(failed)
    assert finished[:4] == ["runs/evolve/small-seed0", "finished", "heal", "12"]
    assert "loss 1.235 · experts 9" in " ".join(finished)


def test_runs_of_an_empty_place(root, capsys):
    assert main(["runs", "--root", "elsewhere"]) == 0
    assert capsys.readouterr().out == "no runs below elsewhere\n"


def test_rules_are_listed_and_explained(root, capsys):
    assert main(["rules"]) == 0
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in RULES) and "arXiv:2412.19437" in shown
    assert main(["rules", "sigmoid_top_k"]) == 0
    shown = capsys.readouterr().out
    assert "settings: score_function='sigmoid', by_logits=False, renormalize=True" in shown and "the K best" in shown


def test_report_is_made_again(root, capsys):
    assert main(["report", "runs/evolve/small-seed0"]) == 0
    assert capsys.readouterr().out == "runs/evolve/small-seed0/report.html\n"
    assert (root / "runs/evolve/small-seed0/report.html").stat().st_size > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["report", "nothing"], "nothing is no run folder: it has no status.json"),
        (["report"], "the following arguments are required: RUN"),
        (["rnus"], "invalid choice: 'rnus'"),
        (["rules", "top"], "unknown routing rule 'top'"),
        (["runs", "--rot=x"], "unrecognized arguments: --rot=x"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(root, capsys, argv, message):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_help_shows_examples_and_loads_no_pictures(root):
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}

    def python(program, *arguments):
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    shown = python("import sys; from moe_jax.cli import main; sys.exit(main())", "--help")
    assert "moe-jax report runs/evolve_topology" in shown
    loaded = python("import sys, moe_jax.cli; print(*sys.modules)").split()
    assert not {"matplotlib", "torch", "transformers", "orbax.checkpoint", "grain"} & set(loaded)


def test_describe_age():
    assert [describe_age(s) for s in (-1, 42, 180, 7300, 200000)] == [
        "0 s ago",
        "42 s ago",
        "3 min ago",
        "2 h ago",
        "2 d ago",
    ]
