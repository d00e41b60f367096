"""The byte n-gram baseline: interpolated modified Kneser-Ney (Chen & Goodman 1998, TR-10-98, section 3).

The paper finds it the best of the smoothings it compares. With `c` the count of an n-gram (at lower orders: the number
of different symbols seen before it) and `h'` the context `h` without its first byte,

    p(w | h) = (c(h w) - D(c(h w))) / c(h) + (D1 N1(h) + D2 N2(h) + D3 N3+(h)) / c(h) * p(w | h')

down to the uniform distribution below order 1; `Ni(h)` counts the bytes that followed `h` exactly i times, and the
discounts come from the counts of counts. A context never seen leaves all to the lower order. Documents start with a
boundary symbol, so their first bytes have a full context too.

The neural model has at most S bytes of context, and one at the start of a window; the n-gram always has its full
`order - 1`, across windows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.data.documents import Document, domain_names

_BITS = 9  # of a symbol inside a key: 256 bytes and the boundary
_BOUNDARY = 256
_MAX_ORDER = 64 // _BITS


class Order(NamedTuple):
    """One order's statistics: sorted keys with a value each.

    Attributes:
      grams: `[M]` uint64 keys of context and byte.
      terms: `[M]` float64 `(c - D(c)) / c(h)`.
      contexts: `[Q]` uint64 keys.
      backoffs: `[Q]` float64 weight of the lower order.
    """

    grams: np.ndarray
    terms: np.ndarray
    contexts: np.ndarray
    backoffs: np.ndarray


class Ngram(NamedTuple):
    """A fitted model: statistics of the orders 1, 2, ..., n."""

    orders: tuple[Order, ...]


def fit(documents: Sequence[Document], order: int = 5) -> Ngram:
    """Fits a byte n-gram model.

    Args:
      documents: the training split.
      order: n; a byte is predicted from the `n - 1` before it.

    Returns:
      The model.

    Raises:
      ValueError: the order is outside 1 to 7, whose keys fit in 64 bits.
    """
    if not 1 <= order <= _MAX_ORDER:
        raise ValueError(f"order is {order}, expected 1 to {_MAX_ORDER}")
    keys = np.concatenate([_keys(document.text, order) for document in documents])
    grams, counts = np.unique(keys, return_counts=True)
    orders = [_smooth(grams, counts)]
    for lower in range(order - 1, 0, -1):
        # A gram's count becomes the number of different symbols in front of it.
        grams, counts = np.unique(grams & np.uint64((1 << _BITS * lower) - 1), return_counts=True)
        orders.append(_smooth(grams, counts))
    return Ngram(tuple(reversed(orders)))


def probabilities(model: Ngram, keys: np.ndarray) -> np.ndarray:
    """Evaluates `p(byte | context)`.

    Args:
      model: the model, of order n.
      keys: uint64 of any shape: n symbols of 9 bits, the predicted byte lowest, its context above, nearest first.

    Returns:
      float64 of that shape; over the 256 bytes after any context they sum to 1.
    """
    result = np.full(keys.shape, 1 / 256)
    for index, order in enumerate(model.orders):
        gram = keys & np.uint64((1 << _BITS * (index + 1)) - 1)
        backoff = _look_up(order.contexts, order.backoffs, gram >> np.uint64(_BITS), default=1.0)
        result = _look_up(order.grams, order.terms, gram, default=0.0) + backoff * result
    return result


def log2_probabilities(model: Ngram, text: bytes) -> np.ndarray:
    """Scores the bytes of a document that `pack` makes targets: all but the first.

    Args:
      model: the model.
      text: a document.

    Returns:
      `[len(text) - 1]` float64 bits, at most 0.
    """
    return np.log2(probabilities(model, _keys(text, len(model.orders))[1:]))


def bits_per_byte(model: Ngram, documents: Sequence[Document]) -> dict[str, float]:
    """Scores held-out documents on the bytes that the neural model is scored on.

    Args:
      model: the model.
      documents: a split.

    Returns:
      Bits per predicted byte by domain, and under "all" over all bytes, so that long domains weigh more.
    """
    scores = [(document.domain, log2_probabilities(model, document.text)) for document in documents]
    bits = {"all": np.concatenate([score for _, score in scores])}
    for name in domain_names(documents):
        bits[name] = np.concatenate([score for domain, score in scores if domain == name])
    return {name: -math.fsum(score) / len(score) for name, score in bits.items()}


def _keys(text: bytes, order: int) -> np.ndarray:
    """Codes every byte with its `order - 1` predecessors as one uint64."""
    boundary = np.full(order - 1, _BOUNDARY, np.uint64)
    symbols = np.concatenate([boundary, np.frombuffer(text, np.uint8).astype(np.uint64)])
    keys = np.zeros(len(text), np.uint64)
    for offset in range(order):
        keys = (keys << np.uint64(_BITS)) | symbols[offset : offset + len(text)]
    return keys


def _smooth(grams: np.ndarray, counts: np.ndarray) -> Order:
    """Turns the counts of one order into discounted terms and the weights of the order below."""
    contexts, owner = np.unique(grams >> np.uint64(_BITS), return_inverse=True)
    totals = np.bincount(owner, counts)
    discounts = _discounts(counts)[np.minimum(counts, 3) - 1]
    return Order(grams, (counts - discounts) / totals[owner], contexts, np.bincount(owner, discounts) / totals)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Computes `[3]` discounts for counts of 1, 2 and 3 or more; (0.5, 1, 1.5) where the formula has no answer."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == times)) for times in (1, 2, 3, 4))
    fallback = np.array([0.5, 1.0, 1.5])
    if min(n1, n2, n3, n4) == 0:
        return fallback
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Few n-grams can give a discount below nothing, or one that takes all.
    return discounts if np.all((discounts > 0) & (discounts < [1, 2, 3])) else fallback


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, default: float) -> np.ndarray:
    """Finds the values of wanted keys in a sorted table."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], default)
