"""Every causal routing rule at equal active FLOPs, and the dense twin, trained on the main job's text.

Command:   python -m experiments.router_tournament
Hardware:  two CPU cores, 3 GB of memory
Time:      about an hour; `--config=configs/router_tournament_quick.py` takes about five minutes
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
    config.entries = ConfigDict(_entries(main.model.num_choices, main.model.expert_hidden))
    return config


def _entries(num_choices: int, hidden: int) -> dict:
    """Rule by rule; one expert a token gets the hidden width of all K, so that active FLOPs stay equal."""
    one = {"num_choices": 1, "expert_hidden": num_choices * hidden}
    no_loss = {"balance": 0.0}
    return {
        "softmax_top_k": {"model": {"rule": "softmax_top_k"}},
        "softmax_top_k_renormalized": {"model": {"rule": "softmax_top_k_renormalized"}},
        "sigmoid_top_k": {"model": {"rule": "sigmoid_top_k"}, "loss": no_loss | {"balancer": "sign"}},
        "top_k_softmax": {"model": {"rule": "top_k_softmax"}},
        "switch_top_1": {"model": {"rule": "switch_top_1"} | one},
        "dense twin": {},
    }
