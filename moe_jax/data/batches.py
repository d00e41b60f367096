"""Training batches in an order that is a function of the key and the step, read through grain.

Record number `step` of the data source is the whole batch of that step, or a process's rows of it. Nothing else is
remembered, so a run resumes at any step, however often it was killed and on however many processes, and no iterator
needs a checkpoint.
"""

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from moe_jax.data.config import DataConfig
from moe_jax.data.documents import Document, domain_names
from moe_jax.data.packing import PackedRows, pack_rows, ranges
from moe_jax.data.sequences import numpy_generator
from moe_jax.data.token_file import flatten


@dataclasses.dataclass(frozen=True)
class Batch:
    """B rows of text. NumPy arrays.

    Attributes:
      tokens: `[B, S+1]` int32; 0 where masked.
      mask: `[B, S+1]` bool; False is padding.
      domain: `[B]` int32 index into the documents' `domain_names`.
      document: `[B, S+1]` int32 index into the documents; -1 where masked.
      segments: `[B, S+1]` int32: texts that share a row are numbered from 1, padding is 0; None if a row is one text.
    """

    tokens: np.ndarray
    mask: np.ndarray
    domain: np.ndarray
    document: np.ndarray
    segments: np.ndarray | None = None


def train_batches(
    documents: Sequence[Document],
    config: DataConfig,
    key: jax.Array,
    start_step: int,
    num_steps: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields the batches of the steps `start_step, ..., num_steps - 1`, prefetched by a thread or by processes.

    In every batch each domain has its share of the rows, to less than one row, and the rows are in random order. With
    `packing="crop"` a document of a domain is drawn in proportion to its tokens, and of it a random run of S+1 of them,
    or all of a short one. With "pack" a domain's documents are packed into rows, and every row, so every token, is used
    exactly once before the domain's next epoch begins, in another order.

    Args:
      documents: the training split.
      config: `sequence_length` S, `batch_size` B, `packing`, `workers`, `domain_weights` and `domain_temperature`.
      key: PRNG key of the run's data; every step folds its number into it.
      start_step: the first step to yield.
      num_steps: steps of the whole run.
      process_index: which process this is.
      process_count: P; each yields B/P rows, and in the order of the processes they are the batch of one process.

    Returns:
      An iterator of `num_steps - start_step` batches.

    Raises:
      ValueError: the weights are not one a domain, or B is no multiple of P.
    """
    if config.batch_size % process_count:
        raise ValueError(
            f"batch_size is {config.batch_size}, which {process_count} processes cannot share evenly; make it a "
            f"multiple, such as {-(-config.batch_size // process_count) * process_count}, or use fewer processes"
        )
    share = config.batch_size // process_count
    rows = slice(process_index * share, (process_index + 1) * share)
    source = SOURCES[config.packing](documents, config, key, num_steps, rows)
    dataset = grain.MapDataset.source(source)[start_step:].to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    )
    if config.workers:
        if not flags.FLAGS.is_parsed():  # grain looks at absl's flags, and our command lines have none of them
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=8)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)
    return iter(dataset)


def _end_with_parent(index: int, count: int) -> None:
    """Makes a worker end when training is killed; by itself it would wait for ever to hand over its next batch."""
    del index, count

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # a worker is the child of who asked for it
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
        sizes = np.bincount(_owners(documents), [len(document.text) for document in documents])
        weights = (sizes / sizes.max()) ** (1 / config.domain_temperature)
    return weights / weights.sum()


def _owners(documents: Sequence[Document]) -> np.ndarray:
    """`[documents]` index of each one's domain."""
    index = {name: i for i, name in enumerate(domain_names(documents))}
    return np.array([index[document.domain] for document in documents])


class _StepSource:
    """Random access to some rows of the batch of a step: grain's `RandomAccessDataSource` protocol."""

    def __init__(
        self, documents: Sequence[Document], config: DataConfig, key: jax.Array, num_steps: int, rows: slice
    ) -> None:
        self._num_tokens, self._batch_size, self._rows = config.sequence_length + 1, config.batch_size, rows
        self._cumulative_shares = np.cumsum(domain_shares(documents, config))
        self._owner = _owners(documents)
        self._flat = flatten([document.tokens if document.ids is None else document.ids for document in documents])
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_steps, dtype=jnp.uint32))
        self._key_data = np.asarray(jax.random.key_data(keys))

    def __len__(self) -> int:
        return len(self._key_data)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} steps, {len(self._flat.sizes)} documents)"


