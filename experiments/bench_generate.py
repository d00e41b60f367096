"""Generation against `transformers` on equal weights, and against the time that reading the weights takes.

    python -m experiments.bench_generate                              # about 5 minutes on 2 idle cores
    python -m experiments.bench_generate --quick                      # short texts: shows that it runs
    python -m experiments.bench_generate --checkpoint smollm2=DIR     # also a checkpoint that `transformers` opens
    python -m experiments.bench_generate --out results.json

`tiny-mixtral` has random weights: D=512, 8 layers of 8 heads (2 of keys and values) and 8 experts, top-2, F=1024, a
vocabulary of 32,000. A row's baseline is the fastest of the expert implementations of `transformers` (eager,
grouped_mm, and for decoding batched_mm, which reads a prompt at 10 tokens a second; scaled dot product attention,
inference mode, as many threads as cores), in the same process and in turns with ours, which must give the same text.
Prefill is the time to the first tokens of a batch of equally long prompts, decode that of the tokens after them, all
greedy, in float32.

`bound` is the time to read what a decoded token needs: the weights that every token passes, the experts that were in
fact chosen, and the cache; at the speed at which all cores together add up an array of 1 GiB, measured in every round.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads would spin through the calls that follow

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from experiments.timing import empty_compilation_cache, peak_mib, summarize
from moe_jax.checkpoints.model_folder import import_checkpoint, load_model
from moe_jax.models.config import DecoderConfig
from moe_jax.models.cost import model_cost
from moe_jax.models.generate import Generator
from moe_jax.runs.environment import describe_environment

BATCHES = (1, 8)
IMPLEMENTATIONS = {"prefill": ("eager", "grouped_mm"), "decode": ("eager", "grouped_mm", "batched_mm")}
HOPELESS = 2.5  # times the fastest at the first try, beyond which an implementation is not timed again
MIXTRAL = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}

Timed = Callable[[], float]  # does the work and says how many seconds the part that counts took


def make_mixtral(folder: Path) -> Path:
    """Writes the checkpoint of random weights."""
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL)).save_pretrained(folder)
    return folder


def ours(generator: Generator, prompts: np.ndarray, count: int) -> dict[str, Timed]:
    def run_prefill() -> float:
        return next(generator.stream(prompts.tolist(), max_tokens=1)).seconds

    def run_decode() -> float:
        return list(generator.stream(prompts.tolist(), max_tokens=count, chunk=None))[1].seconds

    return {"prefill": run_prefill, "decode": run_decode}


class Theirs:
    """What `transformers` does with a batch, by any of its implementations of experts."""

    def __init__(self, model: Any, prompts: np.ndarray, count: int):
        self.model, self.ids, self.count = model, torch.tensor(prompts), count

    def prefill(self, implementation: str) -> float:
        """Seconds to the first tokens."""
        return self._run(implementation, implementation)[0]

    def decode(self, implementation: str) -> float:
        """Seconds of the tokens after these."""
        return self._run("eager", implementation)[1]

    def texts(self, implementation: str) -> list[list[int]]:
        """The new tokens."""
        return self._run("eager", implementation)[2]

    @torch.inference_mode()
    def _run(self, for_prompt: str, for_text: str) -> tuple[float, float, list[list[int]]]:
        start = time.perf_counter()
        self._use(for_prompt)
        output = self.model(self.ids, use_cache=True, logits_to_keep=1)
        tokens = [output.logits[:, -1:].argmax(-1)]
        read = time.perf_counter()
        self._use(for_text)
        for _ in range(self.count - 1):
            output = self.model(tokens[-1], past_key_values=output.past_key_values, use_cache=True)
            tokens.append(output.logits[:, -1:].argmax(-1))
        return read - start, time.perf_counter() - read, torch.cat(tokens, 1).tolist()

    def _use(self, implementation: str) -> None:
        if hasattr(self.model.config, "num_local_experts"):
            self.model.set_experts_implementation(implementation)


def measure_rounds(calls: dict[str, Timed], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds `[rounds]` of calls made in turn."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(1e3 * call())
    return {name: np.array(values) for name, values in samples.items()}


def bandwidth_reader() -> Timed:
    """Seconds to read a GiB with a thread for every core."""
    parts = np.array_split(np.ones(2**28, np.float32), os.cpu_count() or 1)
    pool = ThreadPoolExecutor(len(parts))

    def read() -> float:
        start = time.perf_counter()
        list(pool.map(np.sum, parts))
        return time.perf_counter() - start

    return read


def bytes_needed(config: DecoderConfig, expert_ids: list[np.ndarray] | None, length: int, batch: int) -> float:
    """Bytes that a decoding step reads of weights and cache, averaged over steps.

    Args:
      config: of the model.
      expert_ids: for each sequence `[L, N, K]`, the choices of the decoded tokens.
      length: of the texts, on average.
      batch: B.
    """
    layers = model_cost(config, length).layers
    numbers = config.width * config.vocab_size
    chosen = iter(np.stack(expert_ids, axis=2)) if expert_ids else iter(())  # of each layer [N, B, K]
    for layer in layers:
        numbers += layer.shared_parameters + batch * length * layer.cached_numbers
        if layer.kind == "moe":
            numbers += layer.expert.parameters * np.mean([len(np.unique(step)) for step in next(chosen)])
    return 4.0 * numbers


def first_calls(generator: Generator, prompts: np.ndarray, count: int) -> dict[str, float]:
    """Seconds of the first request of a shape, compilation included: with nothing cached, and as in a second start."""
    seconds = {}
    with empty_compilation_cache() as forget_programs:
        for name in ("first_cold_s", "first_warm_s"):
            forget_programs()
            start = time.perf_counter()
            generator.generate(prompts.tolist(), max_tokens=count)
            seconds[name] = time.perf_counter() - start
    return seconds


def bench_model(name: str, folder: Path, lengths: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """A row for prefill and decode at each batch size.

    Raises:
      AssertionError: if the texts differ, so that no speed is reported for another computation.
    """
    with tempfile.TemporaryDirectory() as place:
        import_checkpoint(folder, Path(place) / "model", dtype="float32")
        generator = Generator(load_model(Path(place) / "model"))
    config, (length, count) = generator.config, lengths
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    rows, read_memory = [], bandwidth_reader()
    for batch in BATCHES:
        prompts = np.random.default_rng(batch).integers(3, config.vocab_size, (batch, length))
        figures = first_calls(generator, prompts, count)
        made = generator.generate(prompts.tolist(), max_tokens=count, with_routing=config.num_moe_layers > 0)
        decoded = made.expert_ids and [ids[:, length:] for ids in made.expert_ids]
        needed = bytes_needed(config, decoded, length + count // 2, batch)
        for phase, implementations in IMPLEMENTATIONS.items():
            their_count = count if phase == "decode" else 1
            rivals = Theirs(model, prompts, their_count)
            expected = [text[:their_count] for text in made.tokens]
            seconds = {}
            for each in implementations if config.num_moe_layers else implementations[:1]:
                assert rivals.texts(each) == expected, f"{name}, batch {batch}: {each} writes another text"
                seconds[each] = getattr(rivals, phase)(each)
            names = [each for each in seconds if seconds[each] < HOPELESS * min(seconds.values())]
            calls = {"ours": ours(generator, prompts, count)[phase], "memory": read_memory}
            calls |= {each: partial(getattr(rivals, phase), each) for each in names}
            samples = measure_rounds(calls, rounds)
            best = min(names, key=lambda each: np.median(samples[each]))
            row = {"model": name, "batch": batch, "prompt": length, "new": count, "phase": phase, "dtype": "float32"}
            row |= {
                "baseline": f"transformers {best}",
                "tried_once_s": seconds,
                **figures,
                **summarize(samples["ours"], samples[best]),
            }
            num_tokens = batch * (length if phase == "prefill" else count - 1)
            row |= {"speedup": 1 / row["ratio"], "tokens_per_second": 1e3 * num_tokens / row["ms"]}
            row["baseline_tokens_per_second"] = 1e3 * num_tokens / row["baseline_ms"]
            row |= {"peak_mib": peak_mib(calls["ours"]), "baseline_peak_mib": peak_mib(calls[best])}
            row["bandwidth_gb_per_s"] = 2**30 / np.median(samples["memory"]) / 1e6
            if phase == "decode":
                bound = (count - 1) * needed / 2**30 * samples["memory"]
                row |= {"mib_per_step": needed / 2**20, "share_of_bound": float(np.median(bound / samples["ours"]))}
            rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Generation, tokens per second")
    columns = (
        "model",
        "phase",
        "batch",
        "ours",
        "theirs",
        "speedup",
        "ratio ± IQR",
        "GB/s",
        "of bound",
        "cold s",
        "warm s",
    )
    for column in (*columns, "peak MiB", "baseline"):
        table.add_column(column)
    for row in rows:
        cells = [row["model"], row["phase"], row["batch"], f"{row['tokens_per_second']:.0f}"]
        cells += [f"{row['baseline_tokens_per_second']:.0f}", f"{row['speedup']:.2f}"]
        cells += [f"{row['ratio']:.2f} ± {row['ratio_iqr']:.2f}", f"{row['bandwidth_gb_per_s']:.0f}"]
        cells += [f"{row['share_of_bound']:.0%}" if "share_of_bound" in row else "-"]
        cells += [f"{row['first_cold_s']:.1f}", f"{row['first_warm_s']:.1f}"]
        cells += [f"{row['peak_mib']:.0f} / {row['baseline_peak_mib']:.0f}", row["baseline"]]
        table.add_row(*map(str, cells))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short prompts and texts, 3 rounds")
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="NAME=DIR", help="further models")
    parser.add_argument("--out", type=Path, help="write the rows and the environment as JSON")
    arguments = parser.parse_args()
    lengths, rounds = ((32, 9), 3) if arguments.quick else ((128, 65), 9)
    environment = describe_environment()
    torch.set_num_threads(environment["cpu_count"])
    transformers.logging.set_verbosity_error()
    environment["packages"] |= {"torch": torch.__version__, "transformers": transformers.__version__}
    environment |= {"torch_threads": torch.get_num_threads(), "load_average": os.getloadavg()}
    with tempfile.TemporaryDirectory() as place:
        models = {"tiny-mixtral": make_mixtral(Path(place))}
        models |= {name: Path(folder) for name, folder in (given.split("=", 1) for given in arguments.checkpoint)}
        rows = [row for name, folder in models.items() for row in bench_model(name, folder, lengths, rounds)]
    environment["max_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print_table(rows, Console())
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
