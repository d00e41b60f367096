"""The balance-controller laboratory: one synthetic stream of drifting logits through every balance rule.

    python -m experiments.balance_lab                                              # 1 to 1.5 minutes on 2 cores
    python -m experiments.balance_lab --quick                                      # seconds: shows that it runs
    python -m experiments.balance_lab --out experiments/results/balance_lab.json   # and a picture beside it

The stream is synthetic. A token's logits are the popularity of each expert plus normal noise. Popularity is
heavy-tailed (Zipf: minus the logarithm of a rank), turns slowly from one ranking of the experts into another, and jumps
to a new pair of rankings in the middle. Nothing is trained but what balances: a balancer moves its selection bias, a
loss moves an offset on each expert's logits by plain gradient descent. No task pulls back, so a loss's rate stands for
its weight times a learning rate. All see the same tokens, each at several rates; balancers score by sigmoid, as
DeepSeek-V3 does, losses by softmax, as Switch does, and two of them by sigmoid as well. (There the loss of single
tokens finds a way out: with every score near 1 the probabilities are even, whatever the choices.)

Measured per rate, with Student's t intervals over seeds:

    MaxVio            the busiest expert's load over the mean load, less 1 (2408.15664), in the last quarter of each
                      phase; a uniform router would have `chance` of it
    settle, recover   steps from the start, and from the jump, until the MaxVio of the last WINDOW batches is on average
                      less than 0.1 above chance; the phase's length if never
    swing             how much an expert's load varies from batch to batch in the last quarters: standard deviation over
                      that of sampling noise, so 1 is a balancer at rest
    moved             share of plain top-k's choices there that are given up for balance

Rules that balance within a batch (those of the table that are not causal) have nothing to settle and run on the last
batches alone. Tokens are independent, so that chance is exact; a sequence is then no more than a small batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from moe_jax.analysis import expected_imbalance, max_violation, t_interval
from moe_jax.losses import (
    global_entropy_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    router_entropy_loss,
    sum_over_groups,
)
from moe_jax.report.pictures.balance import plot_balance_lab
from moe_jax.routing import RULES, Rule, get_balancer, route, select_top_k
from moe_jax.runs.environment import describe_environment, enable_compilation_cache
from moe_jax.types import Array, RouterOutput, RouterStats

SOFTMAX, SIGMOID = RULES["softmax_top_k_renormalized"], RULES["sigmoid_top_k"]  # without a bias they choose alike
WINDOW = 4
THRESHOLD = 0.1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of a stream: `steps` in two phases, `tokens` a step as `sequences` of equal length."""

    steps: int = 400
    seeds: int = 5
    tokens: int = 2048
    sequences: int = 32
    experts: int = 16
    choices: int = 2

    @property
    def phase(self) -> int:
        """Steps of each of the two phases."""
        return self.steps // 2

    @property
    def chance(self) -> float:
        """MaxVio to expect of a uniform router on one batch."""
        return expected_imbalance(self.tokens, self.experts, self.choices).max_violation


# (state [E], logits [T, E], key, rate) -> next state and what was routed under the old one
Step = Callable[[Array, Array, Array, Array], tuple[Array, RouterOutput]]


class Method(NamedTuple):
    """A way to balance: "none", "bias", "loss" or "rule", and the rates to try, slowest first."""

    kind: str
    step: Step
    rates: tuple[float, ...]


def make_stream(sizes: Sizes, seed: int) -> np.ndarray:
    """Synthetic logits `[steps, T, E]` float32, the same for the same seed."""
    rng = np.random.default_rng(seed)
    turn = np.linspace(0, np.pi / 2, sizes.phase)[:, None]
    halves = []
    for _ in range(2):
        first, last = (-np.log(1.0 + rng.permutation(sizes.experts)) for _ in range(2))
        halves.append(np.cos(turn) * first + np.sin(turn) * last)
    popularity = np.concatenate(halves)
    noise = rng.standard_normal((len(popularity), sizes.tokens, sizes.experts), np.float32)
    return noise + (popularity - popularity.mean(1, keepdims=True)).astype(np.float32)[:, None, :]


def balancer_step(sizes: Sizes, name: str, **settings: Any) -> Step:
    """A balancer at work: its state is the selection bias."""

    def step(bias: Array, logits: Array, key: Array, rate: Array) -> tuple[Array, RouterOutput]:
        bins = 1000 if name == "quantile" else 0
        routed = route(logits, SIGMOID, num_choices=sizes.choices, bias=bias, bias_bins=bins)
        rates = {"rate": rate, "group_rate": rate} if name == "sign_in_groups" else {"rate": rate}
        return get_balancer(name, **rates, **settings)(bias, routed.stats), routed

    return step


