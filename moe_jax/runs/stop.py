"""How a run is asked to stop: SIGTERM, which schedulers send before they take a machine away, and Ctrl-C.

Training ends its step, saves and leaves; the same command continues it. A second signal ends the process at once, and
so does the first one outside of training, where there is nothing to save. With several hosts the first is noted
wherever it comes, and a signal to one of them stops all after the same step of training. (JAX has a service for that,
but Orbax asks it too, from its background threads and with the numbers of old steps.)
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from moe_jax.hosts import any_host, num_hosts

# A scheduler's wish was granted; a shell expects 128 + the signal.
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}


class Stopped(SystemExit):
    """The end of a program that was asked to stop: no error, so its run is "interrupted".

    Attributes:
      code: the exit code.
    """

    code: int


class StopRequest:
    """Whether a signal has asked the program to stop.

    Attributes:
      is_granted: whether `is_due` has said so.
      exit_code: of a program that stops for it.
    """

    def __init__(self) -> None:
        """Begins without one."""
        self.is_granted = False
        self.exit_code = 0
        self._is_noted = False

    def is_due(self) -> bool:
        """Whether to stop after this step, the same on every host; all must ask after every step."""
        self.is_granted = any_host(self._is_noted)
        return self.is_granted

    def note(self, number: int) -> None:
        """Takes down a signal."""
        self._is_noted, self.exit_code = True, EXIT_CODES[signal.Signals(number)]


# What came before the training that will act on it; signals belong to the process, and so does this.
_early = StopRequest()


@contextlib.contextmanager
def listening() -> Iterator[StopRequest]:
    """While entered, a signal is only noted, so that the program can stop between two steps."""
    request = _early if num_hosts() > 1 else StopRequest()
    with _handling(EXIT_CODES, request.note):
        yield request


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """While entered, SIGTERM leaves by `Stopped` wherever the program is; several hosts only note it."""

    def leave(number: int) -> None:
        if num_hosts() > 1:
            _early.note(number)
        else:
            raise Stopped(EXIT_CODES[signal.SIGTERM])

    with _handling([signal.SIGTERM], leave):
        yield


@contextlib.contextmanager
def _handling(signals: Iterable[signal.Signals], handler: Callable[[int], None]) -> Iterator[None]:
    """Handles the first of the signals; the next one ends the process. Threads other than the main one cannot."""

    def receive(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        handler(number)

    is_main = threading.current_thread() is threading.main_thread()
    before = {each: signal.getsignal(each) for each in signals if is_main}
    for each in before:
        signal.signal(each, receive)
    try:
        yield
    finally:
        for each, old in before.items():
            # None is a handler that was not set from Python, such as JAX's.
            signal.signal(each, signal.SIG_DFL if old is None else old)
