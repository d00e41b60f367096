"""Families of public models, one small file each: how its config is read and written, and the table of its tensors.

To add one, write a `Family` and add it to the table below; the tests run over all of them.
"""

from moe_jax.checkpoints.families.deepseek_v2 import DEEPSEEK_V2
from moe_jax.checkpoints.families.deepseek_v3 import DEEPSEEK_V3
from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.gpt_oss import GPT_OSS
from moe_jax.checkpoints.families.granitemoe import GRANITEMOE
from moe_jax.checkpoints.families.llama import LLAMA
from moe_jax.checkpoints.families.mixtral import MIXTRAL
from moe_jax.checkpoints.families.olmoe import OLMOE
from moe_jax.checkpoints.families.phimoe import PHIMOE
from moe_jax.checkpoints.families.qwen2_moe import QWEN2_MOE
from moe_jax.checkpoints.families.qwen3 import QWEN3
from moe_jax.checkpoints.families.qwen3_moe import QWEN3_MOE
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.tensor_files import HubError

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(DEEPSEEK_V2, DEEPSEEK_V3),
        *(MIXTRAL, LLAMA, QWEN3, QWEN3_MOE, OLMOE, QWEN2_MOE, GRANITEMOE, GPT_OSS, PHIMOE),
    )
}


def family_of(hub: HubConfig) -> Family:
    """The family that a `config.json` names.

    Raises:
      HubError: an unknown `model_type`; the message lists the known ones.
    """
    name = hub.get("model_type", str)
    if name not in FAMILIES:
        raise HubError(f"{hub.source}: model_type {name!r} is not supported; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
