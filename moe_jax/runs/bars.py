"""The progress display of an experiment: a bar per stage, drawn by rich."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moe_jax.hosts import is_first_host


@dataclasses.dataclass(frozen=True)
class Bar:
    """One line of the progress display."""

    display: Progress
    task: TaskID

    def advance(self, count: int = 1) -> None:
        """So many more done."""
        self.display.advance(self.task, count)

    def show(self, done: int | None = None, note: str = "") -> None:
        """Sets the count (None leaves it) and the note beside it."""
        self.display.update(self.task, completed=done, note=note)


def host_console() -> Console:
    """A console that prints on the first host only."""
    return Console(quiet=not is_first_host())


def progress_display() -> Progress:
    """The display, to be entered as a context; `bar` adds lines to it. Other hosts than the first show nothing."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=host_console(),
    )


@contextmanager
def bar(display: Progress, title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A bar for one stage; a plain line where there is no terminal to draw it on."""
    if not display.console.is_terminal:
        display.console.print(f"{title}: {done} of {total} done")
    yield Bar(display, display.add_task(title, total=total, completed=done, note=""))
