"""What a routing rule is: a function, and what may be relied on.

The function takes `RoutingInputs` and K and gives a `Choice`; what can be set is its keyword-only arguments, so its
signature is the list of its settings.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.types import Array, Choice, RouterStats


class Controller(NamedTuple):
    """Steers a rule's `level`, one number a layer, towards a goal.

    Attributes:
      start: the level before the first step.
      update: (level `[]`, integral `[]`, stats of one optimizer step, K) to the next level and integral; its
        keyword-only arguments are settings too.
      penalty: (level, stats, K) to a loss `[]`, differentiable through the stats; None for none.
      over_layers: update's stats are sums over all layers, so that they share one level.
    """

    start: float
    update: Callable[..., tuple[Array, Array]]
    penalty: Callable[[Array, RouterStats, int], Array] | None = None
    over_layers: bool = False


class Rule(NamedTuple):
    """A routing rule: a row of the capability table.

    Attributes:
      choose: (inputs, K) to a `Choice`.
      paper: where the rule comes from.
      is_causal: without capacity, a token's choice depends on no later token and on no other sequence.
      only_choices: the only K the rule accepts, or None for any.
      fixed_count: an unmasked token gets exactly K experts where so many are open.
      normalized: an unmasked token's gates sum to 1.
      is_learned: the choice depends on the logits.
      can_be_forced: with a large enough bias the rule selects any K experts that it could select, and weighs them.
      needs_token_ids: the choice depends on the tokens' vocabulary ids.
      controller: steers the rule's level between optimizer steps, for the rules that have one.
    """

    choose: Callable[..., Choice]
    paper: str
    is_causal: bool = True
    only_choices: int | None = None
    fixed_count: bool = True
    normalized: bool = False
    is_learned: bool = True
    can_be_forced: bool = True
    needs_token_ids: bool = False
    controller: Controller | None = None


def bind_settings(rule: Rule, settings: Mapping[str, Any], name: str) -> Rule:
    """The rule with settings fixed.

    Args:
      rule: a rule.
      settings: values for keyword-only arguments of `choose` or of the controller's `update`, or for its `start`.
      name: the rule's name, for messages.

    Raises:
      ValueError: a setting that the rule does not have; the message lists those that it has.
    """
    all_known = sorted(rule_settings(rule))
    if unknown := sorted(set(settings) - set(all_known)):
        raise ValueError(
            f"rule {name!r} has no setting {', '.join(map(repr, unknown))}; it has: {', '.join(all_known) or 'none'}"
        )

    def bind(function: Callable) -> Callable:
        mine = {key: value for key, value in settings.items() if key in settings_of(function)}
        return functools.partial(function, **mine) if mine else function

    if rule.controller is None:
        return rule._replace(choose=bind(rule.choose))
    start = settings.get("start", rule.controller.start)
    controller = rule.controller._replace(start=start, update=bind(rule.controller.update))
    return rule._replace(choose=bind(rule.choose), controller=controller)


def check_choices(rule: Rule, num_choices: int, num_experts: int, name: str = "this rule") -> None:
    """Refuses a K that the rule or the number of experts does not allow.

    Raises:
      ValueError: K below 1, above E, or other than the rule's only one.
    """
    if not 1 <= num_choices <= num_experts:
        raise ValueError(f"num_choices must be in [1, {num_experts}] for {num_experts} experts, got {num_choices}")
    if rule.only_choices not in (None, num_choices):
        raise ValueError(f"{name} routes to exactly {rule.only_choices} expert(s), got num_choices={num_choices}")


def rule_settings(rule: Rule) -> dict[str, Any]:
    """The rule's settings with their values: those of `choose`, then those of its controller."""
    settings = settings_of(rule.choose)
    if rule.controller is not None:
        settings |= {"start": rule.controller.start} | settings_of(rule.controller.update)
    return settings


def settings_of(function: Callable) -> dict[str, Any]:
    """The keyword-only arguments with their defaults, or what a `partial` has put in their place."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
