"""Held-out text as sequences of one length: every token that can be predicted is predicted exactly once."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moe_jax.data.documents import Document, domain_names


@dataclasses.dataclass(frozen=True)
class Sequences:
    """N sequences of S+1 tokens: S inputs and, one further, S targets. NumPy arrays.

    Attributes:
      tokens: `[N, S+1]` uint8 bytes or int32 ids; 0 where masked.
      mask: `[N, S+1]` bool; False is padding behind the end of a document.
      is_scored: `[N, S]` bool; which targets count, so that every token counts once though windows may overlap.
      domain: `[N]` int32 index into `domain_names`.
      document: `[N]` int32 index into the packed documents.
      domain_names: names of the domains.
      num_bytes: `[N]` int64, the bytes of text that the scored targets stand for.
    """

    tokens: np.ndarray
    mask: np.ndarray
    is_scored: np.ndarray
    domain: np.ndarray
    document: np.ndarray
    domain_names: tuple[str, ...]
    num_bytes: np.ndarray

    def __len__(self) -> int:
        """Returns N."""
        return len(self.tokens)


def pack(documents: Sequence[Document], sequence_length: int, context: int = 0) -> Sequences:
    """Cuts documents into windows in which every token but a document's first is a scored target exactly once.

    Windows start `S - context` tokens apart, and each but a document's first one scores only the targets that have
    more than `context` tokens before them in the window. Without context a window's first prediction rests on one
    token; with `context = S / 2` every prediction rests on at least half a window, for twice the computation.

    Args:
      documents: a split.
      sequence_length: S.
      context: tokens of a window that are only read, in `[0, S)`.

    Returns:
      All windows, in the order of the documents; none crosses documents.

    Raises:
      ValueError: no document has two tokens, or `context` leaves nothing to score.
    """
    if not 0 <= context < sequence_length:
        raise ValueError(f"context={context} must be in [0, sequence_length={sequence_length})")
    stride = sequence_length - context
    names = domain_names(documents)
    tokens, masks, scored, domains, owners, num_bytes = [], [], [], [], [], []
    for index, document in enumerate(documents):
        text = document.tokens
        if len(text) < 2:
            continue
        num_windows = 1 + max(0, -(-(len(text) - 1 - sequence_length) // stride))
        padded = np.zeros((num_windows - 1) * stride + sequence_length + 1, text.dtype)
        padded[: len(text)] = text
        is_text = np.arange(len(padded)) < len(text)
        bytes_of = np.zeros(len(padded), np.int64)
        bytes_of[: len(text)] = document.byte_counts
        tokens.append(sliding_window_view(padded, sequence_length + 1)[::stride])
        masks.append(sliding_window_view(is_text, sequence_length + 1)[::stride])
        is_new = (np.arange(sequence_length)[None, :] >= context) | (np.arange(num_windows)[:, None] == 0)
        scored.append(masks[-1][:, 1:] & is_new)
        windows = sliding_window_view(bytes_of, sequence_length + 1)[::stride]
        num_bytes.append((windows[:, 1:] * scored[-1]).sum(1))
        domains += [names.index(document.domain)] * num_windows
        owners += [index] * num_windows
    if not tokens:
        raise ValueError(
            f"none of the {len(documents)} documents has two tokens, the least that has something to predict"
        )
    return Sequences(
        np.concatenate(tokens),
        np.concatenate(masks),
        np.concatenate(scored),
        np.array(domains, np.int32),
        np.array(owners, np.int32),
        names,
        np.concatenate(num_bytes),
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
        is_scored=sequences.is_scored[rows],
        domain=sequences.domain[rows],
        document=sequences.document[rows],
        num_bytes=sequences.num_bytes[rows],
    )


def numpy_generator(key: jax.Array | np.ndarray) -> np.random.Generator:
    """Makes a NumPy generator of a JAX key, or of its data as uint32 words, for work on the host."""
    words = key if isinstance(key, np.ndarray) else np.asarray(jax.random.key_data(key))
    return np.random.Generator(np.random.Philox(words.ravel().tolist()))
