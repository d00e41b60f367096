"""Where a checkpoint is: a folder of this machine, or a name on the Hugging Face hub, which is then downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from moe_jax.checkpoints.hub.tensor_files import HubError

_WANTED = ["*.safetensors", "*.json", "*.model", "*.jinja", "merges.txt"]  # nothing that would have to be unpickled
_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def locate(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a checkpoint, or its `.gguf` file.

    Args:
      name: a folder or such a file, or a name such as "mistralai/Mixtral-8x7B-v0.1", which `huggingface_hub` downloads
        into its cache and, if it was interrupted, goes on with.
      revision: a branch, tag or commit of the hub.

    Raises:
      HubError: neither a folder nor a name of the hub, no `huggingface_hub`, no network, or no such model.
    """
    folder = Path(name)
    if folder.is_dir() or (folder.is_file() and folder.suffix == ".gguf"):
        return folder
    if folder.exists() or not _ID.fullmatch(str(name)):
        raise HubError(
            f"{name} is neither a folder, nor a .gguf file, nor a name of the Hugging Face hub such as org/model"
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(
            f"{name} is no folder here, and downloading it needs huggingface_hub: pip install 'moe_jax[hf]'"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=_WANTED))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HubError(
            f"{name} could not be downloaded ({reason}); where there is no network, download it elsewhere with "
            f"'hf download {name}' and give the folder instead"
        ) from error
