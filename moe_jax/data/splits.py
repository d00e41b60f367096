"""Disjoint splits by document: models train on one, search on the next, choose on the third, report on the last."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.data.config import DataConfig
from moe_jax.data.documents import Document, domain_names, group_by_domain

SPLITS = ("train", "search", "selection", "test")
_TRIALS = 256  # shuffles, of which the one that meets the fractions best is kept


def split_documents(documents: Sequence[Document], config: DataConfig) -> dict[str, tuple[Document, ...]]:
    """Splits every domain by document, close to the fractions in bytes.

    A domain's split depends on its own documents and the seed only: adding a domain moves nothing between the splits of
    another.

    Args:
      documents: without duplicates, names unique within a domain.
      config: the three fractions and `seed`.

    Returns:
      Documents by split, keys as in `SPLITS`; every split has every domain, in the same order.

    Raises:
      ValueError: a domain has fewer documents than there are splits.
    """
    held_out = (config.search_fraction, config.selection_fraction, config.test_fraction)
    fractions = np.array((1 - sum(held_out), *held_out))
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for domain, members in group_by_domain(documents).items():
        if len(members) < len(SPLITS):
            raise ValueError(
                f"domain {domain!r} has {len(members)} documents after duplicates were dropped, but each of the splits "
                f"{', '.join(SPLITS)} needs one; add documents, or cut long ones into several files"
            )
        members = sorted(members, key=lambda document: document.name)
        sizes = np.array([len(document.text) for document in members])
        words = np.frombuffer(hashlib.sha256(domain.encode()).digest(), np.uint32)
        random = np.random.Generator(np.random.Philox([config.seed, *words.tolist()]))
        labels = _assign(sizes, fractions, random)
        for label, split in enumerate(SPLITS):
            splits[split] += [members[i] for i in np.flatnonzero(labels == label)]
    return {split: tuple(members) for split, members in splits.items()}


def describe_splits(splits: Mapping[str, Sequence[Document]]) -> dict[str, Any]:
    """Describes the data so that a run can store what it was trained on.

    Args:
      splits: from `split_documents`.

    Returns:
      JSON-ready: `python` (the interpreter's version, on which the domain "python" depends) and, by name, `domains`
      with `licence` (None where it is not known, as of the user's own folders), `sha256` of all its documents, `bytes`
      and `documents` by split.
    """
    everything = [document for members in splits.values() for document in members]
    described = {}
    for domain in domain_names(everything):
        by_split = {
            split: [len(document.text) for document in members if document.domain == domain]
            for split, members in splits.items()
        }
        members = [document for document in everything if document.domain == domain]
        licences = dict.fromkeys(document.licence for document in members if document.licence)
        described[domain] = {
            "licence": "; ".join(licences) or None,
            "sha256": _digest(members),
            "bytes": {split: sum(sizes) for split, sizes in by_split.items()},
            "documents": {split: len(sizes) for split, sizes in by_split.items()},
        }
    return {"python": platform.python_version(), "domains": described}


def _assign(sizes: np.ndarray, fractions: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Labels documents with splits: the best of many shuffles, each cut where its bytes come closest."""
    num_splits, total = len(fractions), sizes.sum()
    best, best_error = np.zeros(len(sizes), int), np.inf
    for _ in range(_TRIALS):
        order = random.permutation(len(sizes))
        ends = np.cumsum(sizes[order])
        # Cut c comes after document i; the clip leaves at least one document for every split.
        targets = np.cumsum(fractions)[:-1] * total
        cuts = np.abs(ends[None, :] - targets[:, None]).argmin(axis=1) + 1
        for c in range(num_splits - 1):
            low = cuts[c - 1] + 1 if c else 1
            cuts[c] = np.clip(cuts[c], low, len(sizes) - (num_splits - 1 - c))
        labels = np.empty(len(sizes), int)
        labels[order] = np.searchsorted(cuts, np.arange(len(sizes)), side="right")
        error = np.abs(np.bincount(labels, sizes, num_splits) / (fractions * total) - 1).max()
        if error < best_error:
            best, best_error = labels, error
    return best


def _digest(documents: Sequence[Document]) -> str:
    """Hashes names and texts, in the order of the names."""
    digest = hashlib.sha256()
    for document in sorted(documents, key=lambda document: document.name):
        for part in (document.name.encode(), document.text):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
