"""Do experts serve domains? Measured, and held against controls that specialise by chance or by spelling alone.

- `domain_specialisation` is the share of a domain's tokens that an expert serves, N_{e,D} / N_D (OLMoE, 2409.02060); an
  expert that ignores domains has the same share in each.
- `mutual_information` sums that up per layer: how many nats the expert tells about the domain.
- A finite sample has MI > 0 without any association. `miller_madow_bias` corrects the mean of that for independent
  assignments. They are not independent: tokens of one document resemble each other, and a token's K choices differ by
  construction. So the control shuffles the domain labels *of documents*, never of tokens.
- A router keyed on bytes alone "specialises" too, since domains are spelled differently.
  `conditional_domain_information` asks what the domain adds when the byte is known, with a control that shuffles
  within each byte.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from moe_jax.analysis.counts import group_expert_counts


class InformationTest(NamedTuple):
    """Mutual information per layer beside its shuffled control, nats.

    Attributes:
      information: `[L]` plug-in estimate.
      null_mean: `[L]` mean over shuffles: what chance alone gives.
      null_low: `[L]` lower quantile over shuffles.
      null_high: `[L]` upper quantile over shuffles.
      p_value: `[L]` one-sided, (1 + shuffles at least as large) / (1 + shuffles); never below 1 / (1 + shuffles).
    """

    information: np.ndarray
    null_mean: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray
    p_value: np.ndarray


def domain_specialisation(
    expert_ids: ArrayLike,
    domain: ArrayLike,
    num_experts: int,
    num_domains: int,
    token_mask: ArrayLike | None = None,
) -> np.ndarray:
    """Share of each domain's tokens that each expert serves, N_{e,D} / N_D (2409.02060); uniform routing gives K / E.

    Args:
      expert_ids: `[L, T, K]` integers in `[0, E]`.
      domain: `[T]` integers in `[0, num_domains)`.
      num_experts: E.
      num_domains: number of domains.
      token_mask: `[T]` bool or None.

    Returns:
      `[L, num_domains, E]` float64; NaN for a domain without tokens.
    """
    counts = group_expert_counts(expert_ids, domain, num_experts, num_domains, token_mask)
    weights = None if token_mask is None else np.asarray(token_mask, np.float64)
    tokens = np.bincount(np.asarray(domain), weights, num_domains).astype(np.float64)[:, None, None]
    shares = np.divide(counts, tokens, out=np.full(counts.shape, np.nan), where=tokens > 0)
    return shares.transpose(1, 0, 2)


def mutual_information(table: ArrayLike) -> np.ndarray:
    """Plug-in mutual information in nats of contingency tables `[..., X, Y]`, `[...]`; 0 for an empty table."""
    table = np.asarray(table, np.float64)
    rows, columns, total = table.sum(-1, keepdims=True), table.sum(-2, keepdims=True), table.sum((-2, -1))
    # sum n_xy ln n_xy - sum n_x ln n_x - sum n_y ln n_y + N ln N, all over N
    nats = (
        _n_log_n(table).sum((-2, -1)) - _n_log_n(rows).sum((-2, -1)) - _n_log_n(columns).sum((-2, -1)) + _n_log_n(total)
    )
    return np.maximum(np.divide(nats, total, out=np.zeros_like(nats), where=total > 0), 0)


def _n_log_n(counts: np.ndarray) -> np.ndarray:
    """Gives n ln n, with its limit 0 at n = 0."""
    return counts * np.log(np.where(counts > 0, counts, 1))


def miller_madow_bias(table: ArrayLike) -> np.ndarray:
    """Mean excess of the plug-in MI for independent samples, (X' Y' cells - X' - Y' + 1) / 2N over non-empty cells.

    From the entropy correction H + (m - 1) / 2N (Miller 1955) applied to H(X) + H(Y) - H(X, Y).

    Args:
      table: `[..., X, Y]` counts.

    Returns:
      `[...]` nats, to subtract from `mutual_information`; 0 for an empty table.
    """
    table = np.asarray(table, np.float64)
    num_cells = (table > 0).sum((-2, -1))
    num_rows, num_columns = (table.sum(-1) > 0).sum(-1), (table.sum(-2) > 0).sum(-1)
    total = table.sum((-2, -1))
    bias = (num_cells - num_rows - num_columns + 1).astype(np.float64)
    return np.divide(bias, 2 * total, out=np.zeros_like(bias), where=total > 0)


def domain_information(
    document_counts: ArrayLike,
    document_domain: ArrayLike,
    num_domains: int,
    *,
    num_shuffles: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> InformationTest:
    """Tests MI(expert; domain) per layer against domain labels shuffled over documents.

    Args:
      document_counts: `[N, L, E]` assignments by document.
      document_domain: `[N]` domain of each document.
      num_domains: number of domains.
      num_shuffles: shuffles of the control.
      level: level of the control's interval.
      seed: seed of the shuffles.

    Returns:
      The test, one entry per layer.
    """
    counts = np.asarray(document_counts, np.float64)
    one_hot = np.eye(num_domains)[np.asarray(document_domain)]  # [N, num_domains]

    def information(order: np.ndarray) -> np.ndarray:
        return mutual_information(np.einsum("nd,nle->lde", one_hot[order], counts, optimize=True))

    rng = np.random.default_rng(seed)
    null = np.stack([information(rng.permutation(len(counts))) for _ in range(num_shuffles)])
    return _against_null(information(np.arange(len(counts))), null, level)


def conditional_domain_information(
    expert_ids: ArrayLike,
    domain: ArrayLike,
    document: ArrayLike,
    token_ids: ArrayLike,
    num_experts: int,
    *,
    token_mask: ArrayLike | None = None,
    num_shuffles: int = 100,
    level: float = 0.95,
    seed: int = 0,
) -> InformationTest:
    """Tests MI(expert; domain | token id) per layer: what the domain adds to knowing the byte.

    The control shuffles, within each token id, the domain labels of the documents that contain it: the occurrences of
    a byte in one document move together. Two limits: shuffles of different bytes are independent, so the control's
    spread is too small where a document's style reaches across bytes (read the excess over `null_mean` before the
    p-value), and a byte that is frequent in one domain only makes the control overstate chance.

    Args:
      expert_ids: `[L, T, K]` integers in `[0, E]`.
      domain: `[T]` domain of each token.
      document: `[T]` document of each token.
      token_ids: `[T]` input token of each position.
      num_experts: E.
      token_mask: `[T]` bool or None.
      num_shuffles: shuffles of the control.
      level: level of the control's interval.
      seed: seed of the shuffles.

    Returns:
      The test, one entry per layer.
    """
    keep = slice(None) if token_mask is None else np.asarray(token_mask, bool)
    expert_ids = np.asarray(expert_ids)[:, keep]
    domain, document, token_ids = (np.asarray(a, np.int64)[keep] for a in (domain, document, token_ids))
    num_domains = int(domain.max(initial=0)) + 1
    # A cell is all occurrences of one token id in one document: the unit that the control moves.
    cells, first, cell_of_token = np.unique(
        np.stack([token_ids, document]), axis=1, return_index=True, return_inverse=True
    )
    cell_domain = domain[first]
    _, cell_token = np.unique(cells[0], return_inverse=True)  # ascending, as `cells` is sorted by token id
    counts = group_expert_counts(expert_ids, cell_of_token.ravel(), num_experts, len(first))
    num_cells, num_layers, _ = counts.shape
    num_token_ids = int(cell_token.max(initial=-1)) + 1
    flat = counts.reshape(num_cells, num_layers * num_experts).astype(np.float64)

    def information(labels: np.ndarray) -> np.ndarray:
        rows = cell_token * num_domains + labels
        select = sparse.csr_array(
            (np.ones(num_cells), (rows, np.arange(num_cells))), shape=(num_token_ids * num_domains, num_cells)
        )
        tables = (select @ flat).reshape(num_token_ids, num_domains, num_layers, num_experts).transpose(0, 2, 1, 3)
        weights = tables.sum((-2, -1))  # [token ids, L]
        total = weights.sum(0)
        nats = (weights * mutual_information(tables)).sum(0)
        return np.divide(nats, total, out=np.zeros_like(nats), where=total > 0)

    rng = np.random.default_rng(seed)
    null = np.stack(
        [information(cell_domain[np.lexsort((rng.random((num_cells,)), cell_token))]) for _ in range(num_shuffles)]
    )
    return _against_null(information(cell_domain), null, level)


def _against_null(observed: np.ndarray, null: np.ndarray, level: float) -> InformationTest:
    """Places observed values `[L]` in their control `[R, L]`; ties count against the observation."""
    # Rounding differs between summation orders; an equal table must count as equal.
    reached = null >= observed - 1e-12
    return InformationTest(
        information=observed,
        null_mean=null.mean(0),
        null_low=np.quantile(null, (1 - level) / 2, axis=0),
        null_high=np.quantile(null, (1 + level) / 2, axis=0),
        p_value=(1 + reached.sum(0)) / (1 + len(null)),
    )
