"""What a population of topologies costs against plain forward passes, and what ask and tell add to a generation.

    python -m experiments.bench_evolution                             # about 3 minutes on 2 cores
    python -m experiments.bench_evolution --quick                     # less, main job only: shows that it runs
    python -m experiments.bench_evolution --out experiments/results/bench_evolution_cpu.json

Evaluating P topologies of N sequences is one compiled call. Its baselines do without topologies: `P forwards` are P
calls of a compiled forward pass of N sequences, `one forward` is a single one of P * N sequences; both compute logits
and KL to the same reference. `main job` is the model of the main job, whose dense first layer no candidate changes;
`all MoE` has routed layers only, so that nothing is shared unless `frozen_layers` says so. All weights are untrained.
Calls run interleaved in one process (`timing.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from configs.evolve_topology import get_config
from experiments.timing import Call, compile_cold_and_warm, measure_interleaved, summarize
from moe_jax.evolution import NSGA2, DiscreteGA, advance_search, combine, mask_genome, start_search, top_k_genome
from moe_jax.evolution.population import PopulationData, PopulationEvaluator, candidates_that_fit
from moe_jax.losses import kl_divergence, masked_mean
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.runs.environment import describe_environment, enable_compilation_cache
from moe_jax.types import Array

CONFIG = get_config()
MAIN_JOB = DecoderConfig(**CONFIG.model)
MODELS = {"main job": MAIN_JOB, "all MoE": dataclasses.replace(MAIN_JOB, layers=("moe", "moe", "moe"))}
WEIGHTS = "untrained"


def kept_half(
    graphdef: nnx.GraphDef, model: DecoderConfig, frozen_layers: int, micro_batch: int
) -> PopulationEvaluator:
    """Evaluates masks that keep half of the experts of the layers that are not frozen."""
    num_layers = model.num_moe_layers - frozen_layers
    total = num_layers * model.num_experts // 2
    genome = mask_genome(num_layers, model.num_experts, total, model.num_choices, model.num_choices)
    return PopulationEvaluator(graphdef, model, genome, micro_batch, frozen_layers)


def text_of(num_sequences: int) -> tuple[Array, Array]:
    """Random tokens and a mask without padding: `[N, S]` each."""
    shape = (num_sequences, CONFIG.data.sequence_length)
    return jax.random.randint(jax.random.key(1), shape, 0, MAIN_JOB.vocab_size), jnp.ones(shape, bool)


def plain_forward(graphdef: nnx.GraphDef) -> Any:
    """(state, tokens, mask, reference) -> logits and mean KL, without a topology."""

    def forward(state: nnx.State, tokens: Array, mask: Array, reference: Array) -> tuple[Array, Array]:
        logits, _ = nnx.merge(graphdef, state)(tokens, mask, trace="off")
        return logits, masked_mean(kl_divergence(reference, logits), mask)

    return forward


def bench_evaluation(
    name: str, model: DecoderConfig, population: int, num_sequences: int, memory_limits_mb: list[int], repeats: int
) -> list[dict[str, Any]]:
    """One row for each number of frozen layers, memory limit and baseline."""
    (graphdef, state), (tokens, mask) = nnx.split(Decoder(model, key=jax.random.key(0))), text_of(num_sequences)
    forward = plain_forward(graphdef)
    reference = kept_half(graphdef, model, 0, 1).prepare(state, tokens, mask).reference
    calls: dict[str, Call] = {}
    run_one, _ = compile_cold_and_warm(forward, state, tokens, mask, reference)
    calls["P forwards"] = lambda: [run_one() for _ in range(population)]
    tiled = (jnp.tile(x, (population,) + (1,) * (x.ndim - 1)) for x in (tokens, mask, reference))
    calls["one forward"], _ = compile_cold_and_warm(forward, state, *tiled)
    figures: dict[str, dict[str, Any]] = {}
    for memory_limit_mb in memory_limits_mb:
        fits = candidates_that_fit(model, *tokens.shape, memory_limit_mb * 2**20)
        for frozen_layers in range(model.num_moe_layers):
            evaluator = kept_half(graphdef, model, frozen_layers, fits)
            genomes = jax.vmap(evaluator.genome.random)(jax.random.split(jax.random.key(2), population))
            data = evaluator.prepare(state, tokens, mask)
            key = f"{frozen_layers} frozen, {memory_limit_mb} MiB"
            calls[key], compiled = compile_cold_and_warm(evaluator.objectives, genomes, data)
            shared = {"frozen_layers": frozen_layers, "layers_shared": evaluator.first_layer}
            figures[key] = shared | {"memory_limit_mib": memory_limit_mb, "micro_batch": fits} | compiled
    samples = measure_interleaved(calls, repeats)
    common = {"model": name, "weights": WEIGHTS, "layers": model.layers, "P": population, "N": num_sequences}
    common |= {"S": tokens.shape[1], "repeats": repeats}
    return [
        {"what": "evaluate P", **common, **figures[key], "baseline": baseline}
        | summarize(samples[key], samples[baseline])
        for key in figures
        for baseline in ("P forwards", "one forward")
    ]


def one_number(genomes: Array, data: PopulationData) -> Array:
    """A fitness that costs next to nothing: a checksum of the genome."""
    return jnp.sum(genomes * jnp.arange(genomes.shape[1])[None, :], axis=1).astype(jnp.float32)


def three_numbers(genomes: Array, data: PopulationData) -> Array:
    first = one_number(genomes, data)
    return jnp.stack([first, -first, jnp.sum(genomes, axis=1).astype(jnp.float32)], axis=1)


def bench_ask_and_tell(population: int, num_sequences: int, generations: int, repeats: int) -> list[dict[str, Any]]:
    """Per strategy, a scan of generations with a trivial evaluation against the same one with the real evaluation."""
    tokens, mask = text_of(num_sequences)
    fits = candidates_that_fit(MAIN_JOB, *tokens.shape, CONFIG.evolution.memory_limit_mb * 2**20)
    graphdef, state = nnx.split(Decoder(MAIN_JOB, key=jax.random.key(0)))
    masks = kept_half(graphdef, MAIN_JOB, 0, fits)
    num_layers, num_experts, num_choices = MAIN_JOB.num_moe_layers, MAIN_JOB.num_experts, MAIN_JOB.num_choices
    sizes = (num_layers * num_choices, num_layers * num_experts)
    front = combine(
        mask_genome(num_layers, num_experts, sizes, num_choices, num_choices),
        top_k_genome(num_layers, num_experts, num_choices),
    )
    fronts = dataclasses.replace(masks, genome=front)
    data = masks.prepare(state, tokens, mask)
    rows = []
    for name, strategy, real, trivial in (
        ("DiscreteGA", DiscreteGA(population, masks.genome), masks.divergence, one_number),
        ("NSGA2", NSGA2(population, front), fronts.objectives, three_numbers),
    ):
        params = strategy.default_params
        start = start_search(strategy, params, real, data, jax.random.key(0))
        calls, figures = {}, {}
        for kind, evaluate in (("ask and tell", trivial), ("generation", real)):

            def scan(state, params, data, strategy=strategy, evaluate=evaluate):
                return advance_search(strategy, evaluate, generations, state, params, data)

            calls[kind], figures[kind] = compile_cold_and_warm(scan, start, params, data)
        samples = measure_interleaved(calls, repeats)
        figures["ask and tell"]["compile_cold_s_of_generation"] = figures["generation"]["compile_cold_s"]
        figures["ask and tell"]["compile_warm_s_of_generation"] = figures["generation"]["compile_warm_s"]
        rows.append(
            {"what": f"ask, tell: {name}", "model": "main job", "weights": WEIGHTS, "layers": MAIN_JOB.layers}
            | {"P": population, "N": num_sequences, "S": tokens.shape[1], "generations": generations}
            | {"genes": strategy.genome.size, "repeats": repeats, "micro_batch": fits, "baseline": "generation"}
            | figures["ask and tell"]
            | summarize(samples["ask and tell"] / generations, samples["generation"] / generations)
        )
    return rows


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(
        title="Evolution over untrained weights: ratio to the baseline (below 1 is faster); compile cold/warm"
    )
    for column in ("what", "model", "P", "frozen", "batch", "ms", "ratio", "± IQR", "baseline", "MiB", "compile s"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        cells = [row["what"], row["model"], row["P"], row.get("frozen_layers", 0), row["micro_batch"]]
        cells += [f"{row['ms']:.3g}", f"{row['ratio']:.3f}", f"{row['ratio_iqr']:.3f}", row["baseline"]]
        cells += [f"{row['temp_mib']:.0f}", f"{row['compile_cold_s']:.1f}/{row['compile_warm_s']:.1f}"]
        table.add_row(*map(str, cells))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="main job only: 16 topologies of 2 sequences, 3 repeats")
    parser.add_argument("--out", type=Path, help="write the rows and the environment as JSON")
    arguments = parser.parse_args()
    repeats = 3 if arguments.quick else 5
    num_sequences = 2 if arguments.quick else len(CONFIG.data.domains) * CONFIG.evolution.search_per_domain
    limits = [128] if arguments.quick else sorted({128, CONFIG.evolution.memory_limit_mb})
    models = {"main job": MAIN_JOB} if arguments.quick else MODELS
    enable_compilation_cache()  # for what is not measured: every cold compilation clears the caches in memory
    console, rows = Console(), []
    with Progress(console=console) as progress:
        task = progress.add_task("evolution", total=len(models) + 1)
        for name, model in models.items():
            progress.update(task, description=f"evaluation, {name}")
            rows += bench_evaluation(name, model, 16 if arguments.quick else 64, num_sequences, limits, repeats)
            progress.advance(task)
        progress.update(task, description="ask and tell")
        rows += bench_ask_and_tell(CONFIG.evolution.population, num_sequences, CONFIG.evolution.chunk, repeats)
        progress.advance(task)
    print_table(rows, console)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"environment": describe_environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
