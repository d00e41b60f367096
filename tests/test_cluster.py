"""The scripts for clusters: what their shells and loaders make of them, and that their commands are understood."""

import pathlib
import re
import shlex
import subprocess

import yaml

from moe_jax.hosts import parse_place
from moe_jax.runs.command import Command, parse_command
from moe_jax.runs.sections import section
from moe_jax.training.mesh import MeshConfig

FOLDER = pathlib.Path(__file__).parent.parent / "configs" / "cluster"


def command_in(script: str, **variables: str) -> Command:
    """The training command of a shell script, read as the program reads it."""
    (line,) = re.findall(r"python -m experiments\.train (.*)", script.replace("\\\n", " "))
    for name, value in variables.items():
        line = line.replace(f"${name}", value)
    return parse_command(shlex.split(line.removesuffix("&")), "configs/train.py", "python -m experiments.train", "")


def check_syntax(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, capture_output=True)


def test_the_slurm_script(monkeypatch):
    monkeypatch.chdir(FOLDER.parent.parent)
    script = (FOLDER / "slurm.sh").read_text()
    check_syntax(script)
    command = command_in(script, workdir="runs/mine")
    assert command.hosts == "auto" and command.workdir == pathlib.Path("runs/mine")
    options = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    devices = int(options["nodes"]) * int(options["ntasks-per-node"])
    assert options["ntasks-per-node"] == options["gpus-per-node"], "JAX gives each process of a node one of its GPUs"
    mesh = section(MeshConfig, command.config.mesh)
    data, expert, _ = mesh.fill(devices, must_use_all=True)
    assert command.config.data.batch_size % (data * expert) == 0 and command.config.model.num_experts % expert == 0


def test_the_kubernetes_job(monkeypatch):
    monkeypatch.chdir(FOLDER.parent.parent)
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert service["kind"] == "Service" and service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    (script,) = pod["containers"][0]["args"]
    check_syntax(script)
    for index in range(job["spec"]["completions"]):
        place = parse_place(command_in(script, JOB_COMPLETION_INDEX=str(index)).hosts)
        assert (place.count, place.index) == (job["spec"]["parallelism"], index)
        assert place.address == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    command = command_in(script, JOB_COMPLETION_INDEX="0")
    data, expert, _ = section(MeshConfig, command.config.mesh).fill(place.count, must_use_all=True)
    assert command.config.data.batch_size % (data * expert) == 0


def test_the_kubernetes_script_hands_sigterm_on_and_counts_only_a_finished_run(tmp_path):
    """Its program here waits for the signal, and leaves the status that the first word of its name says."""
    _, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    (script,) = job["spec"]["template"]["spec"]["containers"][0]["args"]
    for status, code in (("interrupted", 1), ("finished", 0)):
        (tmp_path / "python").write_text(
            f"""#!/usr/bin/env bash
trap 'mkdir -p runs/mine; echo "  \\"status\\": \\"{status}\\"," > runs/mine/status.json; exit 0' TERM
echo ready
while true; do sleep 0.1; done
"""
        )
        (tmp_path / "python").chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "0"}
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(60) == code
        process.stdout.close()
