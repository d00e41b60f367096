"""Dispatch backends against a dense layer of equal FLOPs, and against the Mixtral block of `transformers`.

    python -m experiments.bench_dispatch                              # shapes A and B, about 8 minutes on 2 cores
    python -m experiments.bench_dispatch --quick                      # few tokens: shows that it runs
    python -m experiments.bench_dispatch --shapes A B mixtral qwen3 --dtypes float32 bfloat16 --no-transformers
    python -m experiments.bench_dispatch --out results.json           # and results.png, a picture of the ratios

A and B are small, for a CPU; `mixtral` and `qwen3` have the experts, choices and proportions of Mixtral-8x7B and
Qwen3-30B-A3B, at full width on an accelerator and at an eighth and a quarter of it on a CPU.

The baseline `dense_ffn` is one SwiGLU network on T*K rows: the FLOPs of a perfect dispatch and none of its data
movement. It runs in the same process, interleaved with what it is compared to (`timing.py`), in the same dtype;
`forward_backward` takes the gradients of tokens, gates and parameters. `einsum` and `gather` run the same plan cut to
capacity 1.25, so under skewed routing they drop assignments (`dropped`, a share), which the others compute.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.timing import Call, compile_cold_and_warm, measure_interleaved, summarize
from moe_jax.dispatch import BACKENDS
from moe_jax.nn.experts import SWIGLU
from moe_jax.report.pictures.benchmark import plot_ratios
from moe_jax.routing import drop_over_capacity, expert_capacity, get_rule, route
from moe_jax.runs.environment import describe_environment
from moe_jax.types import RoutingPlan

CPU_SHAPES = {
    "A": {"T": 4096, "D": 256, "F": 512, "E": 8, "K": 2},
    "B": {"T": 4096, "D": 256, "F": 128, "E": 64, "K": 8},
    "mixtral": {"T": 2048, "D": 512, "F": 1792, "E": 8, "K": 2},
    "qwen3": {"T": 2048, "D": 512, "F": 192, "E": 128, "K": 8},
}
ACCELERATOR_SHAPES = {
    "A": {"T": 8192, "D": 768, "F": 2048, "E": 8, "K": 2},
    "B": {"T": 8192, "D": 768, "F": 256, "E": 64, "K": 8},
    "mixtral": {"T": 8192, "D": 4096, "F": 14336, "E": 8, "K": 2},
    "qwen3": {"T": 16384, "D": 2048, "F": 768, "E": 128, "K": 8},
}
CAPACITY_FACTOR = 1.25
# Left out, and named in the table: one-hot tensors of shape B (0.7 GB each), torch's weights per assignment, and one
# matrix-vector product after the other for thousands of tokens.
LARGEST_INTERMEDIATE = 2**29
MOST_SWITCHED = 64  # tokens
LARGEST_GATHERED_WEIGHTS = 2**31


def zipf(shape: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    """Choice scores `[T, E]` whose first choices follow 1 / rank (Gumbel's trick draws without replacement)."""
    return -np.log(np.arange(1, shape["E"] + 1)) + rng.gumbel(size=(shape["T"], shape["E"]))


def one_hot_expert(shape: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    """Choice scores `[T, E]` where expert 0 is the first choice of 60 % of the tokens."""
    scores = rng.gumbel(size=(shape["T"], shape["E"]))
    scores[rng.random(shape["T"]) < 0.6, 0] = np.inf
    return scores


DISTRIBUTIONS = {
    "uniform": lambda shape, rng: rng.gumbel(size=(shape["T"], shape["E"])),
    "zipf": zipf,
    "60% on one": one_hot_expert,
}


def swiglu_params(shape: dict[str, int], key: jax.Array) -> dict[str, jax.Array]:
    keys = jax.random.split(key)
    return {
        "w_in": jax.random.normal(keys[0], (shape["E"], shape["D"], 2 * shape["F"])) * shape["D"] ** -0.5,
        "w_out": jax.random.normal(keys[1], (shape["E"], shape["F"], shape["D"])) * shape["F"] ** -0.5,
    }


def intermediate_bytes(backend: str, shape: dict[str, int]) -> int:
    """The largest float32 tensor of a backend that grows with E."""
    capacity = expert_capacity(shape["T"], shape["E"], shape["K"], CAPACITY_FACTOR)
    rows = {"dense": shape["E"] * shape["T"] * 2 * shape["F"], "einsum": shape["T"] * shape["E"] * capacity}
    return 4 * rows.get(backend, 0)


def dense_ffn(params: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
    return SWIGLU.outer(params, SWIGLU.inner(params, rows))


def backend_cases(
    shape: dict[str, int], scores: np.ndarray, dtype: str
) -> tuple[dict[str, dict], dict[str, dict[str, Call]]]:
    """Compiles every backend and the baseline for one routing.

    Returns:
      Row figures by `backend/pass`, and by pass the calls to time, `dense_ffn` among them.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    num_experts, num_choices = shape["E"], shape["K"]
    tokens = jax.random.normal(keys[0], (shape["T"], shape["D"])).astype(dtype)
    cotangent = jax.random.normal(keys[1], tokens.shape).astype(dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), swiglu_params(shape, keys[2]))
    ids = jnp.asarray(np.argsort(-scores, axis=1)[:, :num_choices], jnp.int32)
    gates = jax.nn.softmax(jax.random.normal(keys[3], ids.shape))
    capacity = expert_capacity(shape["T"], num_experts, num_choices, CAPACITY_FACTOR)
    cut_ids = drop_over_capacity(ids, num_experts, capacity)

    figures: dict[str, dict] = {}
    calls: dict[str, dict[str, Call]] = {"forward": {}, "forward_backward": {}}
    rows = jnp.tile(tokens, (num_choices, 1))
    one = jax.tree.map(lambda leaf: leaf[0], params)
    row_cotangent = jnp.tile(cotangent, (num_choices, 1))
    calls["forward"]["dense_ffn"], _ = compile_cold_and_warm(dense_ffn, one, rows)
    gradient = jax.grad(lambda params, rows, cotangent: jnp.sum(dense_ffn(params, rows) * cotangent), argnums=(0, 1))
    calls["forward_backward"]["dense_ffn"], _ = compile_cold_and_warm(gradient, one, rows, row_cotangent)

    for name, dispatch in BACKENDS.items():
        needed, reason = intermediate_bytes(name, shape), ""
        if needed > LARGEST_INTERMEDIATE:
            reason = f"needs a tensor of {needed / 2**30:.1f} GiB"
        if name == "switched" and shape["T"] > MOST_SWITCHED:
            reason = "is for the few tokens of a decoding step"
        if reason:
            figures |= {f"{name}/{each_pass}": {"skipped": reason} for each_pass in calls}
            continue
        is_capped = name in ("einsum", "gather")
        plan_ids = cut_ids if is_capped else ids
        plan_gates = jnp.where(plan_ids < num_experts, gates, 0)

        def forward(tokens, gates, params, ids, dispatch=dispatch, limit=capacity if is_capped else None):
            return dispatch(tokens, RoutingPlan(ids, gates, num_experts, limit), SWIGLU, params)

        def loss(tokens, gates, params, ids, cotangent, forward=forward):
            return jnp.sum(forward(tokens, gates, params, ids) * cotangent)

        arguments = (tokens, plan_gates, params, plan_ids)
        programs = {"forward": (forward, arguments)}
        programs["forward_backward"] = (jax.grad(loss, argnums=(0, 1, 2)), (*arguments, cotangent))
        for each_pass, (function, inputs) in programs.items():
            calls[each_pass][name], figures[f"{name}/{each_pass}"] = compile_cold_and_warm(function, *inputs)
            figures[f"{name}/{each_pass}"]["dropped"] = float(jnp.mean(plan_ids == num_experts))
    return figures, calls


def bench_backends(
    name: str, shape: dict[str, int], distribution: str, dtype: str, repeats: int
) -> list[dict[str, Any]]:
    """One row per backend and pass, for one shape, distribution and dtype."""
    scores = DISTRIBUTIONS[distribution](shape, np.random.default_rng(0))
    figures, calls = backend_cases(shape, scores, dtype)
    rows = []
    for each_pass, pass_calls in calls.items():
        samples = measure_interleaved(pass_calls, repeats)
        for backend in BACKENDS:
            row = {"shape": name, **shape, "dtype": dtype, "distribution": distribution}
            row |= {"backend": backend, "pass": each_pass}
            row |= {"baseline": "dense_ffn", **figures[f"{backend}/{each_pass}"]}
            if backend in samples:
                row |= summarize(samples[backend], samples["dense_ffn"])
            rows.append(row)
    return rows


def bench_transformers(shape: dict[str, int], repeats: int) -> list[dict[str, Any]]:
    """Forward of the Mixtral block, router included: ours and each implementation of `transformers`, equal weights.

    Raises:
      AssertionError: if the outputs differ, so that no speed is reported for another computation.
    """
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(shape["T"], shape["D"])).astype(np.float32)
    router = rng.normal(size=(shape["D"], shape["E"])).astype(np.float32) * shape["D"] ** -0.5
    params = swiglu_params(shape, jax.random.key(0))

    def ours(tokens, router, params):
        plan = route(tokens @ router, get_rule("softmax_top_k_renormalized"), num_choices=shape["K"]).plan
        return BACKENDS["blocked"](tokens, plan, SWIGLU, params)

    run_ours, _ = compile_cold_and_warm(ours, jnp.asarray(tokens), jnp.asarray(router), params)
    calls, skipped = {"ours": run_ours}, {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        gathered = 4 * shape["T"] * shape["K"] * 3 * shape["D"] * shape["F"]
        if implementation == "batched_mm" and gathered > LARGEST_GATHERED_WEIGHTS:
            skipped[implementation] = f"gathers {gathered / 2**30:.0f} GiB of weights"
            continue
        config = MixtralConfig(
            hidden_size=shape["D"],
            intermediate_size=shape["F"],
            num_local_experts=shape["E"],
            num_experts_per_tok=shape["K"],
            experts_implementation=implementation,
        )
        block = MixtralSparseMoeBlock(config).eval()
        with torch.no_grad():
            block.gate.weight.copy_(torch.tensor(router.T))
            block.experts.gate_up_proj.copy_(torch.tensor(np.asarray(params["w_in"])).transpose(1, 2))
            block.experts.down_proj.copy_(torch.tensor(np.asarray(params["w_out"])).transpose(1, 2))
        inputs = torch.tensor(tokens)[None]

        def theirs(block=block, inputs=inputs):
            with torch.inference_mode():
                return block(inputs)[0]

        np.testing.assert_allclose(theirs().numpy(), run_ours(), rtol=1e-3, atol=1e-4)
        calls[implementation] = theirs
    samples = measure_interleaved(calls, repeats)
    best = min((name for name in calls if name != "ours"), key=lambda name: np.median(samples[name]))
    rows = []
    for name in (*calls, *skipped):
        row = {"shape": "Mixtral block", **shape, "dtype": "float32", "distribution": "random router"}
        row["pass"] = "forward"
        row |= {"backend": "blocked" if name == "ours" else f"transformers {name}", "baseline": f"transformers {best}"}
        if name in skipped:
            row["skipped"] = skipped[name]
        else:
            row |= summarize(samples[name], samples[best])
            row["speedup_over_best_transformers"] = 1 / row["ratio"]
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Dispatch: ratio to the baseline (below 1 is faster)")
    for column in (
        "shape",
        "T",
        "E",
        "dtype",
        "routing",
        "pass",
        "backend",
        "ms",
        "ratio",
        "± IQR",
        "temp MiB",
        "compile s",
    ):
        table.add_column(column)
    table.add_column("baseline / note")
    for row in rows:
        cells = [row["shape"], row["T"], row["E"], row["dtype"], row["distribution"], row["pass"], row["backend"]]
        if "skipped" in row:
            cells += ["-", "-", "-", "-", "-", f"skipped: {row['skipped']}"]
        else:
            cells += [f"{row['ms']:.1f}", f"{row['ratio']:.2f}", f"{row['ratio_iqr']:.2f}"]
            cells += [f"{row[name]:.1f}" if name in row else "-" for name in ("temp_mib", "compile_cold_s")]
            dropped = row.get("dropped", 0)
            cells.append(row["baseline"] + (f", {dropped:.0%} dropped" if dropped else ""))
        table.add_row(*map(str, cells))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 tokens, 5 repeats")
    parser.add_argument("--shapes", nargs="+", choices=CPU_SHAPES, default=["A", "B"], help="default: A B")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--no-transformers", action="store_true", help="leave the comparison with transformers out")
    parser.add_argument("--out", type=Path, help="write the rows and the environment as JSON, and a picture beside it")
    arguments = parser.parse_args()
    repeats = 5 if arguments.quick else 15
    console = Console()
    environment = describe_environment()
    all_shapes = CPU_SHAPES if environment["backend"] == "cpu" else ACCELERATOR_SHAPES
    shapes = {name: all_shapes[name] | ({"T": 512} if arguments.quick else {}) for name in arguments.shapes}
    rows = []
    with Progress(console=console) as progress:
        task = progress.add_task("backends", total=len(shapes) * len(DISTRIBUTIONS) * len(arguments.dtypes) + 2)
        for (name, shape), dtype, distribution in itertools.product(shapes.items(), arguments.dtypes, DISTRIBUTIONS):
            progress.update(task, description=f"shape {name}, {dtype}, {distribution}")
            rows += bench_backends(name, shape, distribution, dtype, repeats)
            progress.advance(task)
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if arguments.no_transformers:
            environment["not_compared"] = ["asked not to"]
        elif missing:
            console.print(f"NOT COMPARED with transformers: {' and '.join(missing)} not installed", style="bold red")
            environment["not_compared"] = missing
        else:
            # torch's idle threads would spin through the calls that follow and slow them down.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            import torch
            import transformers

            torch.set_num_threads(environment["cpu_count"])
            environment["packages"] |= {"torch": torch.__version__, "transformers": transformers.__version__}
            environment["torch_threads"] = torch.get_num_threads()
            for num_tokens in (256, 512 if arguments.quick else CPU_SHAPES["A"]["T"]):
                progress.update(task, description=f"transformers, {num_tokens} tokens")
                rows += bench_transformers(CPU_SHAPES["A"] | {"T": num_tokens}, repeats)
                progress.advance(task)
    print_table(rows, console)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
        picture = arguments.out.with_suffix(".png")
        plot_ratios(rows).savefig(picture, dpi=160, facecolor="white")
        console.print(f"wrote {arguments.out} and {picture}")


if __name__ == "__main__":
    main()