def loss_step(
    sizes: Sizes, loss: Callable[[RouterStats], Array], num_groups: int | None = None, rule: Rule = SOFTMAX
) -> Step:
    """Gradient descent on a balance loss: the state is an offset on the logits."""

    def objective(offset: Array, logits: Array, key: Array) -> tuple[Array, RouterOutput]:
        routed = route(logits + offset[None, :], rule, num_choices=sizes.choices, key=key, stats_groups=num_groups)
        return loss(routed.stats), routed

    def step(offset: Array, logits: Array, key: Array, rate: Array) -> tuple[Array, RouterOutput]:
        gradient, routed = jax.grad(objective, has_aux=True)(offset, logits, key)
        return offset - rate * gradient, routed

    return step


def mean_over_groups(stats: RouterStats) -> Array:
    """The load-balancing loss of every group, averaged."""
    return sum_over_groups(load_balancing_loss(stats), stats) / stats.num_tokens.sum()


def rule_step(sizes: Sizes, name: str) -> Step:
    """A rule that balances by itself, without state."""

    def step(state: Array, logits: Array, key: Array, rate: Array) -> tuple[Array, RouterOutput]:
        return state, route(logits, RULES[name], num_choices=sizes.choices, num_sequences=sizes.sequences, key=key)

    return step


def all_methods(sizes: Sizes) -> dict[str, Method]:
    """Everything that is compared, by name."""
    balancer, loss = partial(balancer_step, sizes), partial(loss_step, sizes)
    sign_rates, loss_rates, sigmoid_rates = (0.001, 0.003, 0.01, 0.03), (1.0, 3.0, 10.0, 30.0), (3.0, 10.0, 30.0, 100.0)
    losses = {
        "Switch loss, batch": loss(load_balancing_loss),
        "Switch loss, token": loss(mean_over_groups, sizes.tokens),
        "importance loss": loss(importance_loss),
        "load loss, noisy top-k": loss(load_loss, rule=RULES["noisy_top_k"]),
        "global entropy loss": loss(global_entropy_loss),
        "entropy loss, negative": loss(lambda stats: -router_entropy_loss(stats)),
    }
    on_sigmoid = {
        "Switch, sequence, sigmoid": loss(mean_over_groups, sizes.sequences, SIGMOID),
        "Switch, token, sigmoid": loss(mean_over_groups, sizes.tokens, SIGMOID),
    }
    rules = [name for name, rule in RULES.items() if not rule.is_causal and rule.only_choices in (None, sizes.choices)]
    return {
        "no balance": Method("none", balancer("none"), (0.0,)),
        "bias by sign": Method("bias", balancer("sign"), sign_rates),
        "bias by sign, 4 groups": Method("bias", balancer("sign_in_groups", num_groups=4), sign_rates),
        "bias in proportion": Method("bias", balancer("proportional"), (0.01, 0.03, 0.1, 0.3)),
        "bias to quantile": Method("bias", balancer("quantile"), (0.03, 0.1, 0.3, 1.0)),
        **{name: Method("loss", step, loss_rates) for name, step in losses.items()},
        **{name: Method("loss", step, sigmoid_rates) for name, step in on_sigmoid.items()},
        **{name: Method("rule", rule_step(sizes, name), (0.0,)) for name in rules},
    }


