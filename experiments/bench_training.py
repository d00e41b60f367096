"""A training step against `transformers` on equal weights, and against the step of the dense twin.

    python -m experiments.bench_training                     # about 3 minutes on 2 idle cores
    python -m experiments.bench_training --quick             # few rounds: shows that it runs
    python -m experiments.bench_training --out results.json

A step is forward, backward, clipping at norm 1 and AdamW, float32, without balance losses. Both models have 2 layers of
8 experts, top-2: `small` has the sizes of `configs/train.py` (D=128, F=128, a vocabulary of bytes, 8 x 128 tokens),
`wide` has D=256, F=512, a vocabulary of 4096 and 8 x 256 tokens, where matmuls take nearly all of the time.

The baseline is torch with the fastest of its implementations of experts (eager, grouped_mm) and AdamW (fused, foreach),
with as many threads as cores, in the same process and in turns with ours. Three steps must first give the same losses.
The twin is dense and has the same FLOPs per token (`models.twin`). `mfu` is defined in `training.throughput`; `cpu_ms`
is the time of all threads, which neighbours on the machine disturb less than the time on the clock.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads would spin through the calls that follow

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.timing import empty_compilation_cache, peak_mib, summarize
from moe_jax.checkpoints.model_folder import import_checkpoint, load_model
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.twin import dense_twin, receipt
from moe_jax.runs.environment import describe_environment, use_huge_pages
from moe_jax.training.optimizer import OptimizerConfig, make_optimizer
from moe_jax.training.step import LossConfig, make_train_step, state_of
from moe_jax.training.throughput import peak_flops, useful_flops

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, schedule="constant", weight_decay=0.1, clip_norm=1.0)
EXPERTS, ADAMW = ("eager", "grouped_mm"), ("fused", "foreach")
MIXTRAL = {"num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}


class Size(NamedTuple):
    """A model and its batches."""

    width: int
    hidden: int
    vocabulary: int
    heads: int
    batch: int
    length: int

    def mixtral(self) -> transformers.MixtralForCausalLM:
        """The model with random weights."""
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            hidden_size=self.width,
            intermediate_size=self.hidden,
            vocab_size=self.vocabulary,
            num_attention_heads=self.heads,
            num_key_value_heads=2,
            **MIXTRAL,
        )
        return transformers.MixtralForCausalLM(config).train()

    def batches(self, count: int) -> list[np.ndarray]:
        """`[B, S+1]` int32 tokens with the frequencies of words."""
        rng = np.random.default_rng(0)
        shape = (self.batch, self.length + 1)
        return [(rng.zipf(1.3, shape) % self.vocabulary).astype(np.int32) for _ in range(count)]


SIZES = {"small": Size(128, 128, 256, 4, 8, 128), "wide": Size(256, 512, 4096, 8, 8, 256)}


class Ours:
    """Our compiled step and its state."""

    def __init__(self, model: Decoder, tokens: np.ndarray) -> None:
        """Compiles with nothing cached and as in a second start."""
        optimizer = make_optimizer(OPTIMIZER, 10**6)
        step = make_train_step(nnx.graphdef(model), optimizer, LossConfig(balance=0.0, z=0.0))
        self.state, self.mask = state_of(model, optimizer), np.ones(tokens.shape, bool)
        seconds = []
        with empty_compilation_cache() as forget_programs:
            for _ in range(2):
                forget_programs()
                start = time.perf_counter()
                lowered = jax.jit(step, donate_argnums=0).lower(self.state, tokens, self.mask, None)
                self.compiled = lowered.compile()
                seconds.append(time.perf_counter() - start)
        memory = self.compiled.memory_analysis().temp_size_in_bytes
        self.figures = {"compile_cold_s": seconds[0], "compile_warm_s": seconds[1], "temp_mib": memory / 2**20}

    def step(self, tokens: np.ndarray) -> float:
        """One step; the loss before it."""
        self.state, metrics = self.compiled(self.state, tokens, self.mask, None)
        jax.block_until_ready(self.state)
        return float(metrics["cross_entropy"])


class Theirs:
    """The same step by torch."""

    def __init__(self, model: transformers.MixtralForCausalLM) -> None:
        """Makes both kinds of AdamW, which share the model."""
        self.model = model
        is_scale = lambda name: "norm" in name  # noqa: E731
        groups = [
            {
                "params": [p for n, p in model.named_parameters() if is_scale(n) == bare],
                "weight_decay": 0.1 * (not bare),
            }
            for bare in (False, True)
        ]
        settings = {"lr": OPTIMIZER.learning_rate, "betas": (OPTIMIZER.b1, OPTIMIZER.b2), "eps": 1e-8}
        self.optimizers = {kind: torch.optim.AdamW(groups, **settings, **{kind: True}) for kind in ADAMW}

    def step(self, experts: str, adamw: str, tokens: np.ndarray) -> float:
        """One step; the loss before it."""
        self.model.set_experts_implementation(experts)
        ids = torch.from_numpy(tokens.astype(np.int64))
        logits = self.model(ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        self.optimizers[adamw].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip_norm)
        self.optimizers[adamw].step()
        return loss.item()


def bench(name: str, size: Size, rounds: int) -> list[dict[str, Any]]:
    """A row for our step against theirs, and one against the twin's.

    Raises:
      AssertionError: if the first three losses differ, so that no speed is reported for another computation.
    """
    torch_model, batches = size.mixtral(), size.batches(3)
    with tempfile.TemporaryDirectory() as place:
        torch_model.save_pretrained(f"{place}/torch")
        import_checkpoint(f"{place}/torch", f"{place}/ours", dtype="float32")
        model = load_model(f"{place}/ours")
    config: DecoderConfig = model.config
    twin_config = dense_twin(config)
    ours, theirs = Ours(model, batches[0]), Theirs(torch_model)
    twin = Ours(Decoder(twin_config, key=jax.random.key(0)), batches[0])
    losses = [(ours.step(batch), theirs.step("eager", "fused", batch)) for batch in batches]
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-4)
    calls = {"ours": partial(ours.step, batches[0]), "twin": partial(twin.step, batches[0])}
    rivals = {f"{e}, {a} AdamW": partial(theirs.step, e, a, batches[0]) for e, a in itertools.product(EXPERTS, ADAMW)}
    wall, cpu = measure_rounds(calls | rivals, rounds)
    best = min(rivals, key=lambda rival: np.median(wall[rival]))
    tokens = size.batch * size.length
    shared = {"model": name, "batch": size.batch, "sequence": size.length, "dtype": "float32", **ours.figures}
    shared |= {"tokens_per_second": 1e3 * tokens / np.median(wall["ours"]), "cpu_ms": np.median(cpu["ours"])}
    shared["mfu"] = shared["tokens_per_second"] * useful_flops(config, size.length) / peak_flops(jax.devices()[0])
    shared["peak_mib"] = peak_mib(calls["ours"])
    rows = []
    for case, baseline, label in (("transformers", best, f"torch {best}"), ("twin", "twin", "dense twin")):
        row = {**shared, "case": case, "baseline": label, **summarize(wall["ours"], wall[baseline])}
        row |= {"speedup": 1 / row["ratio"], "baseline_cpu_ms": np.median(cpu[baseline])}
        row["cpu_ratio"] = row["cpu_ms"] / row["baseline_cpu_ms"]
        row["baseline_tokens_per_second"] = 1e3 * tokens / row["baseline_ms"]
        row["baseline_peak_mib"] = peak_mib((calls | rivals)[baseline])
        rows.append(row)
    rows[0] |= {"losses": [list(pair) for pair in losses], "torch_ms": {r: np.median(wall[r]) for r in rivals}}
    rows[1] |= {"twin_hidden": twin_config.dense_hidden}
    rows[1]["flops_ratio"] = receipt(config, twin_config, size.length).flops.ratio
    return rows


def measure_rounds(
    calls: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Milliseconds `[rounds]` on the clock and of all threads, of calls in turn after one untimed call of each."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            call()
            if number:
                samples[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    both = {name: 1e3 * np.array(values).T for name, values in samples.items()}
    return {name: wall for name, (wall, _) in both.items()}, {name: cpu for name, (_, cpu) in both.items()}


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Training step, float32")
    for column in ("model", "against", "ms", "theirs", "speedup", "ratio ± IQR", "CPU ratio", "tokens/s", "MFU"):
        table.add_column(column)
    for column in ("cold s", "warm s", "peak MiB", "baseline"):
        table.add_column(column)
    for row in rows:
        cells = [row["model"], row["case"], f"{row['ms']:.1f}", f"{row['baseline_ms']:.1f}", f"{row['speedup']:.2f}"]
        cells += [f"{row['ratio']:.2f} ± {row['ratio_iqr']:.2f}", f"{row['cpu_ratio']:.2f}"]
        cells += [f"{row['tokens_per_second']:.0f}", f"{row['mfu']:.0%}"]
        cells += [f"{row['compile_cold_s']:.1f}", f"{row['compile_warm_s']:.1f}"]
        cells += [f"{row['peak_mib']:.0f} / {row['baseline_peak_mib']:.0f}", row["baseline"]]
        table.add_row(*cells)
    console.print(table)


def main() -> None:
    use_huge_pages()  # as every training script does; torch gains by it too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of the small model")
    parser.add_argument("--out", type=Path, help="write the rows and the environment as JSON")
    arguments = parser.parse_args()
    environment = describe_environment()
    torch.set_num_threads(environment["cpu_count"])
    transformers.logging.set_verbosity_error()
    environment["packages"] |= {"torch": torch.__version__, "transformers": transformers.__version__}
    environment |= {"torch_threads": torch.get_num_threads(), "load_average": os.getloadavg()}
    environment["peak_flops"] = peak_flops(jax.devices()[0])
    names, rounds = (["small"], 3) if arguments.quick else (list(SIZES), 15)
    rows = [row for name in names for row in bench(name, SIZES[name], rounds)]
    print_table(rows, Console())
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
