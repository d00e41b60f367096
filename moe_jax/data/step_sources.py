"""The batch of a step as a record of its own: random crops of documents, or documents packed into rows."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.config import DataConfig
from moe_jax.data.documents import Document
from moe_jax.data.mixture import domain_indices, domain_shares
from moe_jax.data.packing import pack_rows, ranges
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


class StepSource:
    """Random access to some rows of the batch of a step: grain's `RandomAccessDataSource` protocol."""

    def __init__(
        self, documents: Sequence[Document], config: DataConfig, key: jax.Array, num_steps: int, rows: slice
    ) -> None:
        """Joins the documents' tokens; arguments as `train_batches`, with the rows that are asked for."""
        self._num_tokens, self._batch_size, self._rows = config.sequence_length + 1, config.batch_size, rows
        self._cumulative_shares = np.cumsum(domain_shares(documents, config))
        self._owner = domain_indices(documents)
        self._flat = flatten([document.tokens if document.ids is None else document.ids for document in documents])
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_steps, dtype=jnp.uint32))
        self._key_data = np.asarray(jax.random.key_data(keys))

    def __len__(self) -> int:
        return len(self._key_data)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} steps, {len(self._flat.sizes)} documents)"


class CropSource(StepSource):
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


class PackSource(StepSource):
    """Rows of packed documents, each domain's epoch after epoch."""

    def __init__(
        self, documents: Sequence[Document], config: DataConfig, key: jax.Array, num_steps: int, rows: slice
    ) -> None:
        super().__init__(documents, config, key, num_steps, rows)
        self._key_words = np.asarray(jax.random.key_data(key)).ravel()
        self._packed = []
        for domain in range(len(self._cumulative_shares)):
            (members,) = np.nonzero(self._owner == domain)
            packed = pack_rows(self._flat.starts[members], self._flat.sizes[members], self._num_tokens)
            self._packed.append(dataclasses.replace(packed, document=members[packed.document].astype(np.int32)))
        # As many rows of each domain as lie between its ends, rounded with one random offset a step; B in all.
        offsets = numpy_generator(self._key_words).random(num_steps)
        ends = np.floor(self._batch_size * self._cumulative_shares[None, :] + offsets[:, None]).astype(np.int64)
        ends = np.minimum(ends, self._batch_size)
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
            epoch, place = np.divmod(number[rows], len(self._packed[index]))
            packed_rows = [self._order(index, e)[i] for e, i in zip(epoch.tolist(), place.tolist(), strict=True)]
            pieces = self._packed[index].lay_out(np.array(packed_rows))
            where = rows[pieces.row], pieces.column
            tokens[where] = self._flat.tokens[pieces.position]
            document[where], segments[where] = pieces.document, pieces.segment
        return Batch(tokens, segments > 0, domain.astype(np.int32), document, segments)

    def _order(self, domain: int, epoch: int) -> np.ndarray:
        """The order of a domain's rows in an epoch; the last two of each domain are kept."""
        if (domain, epoch) not in self._orders:
            if len(self._orders) >= 2 * len(self._packed):
                del self._orders[next(iter(self._orders))]
            # 1 + domain, since trailing zeros do not change a seed.
            random = numpy_generator(np.concatenate([self._key_words, [1 + domain, epoch]]))
            self._orders[domain, epoch] = random.permutation(len(self._packed[domain]))
        return self._orders[domain, epoch]


STEP_SOURCES: dict[str, type[StepSource]] = {"crop": CropSource, "pack": PackSource}
