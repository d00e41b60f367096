"""Training batches in an order that is a function of the key and the step, read through grain.

Record number `step` of the data source is the whole batch of that step, drawn from `fold_in(key, step)`. Nothing else
is remembered, so a run resumes at any step, however often it was killed, and no iterator needs a checkpoint.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.config import DataConfig
from moe_jax.data.documents import Document, domain_names, group_by_domain
from moe_jax.data.sequences import numpy_generator


@dataclasses.dataclass(frozen=True)
class Batch:
    """B random crops of documents. NumPy arrays.

    Attributes:
      tokens: `[B, S+1]` int32; 0 where masked.
      mask: `[B, S+1]` bool; False is padding behind a document shorter than S+1.
      domain: `[B]` int32 index into the documents' `domain_names`.
    """

    tokens: np.ndarray
    mask: np.ndarray
    domain: np.ndarray


def train_batches(
    documents: Sequence[Document], config: DataConfig, key: jax.Array, start_step: int, num_steps: int
) -> Iterator[Batch]:
    """Yields the batches of the steps `start_step, ..., num_steps - 1`, prefetched by a thread.

    In every batch each domain has its share of the rows, to less than one row, and the rows are in random order. Within
    a domain a document is drawn in proportion to its tokens, and of it a random run of S+1 of them, or all of a short
    one.

    Args:
      documents: the training split.
      config: `sequence_length` S, `batch_size` B and `domain_weights` are read.
      key: PRNG key of the run's data; every step folds its number into it.
      start_step: the first step to yield.
      num_steps: steps of the whole run.

    Returns:
      An iterator of `num_steps - start_step` batches.

    Raises:
      ValueError: the weights are not one a domain.
    """
    source = _StepSource(documents, config, key, num_steps)
    dataset = grain.MapDataset.source(source)[start_step:]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


class _StepSource:
    """Random access to the batch of a step: grain's `RandomAccessDataSource` protocol."""

    def __init__(self, documents: Sequence[Document], config: DataConfig, key: jax.Array, num_steps: int):
        names = domain_names(documents)
        weights = np.array(config.domain_weights or [1.0] * len(names))
        if len(weights) != len(names):
            raise ValueError(f"domain_weights has {len(weights)} numbers, expected one a domain: {', '.join(names)}")
        self._num_tokens, self._batch_size = config.sequence_length + 1, config.batch_size
        self._cumulative_weights = np.cumsum(weights / weights.sum())
        ordered = [document for members in group_by_domain(documents).values() for document in members]
        self._tokens = np.concatenate([document.tokens for document in ordered])
        sizes = np.array([len(document.tokens) for document in ordered])
        self._ends = np.cumsum(sizes)
        self._starts = self._ends - sizes
        self._num_crops = np.maximum(sizes - config.sequence_length, 1)
        owner = [names.index(document.domain) for document in ordered]
        self._domain_starts = np.concatenate([[0], np.cumsum(np.bincount(owner, sizes).astype(np.int64))])
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_steps, dtype=jnp.uint32))
        self._key_data = np.asarray(jax.random.key_data(keys))

    def __len__(self) -> int:
        return len(self._key_data)

    def __getitem__(self, step: int) -> Batch:
        random = numpy_generator(self._key_data[step])
        rows = self._batch_size
        # One random offset for evenly spaced points keeps each domain's share to less than a row.
        points = (random.permutation(rows) + random.random()) / rows
        domain = np.searchsorted(self._cumulative_weights[:-1], points, side="right")
        low, high = self._domain_starts[domain], self._domain_starts[domain + 1]
        byte = low + (random.random(rows) * (high - low)).astype(np.int64)
        document = np.searchsorted(self._ends, byte, side="right")
        crop = (random.random(rows) * self._num_crops[document]).astype(np.int64)
        position = (self._starts[document] + crop)[:, None] + np.arange(self._num_tokens)[None, :]
        mask = position < self._ends[document][:, None]
        tokens = np.where(mask, self._tokens[np.minimum(position, len(self._tokens) - 1)], 0)
        return Batch(tokens.astype(np.int32), mask, domain.astype(np.int32))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} steps, {len(self._tokens)} tokens)"
