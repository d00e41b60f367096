"""Training batches in an order that is a function of the key and the step, read through grain.

Record number `step` of the data source is the whole batch of that step, or a process's rows of it. Nothing else is
remembered, so a run resumes at any step, however often it was killed and on however many processes, and no iterator
needs a checkpoint.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence

import grain
import jax
from absl import flags

from moe_jax.data.config import DataConfig
from moe_jax.data.documents import Document
from moe_jax.data.step_sources import STEP_SOURCES, Batch


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
    source = STEP_SOURCES[config.packing](documents, config, key, num_steps, rows)
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
