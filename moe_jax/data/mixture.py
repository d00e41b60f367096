"""How much of each domain a model is trained on."""

from collections.abc import Sequence

import numpy as np

from moe_jax.data.config import DataConfig
from moe_jax.data.documents import Document, domain_names


def domain_shares(documents: Sequence[Document], config: DataConfig) -> np.ndarray:
    """The share of each domain in training batches.

    Args:
      documents: the training split.
      config: `domain_weights`, else `domain_temperature` T: shares proportional to a domain's bytes to the power 1/T,
        or all equal if that is None.

    Returns:
      `[domains]` float64, in the order of `domain_names`, with sum 1.

    Raises:
      ValueError: the weights are not one a domain.
    """
    names = domain_names(documents)
    weights = np.array(config.domain_weights or [1.0] * len(names))
    if len(weights) != len(names):
        raise ValueError(f"domain_weights has {len(weights)} numbers, expected one a domain: {', '.join(names)}")
    if not config.domain_weights and config.domain_temperature is not None:
        sizes = np.bincount(domain_indices(documents), [len(document.text) for document in documents])
        weights = (sizes / sizes.max()) ** (1 / config.domain_temperature)
    return weights / weights.sum()


def domain_indices(documents: Sequence[Document]) -> np.ndarray:
    """`[documents]` index of each one's domain."""
    index = {name: i for i, name in enumerate(domain_names(documents))}
    return np.array([index[document.domain] for document in documents])
