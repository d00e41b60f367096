"""Held-out text as sequences of one length: every byte that can be predicted is predicted exactly once."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moe_jax.data.documents import Document, domain_names


@dataclasses.dataclass(frozen=True)
class Sequences:
    """N sequences of S+1 bytes: S inputs and, one further, S targets. NumPy arrays.

    Attributes:
      tokens: `[N, S+1]` uint8; 0 where masked.
      mask: `[N, S+1]` bool; False is padding behind the end of a document.
      domain: `[N]` int32 index into `domain_names`.
      document: `[N]` int32 index into the packed documents.
      domain_names: names of the domains.
    """

    tokens: np.ndarray
    mask: np.ndarray
    domain: np.ndarray
    document: np.ndarray
    domain_names: tuple[str, ...]

    def __len__(self) -> int:
        """Returns N."""
        return len(self.tokens)


def pack(documents: Sequence[Document], sequence_length: int) -> Sequences:
    """Cuts documents into windows that overlap by one byte: the last target of one is the first input of the next.

    A sequence never crosses documents. A document's first byte is input only, since nothing precedes it. The first byte
    of a window is seen without what came before it, so a model has between 1 and S bytes of context for a prediction.

    Args:
      documents: a split.
      sequence_length: S.

    Returns:
      All windows, in the order of the documents.

    Raises:
      ValueError: no document has two bytes.
    """
    names = domain_names(documents)
    tokens, masks, domains, owners = [], [], [], []
    for index, document in enumerate(documents):
        num_windows = -(-(len(document.text) - 1) // sequence_length)
        if num_windows < 1:
            continue
        padded = np.zeros(num_windows * sequence_length + 1, np.uint8)
        padded[: len(document.text)] = np.frombuffer(document.text, np.uint8)
        is_text = np.arange(len(padded)) < len(document.text)
        tokens.append(sliding_window_view(padded, sequence_length + 1)[::sequence_length])
        masks.append(sliding_window_view(is_text, sequence_length + 1)[::sequence_length])
        domains += [names.index(document.domain)] * num_windows
        owners += [index] * num_windows
    if not tokens:
        raise ValueError(
            f"none of the {len(documents)} documents has two bytes, the least that has something to predict"
        )
    return Sequences(
        np.concatenate(tokens), np.concatenate(masks), np.array(domains, np.int32), np.array(owners, np.int32), names
    )


def balanced_subset(sequences: Sequences, per_domain: int, key: jax.Array) -> Sequences:
    """Draws the same number of sequences from every domain, without replacement.

    Args:
      sequences: to draw from.
      per_domain: how many of each domain.
      key: PRNG key; consumed.

    Returns:
      `per_domain` sequences of each domain, in their former order.

    Raises:
      ValueError: a domain has fewer.
    """
    random = numpy_generator(key)
    chosen = []
    for index, name in enumerate(sequences.domain_names):
        members = np.flatnonzero(sequences.domain == index)
        if len(members) < per_domain:
            raise ValueError(f"domain {name!r} has {len(members)} sequences, fewer than the {per_domain} asked for")
        chosen.append(random.choice(members, per_domain, replace=False))
    rows = np.sort(np.concatenate(chosen))
    return dataclasses.replace(
        sequences,
        tokens=sequences.tokens[rows],
        mask=sequences.mask[rows],
        domain=sequences.domain[rows],
        document=sequences.document[rows],
    )


def numpy_generator(key: jax.Array | np.ndarray) -> np.random.Generator:
    """Makes a NumPy generator of a JAX key, or of its data as uint32 words, for work on the host."""
    words = key if isinstance(key, np.ndarray) else np.asarray(jax.random.key_data(key))
    return np.random.Generator(np.random.Philox(words.ravel().tolist()))
