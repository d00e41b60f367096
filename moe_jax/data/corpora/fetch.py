"""Downloads the packages of the manifest with pip, npm and apt-get as the machine has them configured.

The clients know the mirrors, proxies, certificates and credentials, so that none of these is known here. Nothing of a
package is executed: apt and `npm pack --ignore-scripts` only store the archive, and pip is held to wheels, since to
look at a source distribution it would run its build.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from moe_jax.data.corpora.source import CorpusError, Source

_PIP = (sys.executable, "-m", "pip")


def is_available(client: str) -> bool:
    """Tells whether a client can be run."""
    if client == "pip":
        return subprocess.run([*_PIP, "--version"], capture_output=True, check=False).returncode == 0
    return shutil.which(client) is not None


def fetch(source: Source, folder: Path, any_version: bool = False) -> Path:
    """Returns the archive of a package, after downloading it if need be.

    An archive has its place in the folder only when it is whole and its SHA-256 is right, so that a download that was
    killed never counts. What is there of one stays in a sub-folder, where apt goes on with it; npm and pip begin again.
    Other processes that want the same package wait.

    Args:
      source: the package.
      folder: of the archives.
      any_version: take the version that is the newest when it is first asked for; only the client knows whether it is
        intact.

    Raises:
      CorpusError: it cannot be downloaded, or is another one than the manifest's.
    """
    name = f"{source.client}-{source.package.replace('/', '-')}-{'newest' if any_version else source.version}"
    place, partial = folder / name, folder / f"{name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.is_file():
            return place
        if any_version:
            for left in _archives(partial):
                left.unlink()  # it may be half of a version that is no longer the newest
        archive = _download(source, "" if any_version else source.version, partial, lock.fileno())
        if not any_version and (found := digest(archive)) != source.sha256:
            archive.unlink()
            raise CorpusError(
                f"{source.package} {source.version} from {source.client} has SHA-256 {found}, expected "
                f"{source.sha256}; it was deleted. Try again; if the sum stays, the package was changed or replaced"
            )
        return archive.replace(place)


def digest(path: Path) -> str:
    """Returns a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _archives(folder: Path) -> list[Path]:
    """Lists what clients left in a folder, whole or not."""
    return [path for path in folder.iterdir() if path.suffix in (".deb", ".tgz", ".whl")]


def _download(source: Source, version: str, partial: Path, lock: int) -> Path:
    """Lets the client download into a folder and returns the archive.

    The client holds the lock too: if this process is killed, the next one waits for it to end.
    """

    def run(*command: str, cwd: Path = partial) -> str:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, pass_fds=[lock])
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-1000:]
            raise CorpusError(
                f"{source.client} could not download {source.package} {version}. Look at the network; "
                f"{'`apt-get update` refreshes the lists; ' if source.client == 'apt-get' else ''}where the version is "
                f"gone, --any-version takes the newest one. `{' '.join(command)}` said:\n{said}"
            )
        return done.stdout

    if source.client == "npm":
        run("npm", "pack", "--ignore-scripts", f"{source.package}@{version or 'latest'}")
    elif source.client == "pip":
        options = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest=.")
        run(*_PIP, "download", *options, source.package + (version and f"=={version}"))
    else:
        package = source.package + (version and f"={version}")
        # Elsewhere, since apt-get would remove what is there of the archive, and that is to be gone on with.
        asked = run("apt-get", "--print-uris", "download", package, cwd=partial.parent)
        address, name, _, checksum = asked.split()
        methods = run("apt-config", "dump", "--format=%v", "Dir::Bin::methods")
        run(str(Path(methods).with_name("apt-helper")), "download-file", address.strip("'"), name, checksum)
    (archive,) = _archives(partial)
    return archive
