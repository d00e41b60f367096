"""Families of public models, one small file each: how its config is read and written, and the table of its tensors.

To add one, write a `Family` and add it to the table below; the tests run over all of them.
"""

from moe_jax.checkpoints.families.deepseek_v2 import DEEPSEEK_V2
from moe_jax.checkpoints.families.deepseek_v3 import DEEPSEEK_V3
from moe_jax.checkpoints.families.dots1 import DOTS1
from moe_jax.checkpoints.families.ernie4_5_moe import ERNIE4_5_MOE
from moe_jax.checkpoints.families.family import Family
from moe_jax.checkpoints.families.glm4_moe import GLM4_MOE
from moe_jax.checkpoints.families.gpt_oss import GPT_OSS
from moe_jax.checkpoints.families.granitemoe import GRANITEMOE
from moe_jax.checkpoints.families.llama import LLAMA
from moe_jax.checkpoints.families.llama4 import LLAMA4, LLAMA4_TEXT
from moe_jax.checkpoints.families.minimax_m2 import MINIMAX_M2
from moe_jax.checkpoints.families.mixtral import MIXTRAL
from moe_jax.checkpoints.families.nllb_moe import NLLB_MOE
from moe_jax.checkpoints.families.olmoe import OLMOE
from moe_jax.checkpoints.families.phimoe import PHIMOE
from moe_jax.checkpoints.families.qwen2_moe import QWEN2_MOE
from moe_jax.checkpoints.families.qwen3 import QWEN3
from moe_jax.checkpoints.families.qwen3_moe import QWEN3_MOE
from moe_jax.checkpoints.families.switch_transformers import SWITCH_TRANSFORMERS
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.tensor_files import HubError

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(MIXTRAL, LLAMA),
        *(QWEN3, QWEN3_MOE, OLMOE, QWEN2_MOE, GRANITEMOE, GPT_OSS, PHIMOE),
        *(SWITCH_TRANSFORMERS, NLLB_MOE),
        *(DEEPSEEK_V2, DEEPSEEK_V3, DOTS1, GLM4_MOE, MINIMAX_M2, ERNIE4_5_MOE, LLAMA4_TEXT, LLAMA4),
    )
}

# Models that go by a name of their own and are stored as another family.
ALIASES = {"kimi_k2": "deepseek_v3"}


def family_of(hub: HubConfig) -> Family:
    """The family that a `config.json` names.

    Raises:
      HubError: an unknown `model_type`; the message lists the known ones.
    """
    name = hub.get("model_type", str)
    name = ALIASES.get(name, name)
    if name not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, *ALIASES}))
        raise HubError(f"{hub.source}: model_type {name!r} is not supported; known: {known}")
    return FAMILIES[name]
