"""Published configs are read, and the models that they describe have the published sizes."""

import pytest

from moe_jax.checkpoints.families import family_of
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.models.cost import model_cost

from .hub_configs_mixtral import HUB_CONFIGS, WITHOUT_EMBEDDING


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_a_published_config_has_the_published_sizes(name):
    values, total, active = HUB_CONFIGS[name]
    hub = HubConfig(values)
    config = family_of(hub).read(hub)
    hub.finish()
    cost = model_cost(config, 1)
    assert cost.parameters == total
    counted = cost.active_parameters - (cost.embedding.parameters if name in WITHOUT_EMBEDDING else 0)
    assert abs(counted / 1e9 - active) < 0.06


@pytest.mark.parametrize("name", HUB_CONFIGS)
def test_a_published_config_can_be_written_again(name):
    hub = HubConfig(HUB_CONFIGS[name][0])
    family = family_of(hub)
    config = family.read(hub)
    assert family.refuses(config) == ""
