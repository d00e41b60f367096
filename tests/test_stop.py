"""Programs that are asked to stop, or that hosts start differently: what they say, and with which code they end."""

import os
import signal
import threading

import pytest

from moe_jax.runs import Command, RunError, RunFolder, read_progress, run_script
from moe_jax.runs.stop import StopRequest, listening
from tests.hosts_program import log_of, started

CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"seed": 0, "steps": 3})
"""


def run(tmp_path, main) -> int:
    """The exit code of an experiment."""
    (tmp_path / "small.py").write_text(CONFIG)
    main.__module__ = __name__
    return run_script(main, str(tmp_path / "small.py"), ["--workdir", str(tmp_path / "run")])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_where_there_is_nothing_to_save_leaves_and_says_how_to_go_on(tmp_path, capsys, number, code):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def main(command: Command) -> None:
        with RunFolder(command.workdir, command.config):
            os.kill(os.getpid(), number)
            raise AssertionError("the signal has been missed")

    assert run(tmp_path, main) == code
    assert f"--workdir {tmp_path / 'run'} --resume" in capsys.readouterr().err
    assert read_progress(tmp_path / "run").status == "interrupted"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_an_error_that_a_person_can_mend_is_a_line(tmp_path, capsys):
    def main(command: Command) -> None:
        raise RunError("turn it off and on again")

    assert run(tmp_path, main) == 2
    assert capsys.readouterr().err == "error: turn it off and on again\n"


def test_an_experiment_for_one_host_refuses_several(tmp_path, capsys):
    (tmp_path / "small.py").write_text(CONFIG)
    command = ["--workdir", str(tmp_path / "run"), "--hosts=localhost:29500,2,0"]
    assert run_script(pytest.fail, str(tmp_path / "small.py"), command) == 2
    assert "runs on one host; leave out --hosts" in capsys.readouterr().err


def test_the_second_signal_ends_the_process_at_once(tmp_path):
    program = """
import os, signal
from moe_jax.runs.stop import listening
with listening() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    print("noted", request.is_due(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    logs = tmp_path / "twice"
    with started(["-c", program], 1, logs) as (process,):
        assert process.wait(60) == -signal.SIGTERM
    assert log_of(logs, 0).read_text() == "noted True\n"


def test_a_thread_leaves_signals_to_the_main_one():
    seen: list[StopRequest] = []

    def work() -> None:
        with listening() as request:
            seen.append(request)

    handler = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not seen[0].is_due() and signal.getsignal(signal.SIGTERM) == handler


TWO_CONFIGS = """
import sys
from ml_collections import ConfigDict
from moe_jax.hosts import gather_texts, initialize_hosts
from moe_jax.runs import RunError, RunFolder
place = sys.argv[2].removeprefix("--hosts=")
initialize_hosts(place)
index = int(place[-1])
try:
    RunFolder(sys.argv[1], ConfigDict({"seed": 0, "optimizer": {"learning_rate": 0.1 * (1 + index)}, "steps": 3}))
except RunError as error:
    print(error, flush=True)
with RunFolder(sys.argv[1], ConfigDict({"seed": 0})) as run:
    print(run.is_continued, run.is_finished, flush=True)
    gather_texts("both have looked")
    run.write_results({"host": index})
    run.finish()
with RunFolder(sys.argv[1], ConfigDict({"seed": 0})) as run:
    print(run.is_continued, run.is_finished, flush=True)
try:
    RunFolder(sys.argv[1], ConfigDict({"seed": 1}))
except RunError as error:
    print(error, flush=True)
"""


def test_hosts_share_a_folder_and_refuse_different_configurations(tmp_path):
    logs = tmp_path / "host"
    with started(["-c", TWO_CONFIGS, str(tmp_path / "run")], 2, logs) as processes:
        assert [process.wait(300) for process in processes] == [0, 0], log_of(logs, 1).read_text()
    for index in (0, 1):
        lines = [line for line in log_of(logs, index).read_text().splitlines() if "Gloo" not in line]
        assert lines == [
            "the hosts have different configurations (optimizer.learning_rate: 0.1 on host 0, 0.2 on host 1); start "
            "all by the same command",
            "False False",
            "True True",
            f"{tmp_path / 'run'} holds a run with another configuration (seed: 0 recorded, 1 now); give this one its "
            "own folder with --workdir, or delete that one",
        ]
    assert (tmp_path / "run" / "results.json").read_text() == '{\n  "host": 0\n}\n'
