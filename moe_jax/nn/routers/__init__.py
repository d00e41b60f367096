"""Router modules: they own the parameters of a score. Selecting and weighing is in `moe_jax.routing`.

    linear        x W, with bias, temperature, jitter, noise
    cosine        angles to prototypes in a small space
    mlp           a hidden layer, by default at the FLOPs of the linear one
    attention     experts attend to experts, for every token
    hierarchical  log p(group) + log p(expert | group)
    recurrent     linear, with a memory of the sequence
    load_aware    linear, less what earlier tokens of the sequence took

Any of them goes with any rule that looks at logits. The hash router has no parameters and is a rule.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from moe_jax.nn.routers.adaptive import LoadAwareRouter, RecurrentRouter
from moe_jax.nn.routers.attention import AttentionRouter
from moe_jax.nn.routers.cosine import CosineRouter
from moe_jax.nn.routers.hierarchical import HierarchicalRouter
from moe_jax.nn.routers.linear import LinearRouter
from moe_jax.nn.routers.mlp import MLPRouter
from moe_jax.nn.routers.router import Router, RouterLogits
from moe_jax.routing.rule import check_settings, settings_of

__all__ = [
    "REMEMBERING_ROUTERS",
    "ROUTERS",
    "AttentionRouter",
    "CosineRouter",
    "HierarchicalRouter",
    "LinearRouter",
    "LoadAwareRouter",
    "MLPRouter",
    "RecurrentRouter",
    "Router",
    "RouterLogits",
    "get_router",
]


def get_router(name: str, **settings: Any) -> Callable[..., Router]:
    """The router of that name with its settings; call it as `(width, num_experts, key=key)`.

    Args:
      name: a key of `ROUTERS`.
      settings: values for the router's own settings, the keyword-only arguments of its class.

    Raises:
      ValueError: an unknown name or setting; the message lists the known ones. A value out of range raises in the call.
    """
    if name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}; known: {', '.join(ROUTERS)}")
    router = ROUTERS[name]
    check_settings(settings, settings_of(router.__init__).keys() - {"key"}, f"router {name!r}")
    return partial(router, **settings)


ROUTERS: dict[str, type[Router]] = {
    "linear": LinearRouter,
    "cosine": CosineRouter,
    "mlp": MLPRouter,
    "attention": AttentionRouter,
    "hierarchical": HierarchicalRouter,
    "recurrent": RecurrentRouter,
    "load_aware": LoadAwareRouter,
}
REMEMBERING_ROUTERS = ("recurrent", "load_aware")  # a token's logits depend on a state of the tokens before it
