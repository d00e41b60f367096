"""Grouped matmul: each implementation in each pass, against one dense matmul of equal FLOPs.

    python -m experiments.bench_grouped_matmul                      # 8 minutes on 2 cores shared with other work
    python -m experiments.bench_grouped_matmul --quick              # 2 minutes, few rows: shows that it runs
    python -m experiments.bench_grouped_matmul --out results.json
    python -m experiments.bench_grouped_matmul --table              # also renews this device's rows of `impl=None`

The baseline `dense` multiplies the same N rows by one matrix, in the same process, interleaved with what is compared to
it (`timing.py`). Each result is first compared with the float32 einsum. `--table` writes, for each shape and dtype, the
implementation of the smallest geometric mean of ratios over the routings.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from experiments.timing import Call, compile_cold_and_warm, measure_interleaved, summarize
from moe_jax.ops.grouped_matmul import load_pass
from moe_jax.ops.grouped_matmul.measured import TABLE
from moe_jax.ops.grouped_matmul.passes import PerPass
from moe_jax.runs.environment import describe_environment

# N rows are tokens times choices; F is gate and up together.
CPU_SHAPES = {
    "8 experts": {"N": 8192, "E": 8, "D": 256, "F": 1024},
    "64 experts": {"N": 32768, "E": 64, "D": 256, "F": 256},
    "64 experts, decode": {"N": 128, "E": 64, "D": 256, "F": 256},
}
ACCELERATOR_SHAPES = {
    "Mixtral": {"N": 16384, "E": 8, "D": 4096, "F": 14336},
    "Qwen3-30B gate and up": {"N": 65536, "E": 128, "D": 2048, "F": 1536},
    "Qwen3-30B down": {"N": 65536, "E": 128, "D": 768, "F": 2048},
    "8 experts of a small model": {"N": 16384, "E": 8, "D": 768, "F": 4096},
    "64 experts of a small model": {"N": 65536, "E": 64, "D": 768, "F": 512},
}
CANDIDATES = {
    "cpu": ("blocked", "einsum", "ragged_dot"),
    "gpu": ("einsum", "ragged_dot", "pallas", "tokamax"),
    "tpu": ("einsum", "ragged_dot", "megablox"),
}
LARGEST_EXPANSION = {"cpu": 5e10, "gpu": 1e13, "tpu": 1e13}  # FLOPs of a ragged_dot, if it is dense, that are worth it
TOLERANCE = {"float32": 2e-3, "bfloat16": 2e-2}  # of the largest number; float32 may be multiplied as TF32


def uniform(num_experts: int) -> np.ndarray:
    return np.full(num_experts, 1 / num_experts)


def zipf(num_experts: int) -> np.ndarray:
    """Shares of the rows that fall as 1 / rank."""
    shares = 1 / np.arange(1, num_experts + 1)
    return shares / shares.sum()


def one_hot_expert(num_experts: int) -> np.ndarray:
    """60 % of the rows on expert 0."""
    return np.concatenate([[0.6], np.full(num_experts - 1, 0.4 / (num_experts - 1))])


DISTRIBUTIONS = {"uniform": uniform, "zipf": zipf, "60% on one": one_hot_expert}
DENSE = PerPass(
    forward=lambda rows, weights: rows @ weights[0],
    rows_gradient=lambda output_grad, weights: output_grad @ weights[0].T,
    weights_gradient=lambda rows, output_grad: rows.T @ output_grad,
)


def make_operands(shape: dict[str, int], dtype: str) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The two arrays of each pass."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (shape["N"], shape["D"]), dtype)
    weights = jax.random.normal(keys[1], (shape["E"], shape["D"], shape["F"]), dtype)
    output_grad = jax.random.normal(keys[2], (shape["N"], shape["F"]), dtype)
    return {
        "forward": (rows, weights),
        "rows_gradient": (output_grad, weights),
        "weights_gradient": (rows, output_grad),
    }


def reason_to_skip(name: str, shape: dict[str, int], platform: str) -> str | None:
    flops = 2 * shape["N"] * shape["D"] * shape["F"] * shape["E"]
    if name == "ragged_dot" and flops > LARGEST_EXPANSION[platform]:
        return f"dense it would take {flops:.0e} FLOPs"
    if name == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return "not installed"
    return None


def compile_candidates(
    each_pass: str, operands: tuple[jax.Array, jax.Array], sizes: jax.Array, shape: dict[str, int], platform: str
) -> tuple[dict[str, Callable], dict[str, dict[str, Any]]]:
    """Compiles each implementation of a pass and compares its result with the float32 einsum.

    Returns:
      Jitted functions of (left, right, sizes), and figures of each implementation, `skipped` among them.

    Raises:
      AssertionError: if a result differs, so that no speed is reported for another computation.
    """
    dtype = operands[0].dtype
    wide = (operand.astype(jnp.float32) for operand in operands)
    expected = np.asarray(load_pass("einsum", each_pass)(*wide, sizes, jnp.dtype("float32")))
    functions: dict[str, Callable] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name in CANDIDATES[platform]:
        if reason := reason_to_skip(name, shape, platform):
            figures[name] = {"skipped": reason}
            continue
        function = functools.partial(load_pass(name, each_pass), dtype=dtype)
        try:
            run, figures[name] = compile_cold_and_warm(function, *operands, sizes)
        except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
            if name in ("blocked", "einsum"):  # plain array code, which no shape can stop
                raise
            # A kernel that refuses a shape, or its memory, is a row and not the end.
            figures[name] = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}
            continue
        error = np.abs(np.asarray(run(), np.float32) - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE[dtype.name], f"{name} {each_pass} is off by {error:.1e} of the largest number"
        functions[name], figures[name]["max_error"] = jax.jit(function), float(error)
    return functions, figures


def bench(shape_name: str, shape: dict[str, int], dtype: str, platform: str, repeats: int) -> list[dict[str, Any]]:
    """One row per pass, distribution and implementation, for one shape and dtype."""
    rng = np.random.default_rng(0)
    sizes = {
        name: jnp.asarray(rng.multinomial(shape["N"], shares(shape["E"])), jnp.int32)
        for name, shares in DISTRIBUTIONS.items()
    }
    rows = []
    for each_pass, operands in make_operands(shape, dtype).items():
        functions, figures = compile_candidates(each_pass, operands, sizes["zipf"], shape, platform)
        dense = jax.jit(getattr(DENSE, each_pass))
        for distribution, group_sizes in sizes.items():
            calls: dict[str, Call] = {"dense": lambda dense=dense, pair=operands: jax.block_until_ready(dense(*pair))}
            for name, function in functions.items():
                calls[name] = functools.partial(
                    lambda function, *inputs: jax.block_until_ready(function(*inputs)), function, *operands, group_sizes
                )
            samples = measure_interleaved(calls, repeats)
            for name, figure in figures.items():
                row = {"shape": shape_name, **shape, "dtype": dtype, "distribution": distribution, "pass": each_pass}
                row |= {"implementation": name, "baseline": "dense", **figure}
                if name in samples:
                    row |= summarize(samples[name], samples["dense"])
                    row["tflops_per_s"] = 2e-9 * shape["N"] * shape["D"] * shape["F"] / row["ms"]
                rows.append(row)
    return rows


def fastest(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Rows of `measured.json`: the best implementation of each pass, by geometric mean over the distributions."""
    problems: dict[tuple, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        if "ratio" in row:
            problem = tuple(row[key] for key in ("dtype", "N", "E", "D", "F"))
            by_pass = problems.setdefault(problem, {each_pass: {} for each_pass in PerPass._fields})
            by_pass[row["pass"]].setdefault(row["implementation"], []).append(np.log(row["ratio"]))
    return [
        {"device": device, **dict(zip(("dtype", "N", "E", "D", "F"), problem, strict=True))}
        | {each_pass: min(ratios, key=lambda name: np.mean(ratios[name])) for each_pass, ratios in by_pass.items()}
        for problem, by_pass in problems.items()
    ]


def renew_table(rows: list[dict[str, Any]], environment: dict[str, Any]) -> None:
    """Replaces this device's rows in the package's table."""
    device = environment["devices"][0]
    table = json.loads(TABLE.read_text())
    table["measured_with"][device] = {
        key: environment[key] for key in ("packages", "platform", "cpu_count", "load_average", "command")
    }
    kept = [row for row in table["rows"] if row["device"] != device]
    lines = ",\n".join("  " + json.dumps(row) for row in kept + fastest(rows, device))
    TABLE.write_text(f'{{"measured_with": {json.dumps(table["measured_with"])},\n "rows": [\n{lines}\n]}}\n')


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Grouped matmul: ratio to one dense matmul of equal FLOPs (below 1 is faster)")
    columns = ("shape", "dtype", "routing", "pass", "implementation", "ms", "ratio", "± IQR", "TFLOP/s", "temp MiB")
    for column in (*columns, "compile s"):
        table.add_column(column)
    for row in rows:
        cells = [row["shape"], row["dtype"], row["distribution"], row["pass"], row["implementation"]]
        if "skipped" in row:
            cells.append(f"skipped: {row['skipped']}")
        else:
            cells += [f"{row[name]:.2f}" for name in ("ms", "ratio", "ratio_iqr", "tflops_per_s")]
            cells += [f"{row[name]:.1f}" for name in ("temp_mib", "compile_cold_s")]
        table.add_row(*cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the rows, 3 repeats")
    parser.add_argument("--out", type=Path, help="write the rows and the environment as JSON")
    parser.add_argument("--table", action="store_true", help=f"renew this device's rows of {TABLE.name}")
    arguments = parser.parse_args()
    if arguments.quick and arguments.table:
        parser.error("--quick measures too little for --table")
    platform = jax.devices()[0].platform
    shapes = CPU_SHAPES if platform == "cpu" else ACCELERATOR_SHAPES
    console = Console()
    rows = []
    environment = describe_environment()
    load_before = os.getloadavg()[0]
    cases = [(name, shape, dtype) for name, shape in shapes.items() for dtype in ("float32", "bfloat16")]
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(cases))
        for name, shape, dtype in cases:
            progress.update(task, description=f"{name}, {dtype}")
            used = {**shape, "N": shape["N"] // 16} if arguments.quick else shape
            rows += bench(name, used, dtype, platform, repeats=3 if arguments.quick else 11)
            progress.advance(task)
    print_table(rows, console)
    # What else the machine was doing: on an idle one, the first is near 0.
    environment["load_average"] = {"before": load_before, "after": os.getloadavg()[0]}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
        console.print(f"wrote {arguments.out}")
    if arguments.table:
        renew_table(rows, environment)
        console.print(f"renewed the rows of {environment['devices'][0]!r} in {TABLE.name}")


if __name__ == "__main__":
    main()
