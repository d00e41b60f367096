"""The main job in miniature, in a process of its own: the folder it leaves, the commands that read it, the notebook."""

import html.parser
import json
import os
import pathlib
import subprocess
import sys

import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from experiments import readme_pictures
from moe_jax.checkpoints import CheckpointStore
from moe_jax.runs import list_runs, list_stages, read_json

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "01_evolve_topology.ipynb"
TINY = "--config=configs/tiny.py"


def environment(**changes):
    """This process's environment with the project importable, the tests' compilation cache, and one CPU device."""
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    return os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "COLUMNS": "200"} | cache | changes


def python(*arguments):
    """A finished Python process in the project's folder."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Folder and output of a tiny run."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    done = python("-m", "experiments.evolve_topology", TINY, "--workdir", path)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


@pytest.fixture(scope="module")
def run(job):
    return job[0]


class References(html.parser.HTMLParser):
    """Everything a page would load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.found += [named[name] for name in ("src", "href", "xlink:href", "data") if named.get(name)]


def test_the_folder_has_every_promised_file(run):
    for name in ("config", "environment", "status", "results"):
        assert read_json(run / f"{name}.json")
    assert read_json(run / "status.json")["status"] == "finished"
    assert {"train", "evaluate", "search/nsga-ii-seed0", "search/ga-mask-seed0"} <= set(list_stages(run))
    for name in ("traces/routing.npz", "traces/topologies.npz", "report.html"):
        assert (run / name).stat().st_size > 0
    pictures = {path.stem for path in (run / "pictures").glob("*.svg")}
    assert {"training", "load", "specialisation", "front", "hypervolume", "methods", "masks", "heal"} <= pictures
    steps = read_json(run / "config.json")["training"]["steps"]
    with CheckpointStore(run / "checkpoints" / "train") as store:
        assert store.latest_step() == steps


def test_environment_names_versions_and_commit(run):
    recorded = read_json(run / "environment.json")
    assert recorded["packages"]["jax"] == jax.__version__
    assert {"git_commit", "git_is_dirty", "devices", "seed"} <= recorded.keys()
    assert "experiments.evolve_topology --config=configs/tiny.py" in recorded["command"]


def test_every_method_keeps_the_promised_number_of_experts_and_spends_no_more_evaluations(run):
    search = read_json(run / "results.json")["search"]
    compared = {method["name"]: method for method in search["methods"] if method["kind"] != "reference"}
    assert {"GA, mask", "GA, budget", "random search", "greedy removal", "(1+1) local search"} < compared.keys()
    assert all(method["evaluations"] <= search["budget"]["evaluations"] for method in compared.values())
    with np.load(run / "traces" / "topologies.npz", allow_pickle=False) as topologies:
        kept = dict(zip(topologies["names"].tolist(), topologies["keep"].sum((1, 2)).tolist(), strict=True))
    assert {kept[name] for name in compared} == {search["budget"]["experts_kept"]}


def test_the_report_is_self_contained(run):
    page = (run / "report.html").read_text()
    references = References()
    references.feed(page)
    assert all(reference.startswith(("#", "data:")) for reference in references.found)
    assert "@import" not in page and "url(http" not in page


def test_the_final_table_and_the_path_of_the_report_are_printed(job):
    run, printed = job
    assert all(method["name"] in printed for method in read_json(run / "results.json")["search"]["methods"])
    assert printed.rstrip().endswith(f"report: {run / 'report.html'}")


@pytest.mark.parametrize("arguments", [[TINY], ["--resume"]], ids=["the same command", "--resume alone"])
def test_again_finds_the_finished_run(run, arguments):
    results, started = (run / "results.json").read_bytes(), read_json(run / "status.json")["started"]
    metrics = sorted(path.name for path in (run / "metrics").rglob("*.parquet"))
    again = python("-m", "experiments.evolve_topology", *arguments, "--workdir", run)
    assert again.returncode == 0, again.stderr
    assert (run / "results.json").read_bytes() == results
    assert sorted(path.name for path in (run / "metrics").rglob("*.parquet")) == metrics
    status = read_json(run / "status.json")
    assert (status["status"], status["started"]) == ("finished", started)


def test_an_unknown_key_is_one_line_with_the_nearest_key_and_exit_code_2(tmp_path):
    wrong = "--config.evolution.generatoins=5"
    done = python("-m", "experiments.evolve_topology", TINY, wrong, "--workdir", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "did you mean 'generations'?" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_commands_read_the_run(run):
    command = "from moe_jax.cli import main; raise SystemExit(main())"  # what the script `moe-jax` does
    listed = python("-c", command, "runs", "--root", run)
    assert listed.returncode == 0, listed.stderr
    assert "finished" in listed.stdout and "test bits/byte" in listed.stdout
    (run / "report.html").unlink()
    written = python("-c", command, "report", run)
    assert written.stdout.strip() == str(run / "report.html"), written.stderr
    assert (run / "report.html").stat().st_size > 0


def test_readme_pictures_are_drawn(run, tmp_path):
    readme_pictures.main([str(run), "--out", str(tmp_path)])
    for name in ("front", "masks"):
        assert (tmp_path / f"evolve_topology_{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def execute(**changes):
    """The notebook, run top to bottom in a fresh kernel."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute(
        env=environment(**changes)
    )
    return notebook


def test_the_notebook_runs_top_to_bottom(run):
    notebook = execute(MOE_JAX_RUN=str(run))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    shown = " ".join(output["data"].get("text/markdown", "") for output in outputs if "data" in output)
    bits = read_json(run / "results.json")["model_bits_per_byte"]["test"]["all"]
    assert f"against {bits:.4f}." in shown  # the restored model, evaluated anew, is the one of the report
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]


def test_the_notebook_says_what_to_do_without_a_run(tmp_path):
    with pytest.raises(CellExecutionError, match=r"make one with `python -m experiments[.]evolve_topology`"):
        execute(MOE_JAX_RUN=str(tmp_path))


def test_the_committed_notebook_holds_no_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)


def test_the_newest_finished_run_is_listed_first(run):
    assert list_runs(run.parent)[0].path == run
