"""What a run says about its data."""

import dataclasses
import re
from typing import Literal


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, how it is split, and how it is cut into sequences.

    Attributes:
      domains: built-in domains, keys of `moe_jax.data.BUILT_IN`.
      folders: folders of UTF-8 text: "name=path" makes one domain of every file below `path`; "path" alone makes a
        domain of each of its sub-folders.
      tables: Parquet or Arrow files, or folders of them: "name=path" makes one domain of all rows; "path" alone takes
        the domain of each row from a column.
      hf: data sets of the Hugging Face hub, "dataset:split:column:subset" of which all but the first may be left out,
        such as "roneneldan/TinyStories:train:text"; "name=…" names the domain.
      table_columns: which columns of tables hold a document's text, its domain and its name; the last may be missing.
      max_bytes_per_domain: of a domain with more text, only so much is taken: of folders and built-in text a sample
        that depends on the documents' names only, of tables the first rows.
      python_bytes: how much of the interpreter's standard library the domain "python" reads, bytes.
      search_fraction: share of every domain's bytes that the search may see.
      selection_fraction: share on which the search's results are compared.
      test_fraction: share on which the chosen ones are reported; training gets the rest.
      seed: of the split; training order has its own key.
      sequence_length: S, the bytes that are predicted in a sequence.
      batch_size: B, sequences in a training batch.
      domain_weights: share of each domain, in the order built-in, folders, tables, hf, in training batches; empty to
        go by `domain_temperature`.
      domain_temperature: T: shares go as a domain's bytes to the power 1/T, so 1 is in proportion and more is more even
        (1907.05019, section 3.2); None for equal shares.
      packing: "crop" draws random runs of documents; "pack" uses every document whole, once an epoch, several in a row.
      tokenizer: "" for bytes; a folder with the tokenizer of a model; or "bpe:4096", a byte-level BPE of 4,096 tokens,
        trained on a sample of the training split and kept in the run's folder.
      workers: processes that make batches ahead of training; 0 for a thread of its own. The batches are the same.
    """

    domains: tuple[str, ...] = ("speeches", "novel", "mathematics", "python")
    folders: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    hf: tuple[str, ...] = ()
    table_columns: tuple[str, str, str] = ("text", "domain", "name")
    max_bytes_per_domain: int | None = None
    python_bytes: int = 400_000
    search_fraction: float = 0.06
    selection_fraction: float = 0.06
    test_fraction: float = 0.06
    seed: int = 0
    sequence_length: int = 128
    batch_size: int = 32
    domain_weights: tuple[float, ...] = ()
    domain_temperature: float | None = None
    packing: Literal["crop", "pack"] = "crop"
    tokenizer: str = ""
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuses values that make no sense.

        Raises:
          ValueError: naming the field, its value and what is expected.
        """
        if not (self.domains or self.folders or self.tables or self.hf):
            raise ValueError("domains, folders, tables and hf are all empty; name at least one source of text")
        if self.max_bytes_per_domain is not None and self.max_bytes_per_domain < 1:
            raise ValueError(f"max_bytes_per_domain is {self.max_bytes_per_domain}, expected at least 1, or None")
        for name in ("python_bytes", "sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.domain_temperature is not None and not 0 < self.domain_temperature < float("inf"):
            raise ValueError(f"domain_temperature is {self.domain_temperature}, expected a number above 0, or None")
        if self.packing not in ("crop", "pack"):
            raise ValueError(f"packing is {self.packing!r}, expected 'crop' or 'pack'")
        if self.tokenizer.startswith("bpe:") and not re.fullmatch(r"bpe:[1-9][0-9]*", self.tokenizer):
            raise ValueError(f"tokenizer is {self.tokenizer!r}, expected 'bpe:' and a number of tokens")
        held_out = (self.search_fraction, self.selection_fraction, self.test_fraction)
        if not (min(held_out) > 0 and sum(held_out) < 1):
            raise ValueError(
                f"search_fraction, selection_fraction and test_fraction are {held_out}; "
                "each must be above 0, and their sum below 1 so that training gets the rest"
            )
        if self.domain_weights and not (min(self.domain_weights) >= 0 and 0 < sum(self.domain_weights) < float("inf")):
            raise ValueError(f"domain_weights is {self.domain_weights}, expected numbers from 0 up, not all of them 0")
