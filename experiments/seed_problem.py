"""Re-creates the problem of an earlier NumPy system, goes past its result, and measures the speed honestly.

The problem evolves a 16 x 8 mask of which expert each token position may use, over random experts that are never
trained. fitness = -MSE + 0.2 sparsity + 0.3 balance, to be maximised. The table puts simple answers beside the
evolved ones, on the data of the search and on fresh data; the second table compares evaluations per CPU-second with
the original's loop over tokens and with the same arithmetic in vectorised NumPy, since a ratio to the loop alone
would flatter JAX.

    python -m experiments.seed_problem
    python -m experiments.seed_problem --quick
    python -m experiments.seed_problem --out=results.json --config.evolution.generations=1000 --config.seeds=10
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments import seed_problem_numpy as original
from moe_jax.evolution import DiscreteGA, RandomSearch, mask_genome, run_search
from moe_jax.runs.environment import describe_environment

_ROOT = pathlib.Path(__file__).parents[1]


def evaluate(genomes: jax.Array, form: original.GramForm) -> jax.Array:
    """Negative fitness `[P]` of `[P, T * E]` genomes; the arithmetic of `seed_problem_numpy.fitness_gram`.

    Unrolled over experts with the population in the last axis: XLA vectorises that on a CPU, whereas a last axis of
    eight experts costs it twice the time.
    """
    masks = genomes.reshape(-1, original.TOKENS, original.EXPERTS).astype(jnp.float32)
    weights = form.weights[..., None] * masks.transpose(1, 2, 0)[None]  # [S, T, E, P]
    gates = [weights[:, :, expert] for expert in range(original.EXPERTS)]
    total, first, second = sum(gates), gates[0], jnp.zeros_like(gates[0])
    for gate in gates[1:]:
        first, second = jnp.maximum(first, gate), jnp.maximum(second, jnp.minimum(first, gate))
    gates = [jnp.where(gate >= second, gate, 0) / total for gate in gates]
    error = form.energy
    for i, gate in enumerate(gates):
        mixed = form.gram[:, :, i, i, None] * gate - 2 * form.cross[:, :, i, None]
        for j in range(i):  # the Gram matrix is symmetric
            mixed += 2 * form.gram[:, :, i, j, None] * gates[j]
        error += jnp.mean(gate * mixed, axis=(0, 1))
    usage = jnp.stack([jnp.sum(gate, axis=(0, 1)) for gate in gates], axis=1)
    share = usage / jnp.sum(usage, axis=1, keepdims=True)
    balance = -jnp.sum(share * jnp.log(share + 1e-8), axis=1) / np.log(original.EXPERTS)
    sparsity = 1 - jnp.mean(masks, axis=(1, 2))
    return error - original.SPARSITY_WEIGHT * sparsity - original.BALANCE_WEIGHT * balance


def climb(form: original.GramForm) -> tuple[np.ndarray, int]:
    """Greedy search: from all ones, makes the best of all single flips until none helps; mask and evaluations."""
    evaluate_all = jax.jit(evaluate)
    genome, size = np.ones(original.TOKENS * original.EXPERTS, np.int32), original.TOKENS * original.EXPERTS
    loss, evaluations = float(evaluate_all(jnp.asarray(genome[None]), form)[0]), 1
    while True:
        flipped = genome[None] ^ np.eye(size, dtype=np.int32)
        served = flipped.reshape(size, original.TOKENS, original.EXPERTS).any(axis=2).all(axis=1)
        losses = np.where(served, evaluate_all(jnp.asarray(flipped), form), np.inf)
        evaluations += int(served.sum())
        if losses.min() >= loss:
            return genome, evaluations
        genome, loss = flipped[losses.argmin()], losses.min()


def round_robin(num_experts: int) -> np.ndarray:
    """`[T, E]` mask: token `t` uses the experts `t n, ..., t n + n - 1`, modulo E."""
    used = num_experts * np.arange(original.TOKENS)[:, None] + np.arange(num_experts)[None, :]
    return (used[:, :, None] % original.EXPERTS == np.arange(original.EXPERTS)).any(axis=1)


def compare_topologies(config: ConfigDict, progress: Progress) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """One row for each way to find a mask; and evaluations per second of DiscreteGA, the first run cold."""
    problem = original.make_problem(config.problem_seed)
    form = original.gram_form(problem)
    fresh = original.gram_form(original.make_problem(config.problem_seed, config.held_out_seed))
    data = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), form)
    rows = [{"name": "zero output", "fitness": [-form.energy], "held_out": [-fresh.energy], "mse": form.energy}]

    def add(name: str, evaluations: int, *masks: np.ndarray) -> None:
        masks = np.stack(masks).reshape(-1, original.TOKENS, original.EXPERTS) > 0
        fitness, held_out = original.fitness_gram(form, masks), original.fitness_gram(fresh, masks)
        row = {"name": name, "evaluations": evaluations, "fitness": fitness.tolist(), "held_out": held_out.tolist()}
        rows.append(row | {"mse": original.gram_terms(form, masks)[0].mean(), "sparsity": 1 - masks.mean()})

    add("all ones: plain top-2", 0, np.ones((original.TOKENS, original.EXPERTS)))
    add("round robin, 2 experts a token", 0, round_robin(2))
    add("round robin, 4 experts a token", 0, round_robin(4))
    size, generations = config.original.population_size, config.original.generations
    evolved = [original.evolve(seed, form, size, generations) for seed in range(config.seeds)]
    add("the original's GA", size * generations, *evolved)
    genome_kind = mask_genome(  # its rows are token positions, not layers
        original.TOKENS, original.EXPERTS, (original.TOKENS, original.TOKENS * original.EXPERTS), 1, 1
    )
    greedy, evaluations = climb(data)
    add("greedy single flips", evaluations, greedy)
    rates: dict[str, list[float]] = {"per_cpu_s": [], "per_wall_s": [], "cpu_s": []}
    for name, strategy_class in (("random search", RandomSearch), ("DiscreteGA", DiscreteGA)):
        strategy = strategy_class(config.evolution.population_size, genome_kind)
        params = strategy.default_params.replace(
            crossover_rate=jnp.float32(config.evolution.crossover_rate), edits=jnp.float32(config.evolution.edits)
        )
        is_timed = strategy_class is DiscreteGA
        runs = 1 + config.timing.repeats if is_timed else config.seeds
        results, task = [], progress.add_task(name, total=runs)
        for seed in range(max(runs, config.seeds)):
            clock = time.process_time(), time.perf_counter()
            key, evolution = jax.random.key(seed), config.evolution
            results.append(run_search(strategy, params, evaluate, data, key, evolution.generations, evolution.chunk))
            cpu_s, wall_s = time.process_time() - clock[0], time.perf_counter() - clock[1]
            if is_timed:
                rates["cpu_s"].append(cpu_s)
                rates["per_cpu_s"].append(results[-1].evaluations / cpu_s)
                rates["per_wall_s"].append(results[-1].evaluations / wall_s)
            progress.advance(task)
        add(name, results[0].evaluations, *(result.best_genome for result in results[: config.seeds]))
    return rows, rates


def measure_numpy(config: ConfigDict) -> dict[str, list[float]]:
    """The NumPy rates, in a process of its own with one BLAS thread: waiting threads would count as CPU time."""
    sizes = config.evolution.population_size, config.timing.numpy_generations, config.timing.repeats
    command = [sys.executable, "-m", "experiments.seed_problem_numpy", *map(str, sizes)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    output = subprocess.run(command, cwd=_ROOT, env=os.environ | threads, check=True, capture_output=True, text=True)
    return json.loads(output.stdout)


def timing_rows(jax_rates: dict[str, list[float]], numpy_rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row for each program: median and spread of evaluations per second, and the ratios to both NumPy programs."""
    samples = {
        "NumPy loop": (numpy_rates["loop_per_cpu_s"], numpy_rates["loop_per_wall_s"]),
        "NumPy vectorised": (numpy_rates["vectorised_per_cpu_s"], numpy_rates["vectorised_per_wall_s"]),
        "JAX cold, compilation included": (jax_rates["per_cpu_s"][:1], jax_rates["per_wall_s"][:1]),
        "JAX warm": (jax_rates["per_cpu_s"][1:], jax_rates["per_wall_s"][1:]),
    }
    loop, vectorised = (statistics.median(samples[name][0]) for name in ("NumPy loop", "NumPy vectorised"))
    rows = []
    for name, (per_cpu_s, per_wall_s) in samples.items():
        rate = statistics.median(per_cpu_s)
        spread = {"lowest": min(per_cpu_s), "highest": max(per_cpu_s), "repeats": len(per_cpu_s)}
        row = {"name": name, "per_cpu_s": rate, **spread, "per_wall_s": statistics.median(per_wall_s)}
        rows.append(row | {"ratio_to_loop": rate / loop, "ratio_to_vectorised": rate / vectorised})
    return rows


