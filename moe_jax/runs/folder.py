"""A run is a folder: what was asked, where it ran, what came out; killed at any moment, the same command continues it.

    runs/<experiment>/<name>/
      config.json        the resolved configuration
      environment.json   versions, device, commit, command of the first start; `restarts`: what later ones changed
      status.json        status, stage, step, error, last checkpoint
      results.json       numbers for people, written by the experiment
      metrics/ checkpoints/ traces/ pictures/  report.html

Rules: the same configuration continues an unfinished run and re-reports a finished one; another configuration in the
same folder is refused; one program at a time (a lock that dies with its process). Every file is written atomically.
A program of several hosts shares the folder: host 0 writes, the others read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from ml_collections import ConfigDict

from moe_jax.hosts import gather_texts, is_first_host
from moe_jax.runs.config import describe_differences, from_json, to_json
from moe_jax.runs.environment import describe_environment
from moe_jax.runs.files import read_json, remove_partial_files, write_atomic, write_json
from moe_jax.runs.lock import LOCK, take_lock
from moe_jax.runs.progress import Progress, RunError, read_progress


class RunFolder:
    """The folder of a run that this process owns, as a context manager.

    Leaving it with an exception records "failed" and the exception; leaving it without `finish` records "interrupted".

    Attributes:
      path: the folder.
      config: the resolved configuration.
      is_continued: whether an earlier process has worked on this run.
    """

    def __init__(self, path: str | Path, config: ConfigDict, must_exist: bool = False) -> None:
        """Creates or continues a run and takes its lock.

        Args:
          path: the run's own folder.
          config: the resolved configuration, `config.seed` included.
          must_exist: refuse to start a new run (`--resume`).

        Raises:
          RunError: if another process has the run, the folder holds another configuration or something that is no run,
            cannot be written, there is nothing to continue, or the hosts have different configurations.
        """
        self.path = Path(path)
        self.config = config
        self._is_writer = is_first_host()
        self._lock: TextIO | None = None
        _require_one_config(gather_texts(to_json(config)))
        problem, self.is_continued = "", False
        if self._is_writer:
            try:
                self._open(must_exist)
            except RunError as error:
                problem = str(error)
        # The others wait here until host 0 has opened the folder, and hear how that went.
        problem, self.is_continued = json.loads(gather_texts(json.dumps([problem, self.is_continued]))[0])
        if problem:
            raise RunError(problem)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and isinstance(error, Exception):
            first_line = (str(error).splitlines() or [""])[0]
            with contextlib.suppress(OSError):  # a full disk: the error itself says more
                self._write_progress(status="failed", error=f"{type(error).__name__}: {first_line}")
        elif self._is_writer and self.progress.status == "running":
            self._write_progress(status="interrupted")
        self._unlock()

    @property
    def progress(self) -> Progress:
        """Where the run stands."""
        return read_progress(self.path)

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end, now or in an earlier process."""
        return self.progress.status == "finished"

    def subfolder(self, *names: str) -> Path:
        """Returns a folder below the run's, such as `subfolder("checkpoints", "train")`, made if missing."""
        folder = self.path.joinpath(*names)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def report_progress(self, stage: str, step: int, last_checkpoint: Path | None = None) -> None:
        """Records where the run stands.

        Args:
          stage: the part of the experiment.
          step: its step.
          last_checkpoint: the newest good checkpoint, inside the run's folder; None leaves the recorded one.
        """
        changes: dict[str, Any] = {"stage": stage, "step": step}
        if last_checkpoint is not None:
            changes["last_checkpoint"] = str(last_checkpoint.resolve().relative_to(self.path.resolve()))
        self._write_progress(**changes)

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes `results.json`, JSON-able; `results["headline"]` (name -> number) is what `moe-jax runs` shows."""
        if self._is_writer:
            write_json(self.path / "results.json", results)

    def finish(self) -> None:
        """Records that the run has come to its end."""
        self._write_progress(status="finished", error=None)

    def _open(self, must_exist: bool) -> None:
        """Takes the lock and checks and writes the files that a start needs."""
        if must_exist and not (self.path / "config.json").is_file():
            raise RunError(f"there is no run to resume in {self.path}; leave out --resume to start one")
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; choose another folder with --workdir")
        try:
            self._lock = take_lock(self.path)
            remove_partial_files(self.path)
            self._check_config()
            self.is_continued = (self.path / "status.json").is_file()
            self._record_start()
        except OSError as error:
            self._unlock()
            raise RunError(
                f"cannot write in the run's folder {self.path} ({error.strerror or error}); make room there, or choose "
                "another folder with --workdir"
            ) from error
        except BaseException:
            self._unlock()
            raise

    def _unlock(self) -> None:
        if self._lock:
            self._lock.close()

    def _check_config(self) -> None:
        """Refuses a folder with another configuration, writes the configuration into a new one."""
        recorded = self.path / "config.json"
        if recorded.is_file():
            if differences := describe_differences(from_json(recorded.read_text()), self.config, "recorded", "now"):
                raise RunError(
                    f"{self.path} holds a run with another configuration ({differences}); "
                    "give this one its own folder with --workdir, or delete that one"
                )
        else:
            strange = sorted(p.name for p in self.path.iterdir() if p.name != LOCK)
            if strange:
                raise RunError(f"{self.path} is no run: it holds {', '.join(strange[:3])}; choose another --workdir")
            write_atomic(recorded, to_json(self.config))

    def _record_start(self) -> None:
        """Records the environment of a first start, or how this one's differs, and the state "running"."""
        path = self.path / "environment.json"
        now = describe_environment() | {"seed": self.config.get("seed")}
        if path.is_file():
            first = read_json(path)
            changed = {key: value for key, value in now.items() if first.get(key) != value}
            first.setdefault("restarts", []).append({"started": time.time(), "changed": changed})
            write_json(path, first)
        else:
            write_json(path, now)
        if not self.is_continued:
            progress = Progress("running", "", 0, None, None, started=time.time(), updated=time.time())
            write_json(self.path / "status.json", dataclasses.asdict(progress))
        elif not self.is_finished:
            self._write_progress(status="running", error=None)

    def _write_progress(self, **changes: Any) -> None:
        """Changes fields of `status.json`."""
        if self._is_writer:
            progress = dataclasses.replace(self.progress, updated=time.time(), **changes)
            write_json(self.path / "status.json", dataclasses.asdict(progress))


def _require_one_config(texts: list[str]) -> None:
    """Refuses hosts that were started with different configurations."""
    first = from_json(texts[0])
    for host, text in enumerate(texts):
        if differences := describe_differences(first, from_json(text), "on host 0", f"on host {host}"):
            raise RunError(f"the hosts have different configurations ({differences}); start all by the same command")
