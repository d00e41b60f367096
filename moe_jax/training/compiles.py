"""How often XLA compiles, and which argument made it compile a function once more."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # the event of every program, also one read from the cache
MOST_NAMED = 3


class RecompileWarning(UserWarning):
    """A function that should have one program got another; the message names the argument that changed."""


class CompileCounter:
    """Counts the programs that this process has compiled or read from the persistent cache, and their seconds."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            self.count += 1
            self.seconds += duration_secs


@functools.cache
def compile_counter() -> CompileCounter:
    """The process's counter; it counts from the first call of this function."""
    return CompileCounter()


def warn_of_recompiles(function: Callable[..., Any], what: str, names: tuple[str, ...]) -> Callable[..., Any]:
    """Wraps a jitted function: every compilation but the first is a RecompileWarning with its cause.

    Costs nothing in calls that compile nothing.

    Args:
      function: from `jax.jit`.
      what: its name in the message.
      names: of its positional arguments.
    """
    counter = compile_counter()
    known: dict[str, str] = {}
    calls = 0

    def watched(*arguments: Any) -> Any:
        nonlocal known, calls
        before = counter.count
        result = function(*arguments)
        calls += 1
        if counter.count > before:
            signature = _signature(names, arguments)
            if known:
                warnings.warn(
                    f"call {calls} compiled {what} again: {_difference(known, signature)}",
                    RecompileWarning,
                    stacklevel=2,
                )
            known = signature
        return result

    return watched


def _signature(names: tuple[str, ...], arguments: tuple) -> dict[str, str]:
    """Path -> what a compiled program depends on; works on donated arrays too."""
    return {
        "/".join(filter(None, (name, jax.tree_util.keystr(path, simple=True, separator="/")))): _describe(leaf)
        for name, argument in zip(names, arguments, strict=False)
        for path, leaf in jax.tree_util.tree_leaves_with_path(argument)
    }


def _describe(leaf: Any) -> str:
    """Dtype, shape, whether the dtype is weak, and the sharding if the array is bound to one."""
    aval = jax.typeof(leaf)
    text = f"{aval.dtype}{list(aval.shape)}" + (" (a Python number's weak dtype)" if aval.weak_type else "")
    return text + (f" on {leaf.sharding}" if getattr(leaf, "committed", False) else "")


def _difference(before: dict[str, str], after: dict[str, str]) -> str:
    """Names the leaves that changed."""
    changes = [
        f"{name} was {before.get(name, 'absent')} and is {after.get(name, 'absent')}"
        for name in {**before, **after}
        if before.get(name) != after.get(name)
    ]
    if not changes:
        return "its arguments are as before; a changed jax.config, or another thread that compiles, can be the reason"
    rest = f"; and {len(changes) - MOST_NAMED} more" if len(changes) > MOST_NAMED else ""
    return "; ".join(changes[:MOST_NAMED]) + rest