def print_tables(console: Console, rows: list[dict[str, Any]], timing: list[dict[str, Any]], population: int) -> None:
    """Both tables; fitness of several seeds as mean and best."""
    table = Table("topology", "evaluations", "fitness", "best", "held out", "MSE", title="fitness, higher is better")
    for row in rows:
        numbers = (np.mean(row["fitness"]), np.max(row["fitness"]), np.mean(row["held_out"]), row["mse"])
        table.add_row(row["name"], f"{row.get('evaluations', 0):,}", *(f"{number:.4f}" for number in numbers))
    console.print(table, "The zero output routes nothing: its fitness is the error alone, without either bonus.")
    table = Table("program", "per CPU-second (range)", "per second", "x loop", "x vectorised")
    table.title = f"evaluations, population {population}"
    for row in timing:
        rate = f"{row['per_cpu_s']:,.0f} ({row['lowest']:,.0f}-{row['highest']:,.0f})"
        ratios = f"{row['ratio_to_loop']:.1f}", f"{row['ratio_to_vectorised']:.2f}"
        table.add_row(row["name"], rate, f"{row['per_wall_s']:,.0f}", *ratios)
    console.print(table)


def main(_: list[str]) -> None:
    config = flags.FLAGS.config
    if flags.FLAGS.quick:
        with config.unlocked():
            config.seeds, config.timing.repeats, config.timing.numpy_generations = 1, 2, 5
            config.evolution.generations = config.evolution.chunk = config.evolution.generations // 10
    jax.config.update("jax_enable_compilation_cache", False)  # cold means compiled anew
    console = Console()
    with Progress(console=console) as progress:
        rows, jax_rates = compare_topologies(config, progress)
    timing = timing_rows(jax_rates, measure_numpy(config))
    compile_s = jax_rates["cpu_s"][0] - statistics.median(jax_rates["cpu_s"][1:])
    timing[2]["compile_cpu_s"] = compile_s
    print_tables(console, rows, timing, config.evolution.population_size)
    meanwhile = [f"{compile_s * row['per_cpu_s']:,.0f}" for row in timing[:2]]
    console.print(
        f"Compilation took {compile_s:.1f} CPU-seconds, in which the NumPy loop evaluates {meanwhile[0]} masks and "
        f"vectorised NumPy {meanwhile[1]}."
    )
    if flags.FLAGS.out:
        kinds = [row | {"kind": "topology"} for row in rows] + [row | {"kind": "timing"} for row in timing]
        result = {"environment": describe_environment(), "config": config.to_dict(), "rows": kinds}
        pathlib.Path(flags.FLAGS.out).write_text(json.dumps(result, indent=1, default=float) + "\n")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", str(_ROOT / "configs" / "seed_problem.py"))
    flags.DEFINE_bool("quick", False, "A tenth of the generations, one seed and fewer repeats.")
    flags.DEFINE_string("out", None, "JSON file to write.")
    app.run(main)
