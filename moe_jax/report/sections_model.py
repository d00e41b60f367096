"""The parts of the page about data, model and reproducibility."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from moe_jax.report.album import Album
from moe_jax.report.contents import RunContents
from moe_jax.report.page import (
    Section,
    bullets,
    escape,
    facts,
    folded,
    interval,
    missing,
    number,
    paragraph,
    settings,
    table,
)
from moe_jax.report.pictures import plot_training

_NATS_TO_BITS = 1 / np.log(2)


def data_section(run: RunContents) -> Section:
    """Describes the text: bytes by domain and split, origin, licences."""
    data = run.results.get("data")
    if not data:
        return Section("Data", missing("a description of the data"))
    markup = bullets(data.get("description", []))
    markup += _by_split(data.get("bytes", {}), "Bytes of text by domain and split.")
    markup += _by_split(data.get("documents", {}), "Documents.")
    if sources := data.get("sources"):
        columns = [c for c in ("domain", "title", "origin", "licence") if any(c in source for source in sources)]
        rows = [[source.get(column) for column in columns] for source in sources]
        markup += table(columns, rows, caption="Where the text comes from.", words=columns)
    if digests := data.get("digests"):
        markup += folded("Digests (SHA-256)", settings(digests))
    return Section("Data", markup)


def _by_split(values: dict[str, dict[str, int]], caption: str) -> str:
    """Table of a number by domain (rows) and split (columns) with sums; nothing if there are none."""
    if not values:
        return ""
    domains = list(dict.fromkeys(domain for split in values.values() for domain in split))
    rows: list[list[Any]] = [[domain, *(split.get(domain) for split in values.values())] for domain in domains]
    rows.append(["all", *(sum(split.values()) for split in values.values())])
    return table(["domain", *values], rows, caption=caption)


def model_section(run: RunContents, album: Album) -> Section:
    """Shows the model, its training curve and its loss beside the n-gram baseline."""
    model, ngram = run.results.get("model", {}), run.results.get("ngram", {})
    markup = facts(
        [
            (number(model[key]), label)
            for key, label in (
                ("parameters_total", "parameters"),
                ("parameters_active", "active per token"),
                ("num_experts", "experts per layer"),
                ("num_choices", "experts per token"),
            )
            if key in model
        ]
    )
    baseline, order = ngram.get("bits_per_byte", {}), ngram.get("order", "n")
    markup += _training_picture(run, album, ngram.get("selection_bits_per_byte"), f"{order}-gram")
    losses = run.results.get("model_bits_per_byte", {})
    if losses:
        domains = list(
            dict.fromkeys(key for split in losses.values() for key in split if key not in ("interval", "all"))
        )
        rows = [
            [split, values.get("all"), interval(values.get("interval")), *(values.get(d) for d in domains)]
            for split, values in losses.items()
        ]
        if baseline:
            rows.append([f"byte {order}-gram", baseline.get("all"), "", *(baseline.get(d) for d in domains)])
        markup += table(
            ["split", "all text", "95 % interval", *domains],
            rows,
            caption="Bits per byte, lower is better. Intervals resample documents.",
        )
    else:
        markup += missing("held-out bits per byte of the model")
    if model:
        markup += folded("All numbers of the model", settings(model))
    return Section("Model and training", markup)


def _training_picture(run: RunContents, album: Album, baseline: float | None, baseline_name: str) -> str:
    """Draws the training curve from the metrics."""
    train, held_out = run.metrics.get("train"), run.metrics.get("evaluate")
    if train is None or len(train["step"]) < 2:
        return missing("training metrics (stage train)")
    bits = train["bits_per_byte"] if "bits_per_byte" in train else train["loss"] * _NATS_TO_BITS
    figure = plot_training(
        train["step"],
        bits,
        held_out=None if held_out is None else (held_out["step"], held_out["bits_per_byte"]),
        baseline=baseline,
        baseline_name=baseline_name,
    )
    caption = "Training: thin, every step; thick, a running mean."
    if held_out is not None:
        caption += " Dots: the selection split."
    if baseline is not None:
        caption += f" Dashed: a byte {baseline_name} on the selection split."
    return album.add("training", figure, caption)


def reproducibility_section(run: RunContents) -> Section:
    """Lists what it takes to make the run again."""
    environment = run.environment
    markup = ""
    if command := environment.get("command"):
        markup += paragraph("The command that made this run:") + f"<pre>{escape(command)}</pre>"
    if environment:
        markup += settings({key: value for key, value in environment.items() if key != "command"})
    else:
        markup += missing("environment.json (versions, device, commit)")
    if run.config:
        markup += folded("Resolved configuration", f"<pre>{escape(json.dumps(run.config, indent=2))}</pre>")
    else:
        markup += missing("config.json")
    if timing := run.results.get("timing"):
        total = sum(timing.values())
        rows: list[list[Any]] = [
            [stage, float(s), f"{s / total:.0%}" if total else None] for stage, s in timing.items()
        ]
        rows.append(["all", float(total), ""])
        markup += table(["stage", "seconds", "share"], rows, caption="Wall-clock time.")
    return Section("Reproducibility", markup)
