"""Train a small mixture-of-experts language model on real text, then evolve its routing topology.

Trains a byte-level decoder, reports how it routes, searches which experts to keep in each layer and how many to use per
token, compares the searches with their baselines at equal evaluations, and heals the chosen topologies by a short
training.

Examples:
  python -m experiments.evolve_topology
  python -m experiments.evolve_topology --config=configs/tiny.py
  python -m experiments.evolve_topology --config.evolution.generations=200 --workdir runs/long
  python -m experiments.evolve_topology --workdir runs/long --resume
"""

import io
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments.topology_compare import UNTOUCHED, compare_methods, measure_losses
from experiments.topology_model import Lab, heal, model_state, record_routing, train_model
from experiments.topology_search import Found, TopologySearch
from moe_jax.data import ngram
from moe_jax.report import write_report
from moe_jax.report.results import describe_data, describe_model, summarise_search
from moe_jax.runs import Command, RunFolder, read_json, run_script, write_atomic
from moe_jax.runs.bars import progress_display
from moe_jax.training.evaluation import bits_per_byte
from moe_jax.training.step import TrainState
from moe_jax.types import Topology


def main(command: Command) -> None:
    """Runs, or continues, the job in its folder."""
    console = Console()
    with RunFolder(command.workdir, command.config, must_exist=command.resume) as run:
        if not run.is_finished:
            with progress_display() as display:
                run.write_results(compute_results(Lab(run, display)))
        run.finish()
        with console.status("drawing the report"):
            report = write_report(run.path)
        print_table(console, read_json(run.path / "results.json"))
        console.print(f"report: {report}", soft_wrap=True)


def compute_results(lab: Lab) -> dict[str, Any]:
    """All stages; each reads what an earlier process has finished."""
    five_gram = ngram.fit(lab.splits["train"], order=5)
    baseline = {split: ngram.bits_per_byte(five_gram, lab.splits[split]) for split in ("selection", "test")}
    state = train_model(lab)
    routing = record_routing(lab, state)
    search = TopologySearch(lab, state)
    found = search.run()
    losses = measure_losses(search, found)
    compared = compare_methods(search, found, losses)
    (evolved, evolved_seed), (rival, rival_seed) = compared["chosen"]["evolved"], compared["chosen"]["baseline"]
    chosen = {
        "untouched": (UNTOUCHED, 0, lab.open_topology),
        "evolved": (evolved, evolved_seed, search.topology(found[evolved][evolved_seed])),
        "baseline": (rival, rival_seed, search.topology(found[rival][rival_seed])),
    }
    write_topologies(lab, search, found)
    healed = [
        heal_row(lab, role, name, losses[name][seed], state, topology)
        for role, (name, seed, topology) in chosen.items()
    ]
    model_bits = bits_per_byte(lab.test, losses[UNTOUCHED][0], lab.test.num_bytes)
    best = next(method for method in compared["methods"] if method["name"] == evolved)
    return {
        "title": "Evolving the routing topology of a byte-level mixture of experts",
        "summary": summarise_search(compared, evolved, model_bits, baseline["test"]),
        "headline": {"test bits/byte": model_bits["all"], "evolved": best["test_bpb"][evolved_seed]},
        "data": describe_data(lab.splits),
        "model": describe_model(lab.model, search.model) | describe_training(lab),
        "ngram": {
            "order": 5,
            "bits_per_byte": baseline["test"],
            "selection_bits_per_byte": baseline["selection"]["all"],
        },
        "model_bits_per_byte": {"test": model_bits},
        "routing": routing,
        "search": compared,
        "heal": healed,
        "timing": read_json(lab.run.path / "stages" / "timing.json"),
    }


def heal_row(
    lab: Lab, role: str, name: str, one_shot: np.ndarray, state: TrainState, topology: Topology
) -> dict[str, Any]:
    """One-shot (`[N]` summed losses) and healed loss of a topology on the test split."""
    test, healed = lab.test, heal(lab, role, state, topology)
    after = bits_per_byte(test, *lab.evaluate(model_state(healed), test, topology))
    before = bits_per_byte(test, one_shot, test.num_bytes)
    return {
        "name": name,
        "steps": lab.training.heal_steps,
        "one_shot_bpb": before["all"],
        "one_shot_interval": before["interval"],
        "healed_bpb": after["all"],
        "healed_interval": after["interval"],
    }


def describe_training(lab: Lab) -> dict[str, int]:
    """How long the model was trained."""
    steps = lab.training.steps
    return {"training_steps": steps, "tokens_seen": steps * lab.data.batch_size * lab.data.sequence_length}


def write_topologies(lab: Lab, search: TopologySearch, found: dict[str, list[Found]]) -> None:
    """Keeps every method's first topology for the pictures."""
    topologies = {name: search.topology(runs[0]) for name, runs in found.items()}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=np.array(list(topologies)),
        keep=np.stack([np.asarray(t.keep[:, 0]) for t in topologies.values()]),
        num_choices=np.stack([np.asarray(t.num_choices[:, 0]) for t in topologies.values()]),
    )
    write_atomic(lab.run.path / "traces" / "topologies.npz", buffer.getvalue())


def print_table(console: Console, results: dict[str, Any]) -> None:
    """The final table."""
    table = Table(title="Test split, bits per byte: lower is better", title_justify="left", box=SIMPLE)
    table.add_column("method", no_wrap=True)
    for column in ("evals", "sel. KL", "bits/byte", "vs untouched [95 %]"):
        table.add_column(column, justify="right", no_wrap=True)
    for method in results["search"]["methods"]:
        row = [method["name"], "", "", f"{np.mean(method['test_bpb']):.3f}", ""]
        if delta := method.get("delta_vs_full"):
            low, high = delta["interval"]
            row[1], row[2] = str(method["evaluations"]), f"{np.mean(method['selection_kl']):.3f}"
            row[4] = f"{delta['estimate']:+.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(*row)
    console.print(table)
    for sentence in results["summary"]:
        console.print(sentence)


if __name__ == "__main__":
    raise SystemExit(run_script(main, "configs/evolve_topology.py"))
