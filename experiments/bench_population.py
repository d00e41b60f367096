"""Eight members of a population in one compiled program against the same eight runs one after the other.

    python -m experiments.bench_population                            # minutes on 2 cores
    python -m experiments.bench_population --quick
    python -m experiments.bench_population --out experiments/results/bench_population_cpu.json

`one by one` takes a training step of each of eight models, each its own call of one compiled program on one device,
metrics fetched as in training. The population's programs do the same eight steps in one call: `in turn` on one device,
`vmap` on one device, and both on as many devices as there are cores, as `--engine=vmap` of `experiments.sweep` does
(`in turn` on CPUs). CPU seconds tell work, wall time what a person waits. Calls run interleaved in one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from configs.train import get_config
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.runs import section
from moe_jax.runs.environment import describe_environment, enable_compilation_cache, use_huge_pages
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.population import (
    Members,
    init_population,
    make_population_step,
    member_of,
    population_mesh,
    shard_population,
    stack_members,
    use_all_cores,
)
from moe_jax.training.step import LossConfig, make_train_step

CONFIG = get_config()
BASE = section(DecoderConfig, CONFIG.model, "config.model")
OPTIMIZER = section(OptimizerConfig, CONFIG.optimizer, "config.optimizer")
LOSS = section(LossConfig, CONFIG.loss, "config.loss")
STEPS, MEMBERS, BATCH = 600, 8, 8


@dataclasses.dataclass(frozen=True)
class Size:
    """A model with the length of its sequences."""

    width: int
    sequence_length: int

    @property
    def model(self) -> DecoderConfig:
        """Two layers of eight experts, as wide inside as outside."""
        sizes = {"width": self.width, "dense_hidden": self.width, "expert_hidden": self.width}
        return dataclasses.replace(BASE, num_heads=2, num_kv_heads=1, **sizes)


SIZES = {"tiny": Size(32, 32), "small": Size(64, 64), "medium": Size(128, 128)}


def batches_of(size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and masks `[P, B, S+1]`."""
    shape = (MEMBERS, BATCH, size.sequence_length + 1)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.int32), np.ones(shape, bool)


def one_by_one(size: Size) -> Callable[[], None]:
    """A step of each of eight runs."""
    graphdef, states = init_population(lambda key: Decoder(size.model, key=key), members_of(), OPTIMIZER, STEPS)
    optimizer = make_optimizer(OPTIMIZER, STEPS)
    step = jax.jit(make_train_step(graphdef, optimizer, LOSS, jax.random.key(1)), donate_argnums=0)
    alone = [jax.tree.map(np.asarray, member_of(states, index)) for index in range(MEMBERS)]
    tokens, mask = batches_of(size)

    def call() -> None:
        for index in range(MEMBERS):
            alone[index], metrics = step(alone[index], tokens[index], mask[index], None)
            jax.device_get(metrics)
        jax.block_until_ready(alone)

    return call


def together(size: Size, num_devices: int, in_turn: bool) -> Callable[[], None]:
    """A step of the population."""
    mesh = population_mesh(num_devices)
    members = shard_population(members_of(), mesh)
    graphdef, state = init_population(lambda key: Decoder(size.model, key=key), members, OPTIMIZER, STEPS)
    step = make_population_step(graphdef, OPTIMIZER, LOSS, STEPS, mesh, in_turn=in_turn)
    compiled, states = jax.jit(step, donate_argnums=0), [shard_population(state, mesh)]
    batch = batches_of(size)

    def call() -> None:
        states[0], metrics = compiled(states[0], members, *shard_population(batch, mesh))
        jax.device_get(metrics)
        jax.block_until_ready(states[0])

    return call


def members_of() -> Members:
    """Members that differ in seed only."""
    settings = {"optimizer": vars(OPTIMIZER), "loss": vars(LOSS)}
    keys = [tuple(jax.random.split(jax.random.key(seed))) for seed in range(MEMBERS)]
    return stack_members([settings] * MEMBERS, keys)


def bench(name: str, size: Size, repeats: int) -> list[dict[str, Any]]:
    """One row for each way."""
    calls = {"one by one": one_by_one(size)}
    for num_devices in sorted({1, len(jax.devices())}):
        for kind, in_turn in (("in turn", True), ("vmap", False)):
            calls[f"{kind}, {num_devices} device{'s' * (num_devices > 1)}"] = together(size, num_devices, in_turn)
    compile_s = {}
    for way, call in calls.items():
        start = time.perf_counter()
        call()
        compile_s[way] = time.perf_counter() - start
        call()
    samples: dict[str, list[tuple[float, float]]] = {way: [] for way in calls}
    for _ in range(repeats):
        for way, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            samples[way].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    measured = {way: np.array(values) for way, values in samples.items()}
    tokens = MEMBERS * BATCH * size.sequence_length
    rows = []
    for way, values in measured.items():
        speed = measured["one by one"] / values  # of the same round
        wall_ms, cpu_ms = np.median(values, axis=0)
        low, high = np.percentile(speed[:, 0], [25, 75])
        rows.append(
            {"model": name, "D": size.width, "S": size.sequence_length, "B": BATCH, "P": MEMBERS, "way": way}
            | {"ms": float(wall_ms), "cpu_ms": float(cpu_ms), "tokens_per_s": 1e3 * tokens / float(wall_ms)}
            | {"speed": float(np.median(speed[:, 0])), "speed_iqr": float(high - low)}
            | {"speed_per_cpu_s": float(np.median(speed[:, 1])), "first_call_s": compile_s[way]}
            | {"baseline": "one by one", "repeats": repeats}
        )
    return rows


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"A step of {MEMBERS} members; speed is against one by one, above 1 is faster")
    for column in ("model", "way", "ms", "tokens/s", "speed", "± IQR", "speed per CPU s", "first call s"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("model", "way") else "right")
    for row in rows:
        figures = [f"{row['ms']:.1f}", f"{row['tokens_per_s']:,.0f}", f"{row['speed']:.2f}", f"{row['speed_iqr']:.2f}"]
        figures += [f"{row['speed_per_cpu_s']:.2f}", f"{row['first_call_s']:.1f}"]
        table.add_row(f"{row['model']} (D={row['D']}, S={row['S']})", row["way"], *figures)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny model only, 5 repeats")
    parser.add_argument("--out", type=Path, help="write the rows and the environment as JSON")
    arguments = parser.parse_args()
    use_huge_pages()
    use_all_cores()
    enable_compilation_cache()
    console, rows = Console(), []
    console.width = max(console.width, 120)  # the table is cut otherwise
    with Progress(console=console) as progress:
        sizes = {"tiny": SIZES["tiny"]} if arguments.quick else SIZES
        for name in progress.track(sizes, description="sizes"):
            rows += bench(name, sizes[name], 5 if arguments.quick else 15)
    print_table(console, rows)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"environment": describe_environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
