"""The held-out splits of a training run, and the program that measures a model on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from moe_jax.data import Document, pack
from moe_jax.training.averaging import evaluated
from moe_jax.training.evaluation import LOG2, bits_per_byte, make_evaluator
from moe_jax.training.step import TrainState

SPLITS = ("selection", "test")
BATCH = 32  # windows


class HeldOut:
    """Text to choose by, "selection", and text to report on, "test", in windows that overlap by a quarter.

    A model's first tokens of a window have little to go by; of the overlap only the later window's are counted.
    """

    def __init__(
        self,
        splits: Mapping[str, Sequence[Document]],
        sequence_length: int,
        graphdef: nnx.GraphDef,
        mesh: Mesh | None = None,
    ):
        """Cuts the text; nothing is compiled yet.

        Args:
          splits: documents by split.
          sequence_length: S of a window.
          graphdef: structure of the model.
          mesh: over which its state lies; None for one device.
        """
        self.sequences = {name: pack(splits[name], sequence_length, context=sequence_length // 4) for name in SPLITS}
        self._evaluate = make_evaluator(graphdef, batch_size=BATCH, mesh=mesh)

    @property
    def bytes_per_token(self) -> float:
        """Of the selection split."""
        chosen = self.sequences["selection"]
        return chosen.num_bytes.sum() / chosen.is_scored.sum()

    def losses(self, state: TrainState, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Nats and bytes of each window, `[N]` both; of the averaged parameters where training averages them."""
        return self._evaluate(nnx.merge_state(evaluated(state), state.balance), self.sequences[split], None)

    def selection_loss(self, state: TrainState) -> float:
        """Bits per byte of the selection split."""
        nll, num_bytes = self.losses(state, "selection")
        return float(nll.sum() / num_bytes.sum() / LOG2)

    def bits_per_byte(self, state: TrainState) -> dict[str, Any]:
        """By split, what `evaluation.bits_per_byte` gives."""
        return {split: bits_per_byte(text, *self.losses(state, split)) for split, text in self.sequences.items()}
