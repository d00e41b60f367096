"""How a model routes given texts: the routing part of a run's report, for a model that comes from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis import join_traces, save_trace, summarise_routing, trace_routing
from moe_jax.losses import cross_entropy
from moe_jax.models.decoder import Decoder
from moe_jax.models.description import describe_model
from moe_jax.report.album import Album
from moe_jax.report.contents import RunContents
from moe_jax.report.page import Section, page, paragraph, settings
from moe_jax.report.sections_routing import routing_section
from moe_jax.runs import write_atomic, write_json

WINDOW, BATCH = 256, 4  # tokens of a window, windows routed at once
MOST_TOKENS = 65_536  # of a text; what lies behind is left out


def report_text_routing(model: Decoder, texts: Mapping[str, Sequence[int]], out: str | Path, name: str) -> Path:
    """Routes texts in windows and writes what the routers did as a report.

    Args:
      model: with MoE layers that make choices.
      texts: token ids by name; each is a domain of the statistics, and each of its windows a document.
      out: the folder of the report, made if missing.
      name: of the model.

    Returns:
      Path of `report.html`.

    Raises:
      ValueError: a model without MoE layers or of Soft MoE, or a text of fewer than two tokens.
    """
    if not model.config.num_moe_layers or model.config.is_soft:
        raise ValueError(f"{name} has no layer that chooses experts: there is no routing to show")
    out = Path(out)
    windows, domains = _windows(texts)
    mask = windows >= 0
    tokens = np.where(mask, windows, 0).astype(np.int32)
    traces, losses = [], []
    for start in range(0, len(tokens), BATCH):
        part = slice(start, start + BATCH)
        routed, nll = _route(model, jnp.asarray(tokens[part]), jnp.asarray(mask[part]))
        count = len(tokens[part])
        losses.append(np.asarray(nll))
        traces.append(
            trace_routing(
                routed,
                token_ids=tokens[part],
                token_mask=mask[part],
                position=np.tile(np.arange(WINDOW), count),
                domain=np.repeat(domains[part], WINDOW),
                document=np.repeat(np.arange(start, start + count), WINDOW),
                domain_names=tuple(texts),
            )
        )
    trace = join_traces(traces)
    save_trace(out / "traces" / "routing.npz", trace)
    scored = np.concatenate(losses)[mask[:, 1:] & mask[:, :-1]]
    summary = {"nats_per_token": float(scored.mean()), "routing": summarise_routing(trace)}
    write_json(out / "results.json", summary)
    run = RunContents(name, {}, {}, {}, summary, {}, trace, None)
    tokens_of = f"{int(mask.sum()):,} tokens of {', '.join(texts)}"
    sentence = f"{tokens_of}, in windows of {WINDOW}; {scored.mean():.3f} nats a token."
    model_section = Section("Model", paragraph(sentence) + settings(describe_model(model.config)))
    path = out / "report.html"
    write_atomic(path, page(f"How {name} routes", "moe_jax", [model_section, routing_section(run, Album(out))]))
    return path


@jax.jit
def _route(model: Decoder, tokens: jax.Array, mask: jax.Array) -> tuple[Any, jax.Array]:
    """The full trace, and nats `[B, S-1]` of each next token."""
    logits, routed = model(tokens, mask, trace="full")
    return routed, cross_entropy(logits[:, :-1], tokens[:, 1:])


def _windows(texts: Mapping[str, Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """`[N, WINDOW]` ids, -1 behind a text's end, and the text that each window is of, `[N]`."""
    windows, domains = [], []
    for domain, (name, ids) in enumerate(texts.items()):
        if len(ids) < 2:
            raise ValueError(f"text {name!r} has {len(ids)} tokens: give one with at least two")
        for start in range(0, min(len(ids), MOST_TOKENS), WINDOW):
            window = np.full(WINDOW, -1, np.int64)
            part = ids[start : start + WINDOW]
            window[: len(part)] = part
            windows.append(window)
            domains.append(domain)
    return np.stack(windows), np.array(domains)
