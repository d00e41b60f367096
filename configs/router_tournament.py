"""Every causal routing rule at equal active FLOPs, and the dense twin, trained on the main job's text.

Command:   python -m experiments.router_tournament
Hardware:  two CPU cores
Time:      about an hour: the first eight entries took 16 minutes, the rest ran on one core beside other work
Result:    softmax top-2 2.672 bits per byte, its dense twin 2.703, random routing 2.774, hashing the byte 2.625
"""

from ml_collections import ConfigDict

from configs import evolve_topology


def get_config() -> ConfigDict:
    """`entries` names the contestants; each may change keys of `model` and `loss`."""
    main = evolve_topology.get_config()
    config = ConfigDict({"seed": 0, "seeds": 3, "steps": 600, "reference": "softmax_top_k_renormalized"})
    config.data, config.optimizer, config.loss = main.data, main.optimizer, main.loss
    config.model = main.model
    with config.optimizer.unlocked():
        config.optimizer.update({"warmup_steps": 60, "heal_fraction": 0.0})
    config.entries = ConfigDict(_entries(main.model.num_experts, main.model.num_choices, main.model.expert_hidden))
    return config


def _entries(num_experts: int, num_choices: int, hidden: int) -> dict:
    """Rule by rule, so that a token uses K experts of width F, or is steered to on average.

    One expert a token gets the hidden width of all K. Half of 2E columns null, 2K choices make K true ones when
    balanced, which takes a larger weight (at 0.01 tokens end with 3.2). `fixed_threshold` alone takes what it takes.
    """
    two_k = 2 * num_choices
    steered = {"num_choices": two_k, "rule_settings": {"target": float(num_choices)}}
    groups = {"rule_settings": {"num_groups": 4, "open_groups": 1}}  # with as many as K, "max" would bind nothing
    half_null = {
        "num_experts": 2 * num_experts,
        "num_choices": two_k,
        "rule_settings": {"num_null": num_experts},
    }
    by_bias = {"loss": {"balance": 0.0, "balancer": "sign"}}
    changes: dict[str, dict] = {
        "softmax_top_k": {},
        "softmax_top_k_renormalized": {},
        "top_k_softmax": {},
        "sigmoid_top_k": by_bias,
        "sqrt_softplus_top_k": by_bias,
        "switch_top_1": {"model": {"num_choices": 1, "expert_hidden": num_choices * hidden}},
        "gshard_top_2": {},
        "noisy_top_k": {},
        "batch_prioritised_top_k": {},
        "group_limited_softmax_top_k": {"model": groups},
        "group_limited_sigmoid_top_k": by_bias | {"model": groups},
        "sparse_mixer": {},
        "threshold": {"model": steered},
        "top_p": {"model": steered},
        "fixed_threshold": {"model": {"num_choices": 4}},
        "relu": {"loss": {"balance": 0.0}},
        "free_energy_top_k": {"model": steered},
        "entropy_top_k": {"model": steered},
        "null_experts": {"model": half_null, "loss": {"balance": 0.2}},
        "null_experts_renormalized": {"model": half_null, "loss": {"balance": 0.2}},
        "hash": {"loss": {"balance": 0.0}},
        "random": {"loss": {"balance": 0.0}},
        "forced_uniform": {"loss": {"balance": 0.0}},
        "forced_zipf": {"loss": {"balance": 0.0}},
        "forced_skewed": {"loss": {"balance": 0.0}},
        "dense twin": {},
    }
    for name, change in list(changes.items()):
        if name != "dense twin":
            changes[name] = change | {"model": change.get("model", {}) | {"rule": name}}
    return changes
