"""How a run is asked to stop: SIGTERM, which schedulers send before they take a machine away, and Ctrl-C.

Training ends its step, saves and leaves; the same command continues it. A second signal ends the process at once, and
so does the first where there is nothing to save. With several hosts a signal to one of them stops all after the same
step: JAX listens for SIGTERM there and lets the hosts agree (`multihost_utils.reached_preemption_sync_point`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from jax.experimental import multihost_utils

from moe_jax.hosts import num_hosts

# A scheduler's wish was granted; a shell expects 128 + the signal.
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
Handler = Callable[[int, FrameType | None], None]


class Stopped(SystemExit):
    """The end of a program that was asked to stop, with its exit code: no error, so its run is "interrupted"."""


class StopRequest:
    """What signals have asked for since `listening` began."""

    def __init__(self) -> None:
        """Begins without one."""
        self._received: signal.Signals | None = None

    def is_due(self, step: int) -> bool:
        """Whether to stop after this step, the same on every host. All must ask after every step."""
        if num_hosts() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received is not None

    @property
    def exit_code(self) -> int:
        """Of a program that stops for it."""
        return EXIT_CODES[self._received or signal.SIGTERM]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        if num_hosts() > 1:
            # Told as JAX listens for it; host 0 hears of it from there.
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """While entered, the first signal is only noted, so that the program can stop between two steps."""
    request = StopRequest()
    with _handling(request._receive):
        yield request


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """While entered, SIGTERM leaves by `Stopped` wherever the program is; Ctrl-C is KeyboardInterrupt as ever."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Stopped(EXIT_CODES[signal.SIGTERM])

    with _handling(leave, (signal.SIGTERM,)):
        yield


@contextlib.contextmanager
def _handling(handler: Handler, signals: tuple[signal.Signals, ...] = tuple(EXIT_CODES)) -> Iterator[None]:
    """Handles the first of the signals; the next one ends the process. Only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def first(number: int, frame: FrameType | None) -> None:
        for each in mine:
            signal.signal(each, signal.SIG_DFL)
        handler(number, frame)

    # JAX has its own handler of SIGTERM where there are several hosts.
    mine = [each for each in signals if num_hosts() == 1 or each != signal.SIGTERM]
    before = {each: signal.signal(each, first) for each in mine}
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)
