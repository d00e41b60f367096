"""What differs from layer to layer, in the words of a `config.json`: which layers see a window, which are sparse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.tensor_files import HubError
from moe_jax.models.config import DecoderConfig, LayerKind

FULL, SLIDING = "full_attention", "sliding_attention"


def read_depth(hub: HubConfig) -> int:
    """How many layers there are."""
    return hub.count("num_hidden_layers", most=1000)


def read_window(hub: HubConfig, *, is_on: bool = True) -> int:
    """`sliding_window`, 0 for none or where it is not on.

    Raises:
      HubError: a negative one.
    """
    window = hub.maybe("sliding_window", int) or 0
    if window < 0:
        raise HubError(f"{hub.source}: sliding_window must not be negative, got {window}")
    return window if is_on else 0


def read_qwen_window(hub: HubConfig) -> int:
    """The same where a switch turns it on, `use_sliding_window`, as in all of Qwen."""
    return read_window(hub, is_on=hub.get("use_sliding_window", bool, False))


def in_every_layer(hub: HubConfig, window: int) -> tuple[int, ...]:
    """The windows of layers that are all alike; empty without one."""
    return (window,) * read_depth(hub) if window else ()


def write_window(config: DecoderConfig) -> dict[str, Any]:
    """The window of layers that are all alike."""
    return {"sliding_window": config.windows[0] if config.windows else None}


def read_layer_types(hub: HubConfig, window: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """The windows where `layer_types` says which layers have one; empty where none has.

    Args:
      hub: the `config.json`.
      window: of the layers that have one, 0 for none.
      slides: which layers would have one, where there are no `layer_types`.

    Raises:
      HubError: types that are not one for each layer, unknown ones, or a window that nobody tells.
    """
    depth, types = read_depth(hub), hub.maybe("layer_types", list)
    if types is None:
        types = [SLIDING if window and slides(index) else FULL for index in range(depth)]
    if len(types) != depth or not all(kind in (FULL, SLIDING) for kind in types):
        raise HubError(f"{hub.source}: layer_types={types} must name {depth} layers, each {FULL!r} or {SLIDING!r}")
    if SLIDING not in types:
        return ()
    if not window:
        raise HubError(f"{hub.source} has layers of {SLIDING!r}, and no sliding_window that says how much they see")
    return tuple(window if kind == SLIDING else 0 for kind in types)


def write_layer_types(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_layer_types` reads."""
    windows = config.windows or (0,) * len(config.layers)
    return {"sliding_window": max(windows) or None, "layer_types": [SLIDING if wide else FULL for wide in windows]}


def read_sparse_layers(hub: HubConfig) -> tuple[LayerKind, ...]:
    """Qwen's kinds of layers: every `decoder_sparse_step`-th is sparse, but for the `mlp_only_layers`."""
    step, dense = hub.count("decoder_sparse_step", 1), hub.get("mlp_only_layers", list, [])
    return tuple(
        "moe" if (index + 1) % step == 0 and index not in dense else "dense" for index in range(read_depth(hub))
    )


def write_sparse_layers(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_sparse_layers` reads."""
    dense = [index for index, kind in enumerate(config.layers) if kind == "dense"]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}