@partial(jax.jit, static_argnums=0)
def simulate(step: Step, rates: Array, stream: Array, plain: Array) -> tuple[Array, Array]:
    """Runs every rate on every seed.

    Args:
      step: a method.
      rates: `[R]`.
      stream: `[steps, seeds, T, E]` logits.
      plain: `[steps, seeds, T, K]` choices without balance.

    Returns:
      Loads `[steps, R, seeds, E]` over their mean, and the share of the plain choices given up `[steps, R, seeds]`.
    """

    def one(state: Array, logits: Array, plain: Array, key: Array, rate: Array) -> tuple[Array, tuple[Array, Array]]:
        state, routed = step(state, logits, key, rate)
        chosen = routed.stats.chosen.reshape(-1, logits.shape[1]).sum(0)
        is_kept = jnp.any(routed.plan.expert_ids[:, :, None] == plain[:, None, :], axis=1)  # [T, K]
        return state, (chosen / chosen.mean(), 1 - is_kept.mean())

    of_seeds = jax.vmap(one, (0, 0, 0, 0, None))
    of_rates = jax.vmap(of_seeds, (0, None, None, None, 0))

    def body(state: Array, now: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        return of_rates(state, *now, rates)

    keys = jax.random.split(jax.random.key(0), stream.shape[:2])
    start = jnp.zeros((len(rates), stream.shape[1], stream.shape[3]))
    return jax.lax.scan(body, start, (stream, plain, keys))[1]


def steps_until_even(violation: np.ndarray, chance: float) -> int | None:
    """Steps until the last WINDOW of `violation [steps]` are on average even; None if they never are."""
    is_even = np.convolve(violation, np.full(WINDOW, 1 / WINDOW), "valid") < chance + THRESHOLD
    return int(is_even.argmax()) + WINDOW if is_even.any() else None


def measure(sizes: Sizes, load: np.ndarray, moved: np.ndarray) -> dict[str, Any]:
    """Figures of one method at one rate, each a mean over seeds with the ends of its interval.

    Args:
      sizes: of the stream.
      load: `[steps, seeds, E]` over the mean; a part of the stream is taken for settled.
      moved: `[steps, seeds]`.
    """
    share = sizes.choices / sizes.experts
    noise = np.sqrt((1 - share) / (sizes.tokens * share))  # of Binomial(T, K / E), over its mean
    starts = (0, sizes.phase) if len(load) == sizes.steps else ()
    tails = [slice(start + 3 * sizes.phase // 4, start + sizes.phase) for start in starts] or [slice(None)]
    violation = np.asarray(max_violation(load))  # [steps, seeds]
    samples = {
        "max_violation": np.mean([violation[tail].mean(0) for tail in tails], axis=0),
        "swing": np.mean([load[tail].std(0, ddof=1).mean(-1) for tail in tails], axis=0) / noise,
        "moved": np.mean([moved[tail].mean(0) for tail in tails], axis=0),
    }
    figures: dict[str, Any] = {}
    for name, start in zip(("settle", "recover"), starts, strict=False):
        steps = [steps_until_even(one, sizes.chance) for one in violation[start : start + sizes.phase].T]
        samples[name] = np.array([sizes.phase if n is None else n for n in steps])
        figures[f"{name}_never"] = steps.count(None)
    for name, values in samples.items():
        interval = t_interval(values)
        figures |= {name: interval.estimate, f"{name}_interval": [interval.low, interval.high]}
    return figures


def run_lab(sizes: Sizes, progress: Progress) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """One row per method and rate, and per method its MaxVio over time, `[R, steps]`, averaged over seeds."""
    stream = jnp.asarray(np.stack([make_stream(sizes, seed) for seed in range(sizes.seeds)], axis=1))
    plain = jax.lax.map(jax.vmap(lambda logits: select_top_k(logits, sizes.choices, None, None)), stream)
    methods = all_methods(sizes)
    rows, traces = [], {}
    task = progress.add_task("balance lab", total=len(methods))
    for name, method in methods.items():
        progress.update(task, description=name)
        seen = slice(-(sizes.phase // 4), None) if method.kind == "rule" else slice(None)
        load, moved = map(np.asarray, simulate(method.step, jnp.asarray(method.rates), stream[seen], plain[seen]))
        traces[name] = np.asarray(max_violation(load)).mean(2).T
        for index, rate in enumerate(method.rates):
            figures = measure(sizes, load[:, index], moved[:, index])
            rows.append({"method": name, "kind": method.kind, "rate": rate, "seeds": sizes.seeds} | figures)
        progress.advance(task)
    return rows, traces


def print_table(rows: list[dict[str, Any]], sizes: Sizes, console: Console) -> None:
    table = Table()
    for column in ("method", "rate", "settle", "recover", "MaxVio", "swing", "moved"):
        table.add_column(column, no_wrap=True)
    table.title = f"Synthetic stream, {sizes.seeds} seeds; MaxVio by chance {sizes.chance:.3f}"

    def cell(row: dict[str, Any], name: str, digits: int) -> str:
        if name not in row:
            return "-"
        if row.get(f"{name}_never") == sizes.seeds:
            return "never"
        low, high = row[f"{name}_interval"]
        at_least = "≥ " if row.get(f"{name}_never") else ""
        return f"{at_least}{row[name]:.{digits}f} ± {(high - low) / 2:.{digits}f}"

    for row in rows:
        digits = {"settle": 0, "recover": 0, "max_violation": 3, "swing": 2, "moved": 3}
        table.add_row(row["method"], f"{row['rate']:g}", *(cell(row, name, n) for name, n in digits.items()))
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short stream of few tokens, two seeds")
    parser.add_argument("--out", type=Path, help="write the rows and the environment as JSON, and a picture beside it")
    arguments = parser.parse_args(argv)
    sizes = Sizes(steps=80, seeds=2, tokens=256, sequences=8) if arguments.quick else Sizes()
    enable_compilation_cache()
    console = Console()
    with Progress(console=console) as progress:
        rows, traces = run_lab(sizes, progress)
    print_table(rows, sizes, console)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"environment": describe_environment(), "sizes": dataclasses.asdict(sizes), "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        picture = arguments.out.with_suffix(".png")
        figure = plot_balance_lab(rows, traces, chance=sizes.chance, jump=sizes.phase)
        figure.savefig(picture, dpi=120, facecolor="white")
        console.print(f"{arguments.out}\n{picture}")


if __name__ == "__main__":
    main()