class _CropSource(_StepSource):
    """Random crops of documents."""

    def __init__(
        self, documents: Sequence[Document], config: DataConfig, key: jax.Array, num_steps: int, rows: slice
    ) -> None:
        super().__init__(documents, config, key, num_steps, rows)
        self._order = np.argsort(self._owner, kind="stable")  # domain by domain
        sizes = self._flat.sizes[self._order]
        self._ends = np.cumsum(sizes)
        self._num_crops = np.maximum(sizes - config.sequence_length, 1)
        self._domain_starts = np.concatenate(
            [[0], np.cumsum(np.bincount(self._owner, self._flat.sizes)).astype(np.int64)]
        )

    def __getitem__(self, step: int) -> Batch:
        random = numpy_generator(self._key_data[step])
        rows = self._batch_size
        # One random offset for evenly spaced points keeps each domain's share to less than a row.
        points = (random.permutation(rows) + random.random()) / rows
        domain = np.searchsorted(self._cumulative_shares[:-1], points, side="right")
        low, high = self._domain_starts[domain], self._domain_starts[domain + 1]
        token = low + (random.random(rows) * (high - low)).astype(np.int64)
        chosen = np.searchsorted(self._ends, token, side="right")
        crop = (random.random(rows) * self._num_crops[chosen]).astype(np.int64)
        # What all processes draw alike ends here.
        document, crop, domain = self._order[chosen[self._rows]], crop[self._rows], domain[self._rows]
        place = crop[:, None] + np.arange(self._num_tokens)[None, :]
        mask = place < self._flat.sizes[document][:, None]
        position = np.where(mask, self._flat.starts[document][:, None] + place, 0)
        tokens = np.where(mask, self._flat.tokens[position], 0)
        owner = np.where(mask, document[:, None], -1)
        return Batch(tokens.astype(np.int32), mask, domain.astype(np.int32), owner.astype(np.int32))


class _PackSource(_StepSource):
    """Rows of packed documents, each domain's epoch after epoch."""

    def __init__(
        self, documents: Sequence[Document], config: DataConfig, key: jax.Array, num_steps: int, rows: slice
    ) -> None:
        super().__init__(documents, config, key, num_steps, rows)
        self._key_words = np.asarray(jax.random.key_data(key)).ravel()
        self._packed: list[tuple[np.ndarray, PackedRows]] = []
        for domain in range(len(self._cumulative_shares)):
            (members,) = np.nonzero(self._owner == domain)
            packed = pack_rows(self._flat.starts[members], self._flat.sizes[members], self._num_tokens)
            self._packed.append((members, packed))
        # As many rows of each domain as lie between its ends, rounded with one random offset a step; B in all.
        offsets = numpy_generator(self._key_words).random(num_steps)
        ends = np.floor(self._batch_size * self._cumulative_shares[None, :] + offsets[:, None]).astype(np.int64)
        ends[:, -1] = self._batch_size
        self._counts = np.diff(ends, axis=1, prepend=0)
        self._used = np.cumsum(self._counts, axis=0) - self._counts
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __getitem__(self, step: int) -> Batch:
        counts = self._counts[step]
        domain, number = np.repeat(np.arange(len(counts)), counts), ranges(self._used[step], counts)
        chosen = numpy_generator(self._key_data[step]).permutation(self._batch_size)[self._rows]
        domain, number = domain[chosen], number[chosen]
        shape = (len(chosen), self._num_tokens)
        tokens, document, segments = np.zeros(shape, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
        for index in np.unique(domain):
            (rows,) = np.nonzero(domain == index)
            members, packed = self._packed[index]
            epoch, place = np.divmod(number[rows], len(packed))
            row = np.array([self._order(index, e)[p] for e, p in zip(epoch.tolist(), place.tolist(), strict=True)])
            num_pieces = packed.first[row + 1] - packed.first[row]
            pieces = ranges(packed.first[row], num_pieces)
            sizes = packed.sizes[pieces]
            num_tokens = np.add.reduceat(sizes, np.cumsum(num_pieces) - num_pieces)
            where = (np.repeat(rows, num_tokens), ranges(np.zeros(len(rows), np.int64), num_tokens))
            tokens[where] = self._flat.tokens[ranges(packed.starts[pieces], sizes)]
            document[where] = np.repeat(members[packed.document[pieces]], sizes)
            segments[where] = np.repeat(ranges(np.ones(len(rows), np.int64), num_pieces), sizes)
        return Batch(tokens, segments > 0, domain.astype(np.int32), document, segments)

    def _order(self, domain: int, epoch: int) -> np.ndarray:
        """The order of a domain's rows in an epoch; the last two of each domain are kept."""
        if (domain, epoch) not in self._orders:
            if len(self._orders) >= 2 * len(self._packed):
                del self._orders[next(iter(self._orders))]
            # 1 + domain, since trailing zeros do not change a seed.
            random = numpy_generator(np.concatenate([self._key_words, [1 + domain, epoch]]))
            self._orders[domain, epoch] = random.permutation(len(self._packed[domain][1]))
        return self._orders[domain, epoch]


SOURCES = {"crop": _CropSource, "pack": _PackSource}
