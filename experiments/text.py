"""The text of an experiment, split by document."""

from moe_jax.data import DataConfig, Document, domain_names, load_documents, split_documents
from moe_jax.runs import ConfigError


def read_text(config: DataConfig) -> dict[str, tuple[Document, ...]]:
    """The splits; what is wrong with the text or its settings is the user's to mend and becomes a ConfigError."""
    try:
        splits = split_documents(load_documents(config), config)
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from None
    names = domain_names(splits["train"])
    if config.domain_weights and len(config.domain_weights) != len(names):
        raise ConfigError(
            f"config.data.domain_weights has {len(config.domain_weights)} numbers for {len(names)} domains "
            f"({', '.join(names)}); give one each, or none (--config.data.domain_weights=) for equal shares"
        )
    return splits
