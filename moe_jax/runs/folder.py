"""A run is a folder: what was asked, where it ran, what came out; killed at any moment, the same command continues it.

    runs/<experiment>/<name>/
      config.json        the resolved configuration
      environment.json   versions, device, commit, command of the first start; `restarts`: what later ones changed
      status.json        status, stage, step, error, last checkpoint
      results.json       numbers for people, written by the experiment
      metrics/ checkpoints/ traces/ pictures/  report.html

Rules: the same configuration continues an unfinished run and re-reports a finished one; another configuration in the
same folder is refused; one process at a time (a lock that dies with its process). Every file is written atomically.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from ml_collections import ConfigDict

from moe_jax.runs.config import differing_keys, from_json, to_json
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
            or there is nothing to continue.
        """
        self.path = Path(path)
        self.config = config
        if must_exist and not (self.path / "config.json").is_file():
            raise RunError(f"there is no run to resume in {self.path}; leave out --resume to start one")
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; choose another folder with --workdir")
        self._lock = take_lock(self.path)
        try:
            remove_partial_files(self.path)
            self._check_config()
            self.is_continued = (self.path / "status.json").is_file()
            self._record_start()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and isinstance(error, Exception):
            first_line = (str(error).splitlines() or [""])[0]
            self._write_progress(status="failed", error=f"{type(error).__name__}: {first_line}")
        elif self.progress.status == "running":
            self._write_progress(status="interrupted")
        self._lock.close()

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
        write_json(self.path / "results.json", results)

    def finish(self) -> None:
        """Records that the run has come to its end."""
        self._write_progress(status="finished", error=None)

    def _check_config(self) -> None:
        """Refuses a folder with another configuration, writes the configuration into a new one."""
        recorded = self.path / "config.json"
        if recorded.is_file():
            keys = differing_keys(from_json(recorded.read_text()), self.config)
            if keys:
                raise RunError(
                    f"{self.path} holds a run with another configuration (differs in: {', '.join(keys)}); "
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
        progress = dataclasses.replace(self.progress, updated=time.time(), **changes)
        write_json(self.path / "status.json", dataclasses.asdict(progress))
