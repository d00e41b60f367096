"""Text as bytes: documents by domain, disjoint splits, batches in a reproducible order, and a byte n-gram baseline.

Text as tokens of other models: `open_tokenizer`, with chat templates and streams; or of one's own: `train_tokenizer`.

documents = load_documents(config)
splits = split_documents(documents, config)
batches = train_batches(splits["train"], config, key, start_step=0, num_steps=1000)
heldout = pack(splits["test"], config.sequence_length)
baseline = ngram.bits_per_byte(ngram.fit(splits["train"]), splits["test"])
"""

from moe_jax.data import ngram
from moe_jax.data.batches import train_batches
from moe_jax.data.config import DataConfig
from moe_jax.data.documents import Document, domain_names, drop_duplicates
from moe_jax.data.encoding import tokenize
from moe_jax.data.sequences import Sequences, balanced_subset, pack
from moe_jax.data.smollm2 import fetch_smollm2
from moe_jax.data.sources import BUILT_IN, load_documents
from moe_jax.data.splits import SPLITS, describe_splits, split_documents
from moe_jax.data.step_sources import Batch
from moe_jax.data.tokenizer import (
    TextStream,
    TextTokenizer,
    byte_tokenizer,
    find_tokenizer,
    open_tokenizer,
)
from moe_jax.data.train_tokenizer import train_tokenizer

__all__ = [
    "BUILT_IN",
    "SPLITS",
    "Batch",
    "DataConfig",
    "Document",
    "Sequences",
    "TextStream",
    "TextTokenizer",
    "balanced_subset",
    "byte_tokenizer",
    "describe_splits",
    "domain_names",
    "drop_duplicates",
    "fetch_smollm2",
    "find_tokenizer",
    "load_documents",
    "ngram",
    "open_tokenizer",
    "pack",
    "split_documents",
    "tokenize",
    "train_batches",
    "train_tokenizer",
]
