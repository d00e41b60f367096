"""Documents of data sets on the Hugging Face hub, through the Parquet files that the hub keeps of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_jax.data.documents import Document
from moe_jax.data.tables import take_rows

_REVISION = "refs/convert/parquet"  # where the hub puts every data set as `<subset>/<split>/0000.parquet`
_ENTRY = re.compile(r"(?:([^=:/]+)=)?([\w.-]+(?:/[\w.-]+)?)(?::([\w.-]+))?(?::([\w.-]+))?(?::([\w.-]+))?")


def read_hub(entry: str, columns: tuple[str, str, str], max_bytes: int | None) -> list[Document]:
    """Reads a data set of the Hugging Face hub, file by file and no further than needed.

    `huggingface_hub` downloads into its cache, with the user's token where there is one, and goes on where it stopped.

    Args:
      entry: "dataset:split:column:subset" or "name=…", such as "roneneldan/TinyStories:train:text"; what is left out
        is the split "train", the column of `columns`, and the only subset. Without a name the domain is the data set's.
      columns: names of the columns of text and of documents' names, as in `read_tables`.
      max_bytes: of text, from the beginning. None takes all.

    Returns:
      A document a row.

    Raises:
      ValueError: the data set, its split, subset or column is not there, or the hub is not to be reached.
    """
    if not (match := _ENTRY.fullmatch(entry)):
        raise ValueError(f"hf has {entry!r}, expected 'dataset:split:column:subset' such as 'org/name:train:text'")
    name, dataset, split, column, subset = match.groups()
    files = _list_files(dataset, split or "train", subset)
    fetched = ((_download(dataset, file), f"{dataset}/{file}") for file in files)
    return take_rows(fetched, name or dataset.split("/")[-1], (column or columns[0], *columns[1:]), max_bytes)


def _list_files(dataset: str, split: str, subset: str | None) -> list[str]:
    """Lists the files of a split, in order."""
    import huggingface_hub

    with _advice(dataset):
        listed = huggingface_hub.HfApi().list_repo_files(dataset, repo_type="dataset", revision=_REVISION)
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted(listed):
        parts = file.split("/")
        if len(parts) == 3 and file.endswith(".parquet"):
            found.setdefault((parts[0], parts[1].removeprefix("partial-")), []).append(file)
    subsets = sorted({key[0] for key in found}) if subset is None else [subset]
    if len(subsets) != 1 or (subsets[0], split) not in found:
        known = ", ".join(f"{dataset}:{part}:text:{whole}" for whole, part in sorted(found))
        raise ValueError(f"hf has {dataset} with split {split!r}, which is not one table of it; there is: {known or 0}")
    return found[subsets[0], split]


def _download(dataset: str, file: str) -> Path:
    """Downloads a file, or finds it in the cache."""
    import huggingface_hub

    with _advice(dataset):
        return Path(huggingface_hub.hf_hub_download(dataset, file, repo_type="dataset", revision=_REVISION))


@contextmanager
def _advice(dataset: str) -> Iterator[None]:
    """Says what to do where the hub does not answer."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"hf has {dataset}, but the hub does not give it ({reason}); look at the name, log in with 'hf auth login' "
            f"if it is private, or, where there is no network, download it elsewhere with "
            f"'hf download --repo-type dataset --revision {_REVISION} {dataset}' and name its folder in tables"
        ) from error
