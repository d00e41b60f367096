"""What a family of public models is: a way to read and write its config, and a table of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Entry
from moe_jax.checkpoints.hub.tensor_files import HubError, Tensors
from moe_jax.models.config import DecoderConfig, spelled_out
from moe_jax.models.structure import ModelConfig


def _as_it_is(tensors: Tensors, hub_config: Mapping[str, Any]) -> Tensors:
    del hub_config
    return tensors


def _nothing(config: ModelConfig) -> tuple[str, ...]:
    del config
    return ()


class Family(NamedTuple):
    """A family.

    Attributes:
      name: its `model_type`.
      architecture: the class of `transformers` that runs it.
      read: from `config.json` to our config; asks `HubConfig` for every key that it knows.
      write: from our config to the keys of `config.json`, except those that every family has.
      table: the tensors, for a config.
      open: makes plain tensors of a checkpoint, given its `config.json`, for those that are stored packed.
      ignored: beginnings and ends of tensor names that are left unread.
      kind: the class of its configs.
    """

    name: str
    architecture: str
    read: Callable[[HubConfig], Any]
    write: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], Iterable[Entry]]
    open: Callable[[Tensors, Mapping[str, Any]], Tensors] = _as_it_is
    ignored: Callable[[Any], tuple[str, ...]] = _nothing
    kind: type[ModelConfig] = DecoderConfig

    def refuses(self, config: ModelConfig) -> str:
        """Why the family cannot express a config: the first field that it would read back otherwise; or ""."""
        if not isinstance(config, self.kind):
            return f"it has a {self.kind.__name__}, not a {type(config).__name__}"
        try:
            again = self.read(HubConfig(self.write(config)))
        except (HubError, ValueError) as error:
            return str(error)
        if not isinstance(config, DecoderConfig):
            return ""  # their `write` has compared both
        idle = _OURS_ALONE | _without_effect(config)
        wanted, got = ({**vars(one), **spelled_out(one)} for one in (config, again))
        differing = [name for name in wanted if name not in idle and wanted[name] != got[name]]
        return f"{differing[0]}={wanted[differing[0]]!r} would become {got[differing[0]]!r}" if differing else ""


_OURS_ALONE = {"backend", "stats_level", "bias_bins", "compute_dtype"}  # how we compute, not what
_OF_EXPERTS = {"num_experts", "expert_hidden", "num_choices", "rule", "rule_settings", "router", "router_settings"}


def _without_effect(config: DecoderConfig) -> set[str]:
    """Fields about kinds of layers that the model does not have."""
    idle = set() if "dense" in config.layers else {"dense_hidden"}
    return idle if "moe" in config.layers else idle | _OF_EXPERTS
