"""What a result depends on besides its configuration: versions, device, commit; and the cache of compiled programs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "evosax", "orbax-checkpoint", "grain", "numpy", "moe_jax")


def describe_environment() -> dict[str, Any]:
    """Describes the machine and the software; starts JAX's backend.

    Returns:
      JSON-able dict: `python`, `packages` (name -> version, None if not installed), `platform`, `cpu_count` (usable
      cores), `backend`, `devices` (kinds), `git_commit` and `git_is_dirty` of this code's checkout (None outside of
      one), `command`. Neither the machine's name nor the user's.
    """
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        **_git_state(Path(__file__).parent),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
    }


def enable_compilation_cache() -> Path:
    """Keeps compiled programs between processes, so that a second start is fast.

    The folder is JAX_COMPILATION_CACHE_DIR, or `moe_jax/compiled` in the user's cache folder (XDG_CACHE_HOME).

    Returns:
      The folder.
    """
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", user_cache / "moe_jax" / "compiled"))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX's one second would leave out the hundreds of small programs that make up most of a start on CPU.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    return folder


def use_huge_pages(setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> None:
    """Starts the interpreter anew, once, with an allocator that asks for huge pages, where that is left to programs.

    XLA takes its temporary buffers from malloc anew for every call, and each 4 kB page costs a fault: 25,000 of them
    in a training step of the main job's model on 16 sequences, which took 128 ms with small pages and 103 ms with huge
    ones (medians of three runs each, 2 CPU cores, JAX 0.10.2). glibc reads its setting when a process starts, hence
    the new start. A GLIBC_TUNABLES in the environment is left alone.

    Args:
      setting: the kernel's file that says whether programs may ask.
    """
    if "GLIBC_TUNABLES" in os.environ or not setting.is_file() or "[madvise]" not in setting.read_text():
        return
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _version(package: str) -> str | None:
    """Returns the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any]:
    """Returns the commit of the checkout that holds a folder and whether it was changed; None outside of git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--", ":/"], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_is_dirty": None}
    return {"git_commit": commit.stdout.strip(), "git_is_dirty": bool(status.stdout.strip())}
