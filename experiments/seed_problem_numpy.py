"""NumPy controls of `experiments.seed_problem`: the problem itself, a faithful loop, and the same search vectorised.

The problem, its sizes, initialisation, fitness and operators are those of the public `simple_working_demo.py` of
`danieleschmidt/self-evolving-moe-router` (commit ff02f563), written anew. The loop does what that program does: for
every topology, batch, sequence and token it runs two experts. The vectorised form uses that experts do not depend on
the topology: with their outputs' Gram matrices the error of a token is a quadratic form in its eight combine weights.

    OMP_NUM_THREADS=1 python -m experiments.seed_problem_numpy 256 10 3    # population, generations, repeats -> JSON
"""

import json
import sys
import time
from typing import NamedTuple

import numpy as np

TOKENS, EXPERTS, WIDTH, HIDDEN, SEQUENCES, BATCHES = 16, 8, 64, 128, 4, 3
SPARSITY_WEIGHT, BALANCE_WEIGHT = 0.2, 0.3


class Problem(NamedTuple):
    """Random experts and a router, never trained, and data whose target is 0.8 x + noise.

    Attributes:
      up: `[E, D, H]`, down: `[E, H, D]`, router: `[D, E]`.
      bias_up: `[E, H]`, bias_down: `[E, D]`; zero, as in the original, which nevertheless adds them.
      inputs: `[S, T, D]`, targets: likewise; S = batches x sequences. The mean over equal batches is one mean over all.
    """

    up: np.ndarray
    bias_up: np.ndarray
    down: np.ndarray
    bias_down: np.ndarray
    router: np.ndarray
    inputs: np.ndarray
    targets: np.ndarray


class GramForm(NamedTuple):
    """The problem with the feature dimension summed out; S sequences, T tokens.

    Attributes:
      gram: `[S, T, E, E]` mean products of expert outputs, cross: `[S, T, E]` of expert outputs and target.
      energy: `[]` mean square of the target, which is the error of the zero output.
      weights: `[S, T, E]` exp(router logits): a masked softmax is a renormalised product with the mask.
    """

    gram: np.ndarray
    cross: np.ndarray
    energy: np.ndarray
    weights: np.ndarray


def make_problem(seed: int, data_seed: int | None = None) -> Problem:
    """The weights of one seed; `data_seed` draws fresh data for the same weights, to hold out."""
    random = np.random.RandomState(seed)  # the original's generator
    experts = [(random.randn(WIDTH, HIDDEN) * 0.1, random.randn(HIDDEN, WIDTH) * 0.1) for _ in range(EXPERTS)]
    router = random.randn(WIDTH, EXPERTS) * 0.1
    random = random if data_seed is None else np.random.RandomState(data_seed)
    inputs, targets = [], []
    for _ in range(BATCHES):
        inputs.append(random.randn(SEQUENCES, TOKENS, WIDTH))
        targets.append(0.8 * inputs[-1] + 0.1 * random.randn(SEQUENCES, TOKENS, WIDTH))
    up, down = (np.stack(matrices) for matrices in zip(*experts, strict=True))
    biases = np.zeros((EXPERTS, HIDDEN)), np.zeros((EXPERTS, WIDTH))
    return Problem(up, biases[0], down, biases[1], router, np.concatenate(inputs), np.concatenate(targets))


def gram_form(problem: Problem) -> GramForm:
    """Sums the feature dimension out."""
    hidden = np.maximum(np.einsum("std,edh->steh", problem.inputs, problem.up), 0)
    outputs = np.einsum("steh,ehd->sted", hidden, problem.down)
    return GramForm(
        np.einsum("sted,stfd->stef", outputs, outputs) / WIDTH,
        np.einsum("sted,std->ste", outputs, problem.targets) / WIDTH,
        np.mean(problem.targets**2),
        np.exp(problem.inputs @ problem.router),
    )


def fitness_loop(problem: Problem, mask: np.ndarray) -> float:
    """Fitness of one `[T, E]` mask, to be maximised, the way the original computes it: token by token."""
    usage, squared_error = np.zeros(EXPERTS), 0.0
    for inputs, targets in zip(problem.inputs, problem.targets, strict=True):
        logits = np.where(mask > 0, inputs @ problem.router, -1e9)
        gates = np.exp(logits - logits.max(axis=1, keepdims=True))
        gates /= gates.sum(axis=1, keepdims=True)
        for token, gate, target in zip(inputs, gates, targets, strict=True):
            output = np.zeros(WIDTH)
            for expert in np.argsort(gate)[-2:]:
                hidden = np.maximum(token @ problem.up[expert] + problem.bias_up[expert], 0)
                output += gate[expert] * (hidden @ problem.down[expert] + problem.bias_down[expert])
                usage[expert] += gate[expert]
            squared_error += np.sum((output - target) ** 2)
    share = usage / usage.sum()
    balance = -np.sum(share * np.log(share + 1e-8)) / np.log(EXPERTS)
    sparsity = 1 - mask.mean()
    return -squared_error / problem.targets.size + SPARSITY_WEIGHT * sparsity + BALANCE_WEIGHT * balance


def gram_terms(form: GramForm, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared error `[P]` and expert usage `[P, E]` of `[P, T, E]` masks."""
    gates = form.weights[None] * masks[:, None]  # [P, S, T, E]
    gates /= gates.sum(axis=3, keepdims=True)
    second = np.partition(gates, -2, axis=3)[..., -2:-1]
    gates = np.where(gates >= second, gates, 0)
    mixed = (gates[..., None, :] @ form.gram[None])[..., 0, :]
    error = form.energy + np.einsum("pste,pste->p", gates, mixed - 2 * form.cross[None]) / form.cross[..., 0].size
    return error, gates.sum(axis=(1, 2))


def fitness_gram(form: GramForm, masks: np.ndarray) -> np.ndarray:
    """Fitness `[P]` of `[P, T, E]` masks, to be maximised, without loops and without the feature dimension."""
    error, usage = gram_terms(form, masks)
    share = usage / usage.sum(axis=1, keepdims=True)
    balance = -np.sum(share * np.log(share + 1e-8), axis=1) / np.log(EXPERTS)
    return -error + SPARSITY_WEIGHT * (1 - masks.mean(axis=(1, 2))) + BALANCE_WEIGHT * balance


def random_masks(random: np.random.Generator, population_size: int) -> np.ndarray:
    """`[P, T, E]` masks as the original draws them: one expert a token, then 60-90 % of all bits with repetition."""
    masks = np.arange(EXPERTS) == random.integers(EXPERTS, size=(population_size, TOKENS, 1))
    needed = (TOKENS * EXPERTS * (1 - random.uniform(0.1, 0.4, population_size))).astype(int) - TOKENS
    for mask, count in zip(masks.reshape(population_size, -1), needed, strict=True):
        mask[random.integers(TOKENS * EXPERTS, size=count)] = True
    return masks


def offspring(random: np.random.Generator, masks: np.ndarray, fitness: np.ndarray) -> np.ndarray:
    """One generation with the original's operators, vectorised.

    Two elites; tournaments of three; uniform crossover; a random expert for a token that lost all; then, each with
    probability 0.15, one connection more anywhere, and one fewer at the first token that has several.
    """
    size = len(masks)
    entrants = random.integers(size, size=(2 * size, 3))
    parents = masks[np.take_along_axis(entrants, fitness[entrants].argmax(axis=1)[:, None], axis=1)[:, 0]]
    children = np.where(random.random(masks.shape, np.float32) < 0.5, parents[:size], parents[size:])
    given = np.arange(EXPERTS) == random.integers(EXPERTS, size=(size, TOKENS, 1))
    children = np.where(children.any(axis=2, keepdims=True), children, given)
    everyone, draw = np.arange(size), random.random(masks.shape, np.float32)
    closed = np.where(children, -1, draw).reshape(size, -1).argmax(axis=1)
    children.reshape(size, -1)[everyone, closed] |= random.random(size) < 0.15
    token = (children.sum(axis=2) > 1).argmax(axis=1)
    opened = np.where(children[everyone, token], draw[everyone, token], -1).argmax(axis=1)
    is_removed = (random.random(size) < 0.15) & (children[everyone, token].sum(axis=1) > 1)
    children[everyone, token, opened] &= ~is_removed
    children[:2] = masks[np.argsort(fitness)[-2:]]
    return children


def evolve(seed: int, form: GramForm, population_size: int, generations: int) -> np.ndarray:
    """The original's search: the best `[T, E]` mask of the last population."""
    random = np.random.default_rng(seed)
    masks = random_masks(random, population_size)
    for _ in range(generations - 1):
        masks = offspring(random, masks, fitness_gram(form, masks))
    return masks[fitness_gram(form, masks).argmax()]


def measure(population_size: int, generations: int, repeats: int) -> dict[str, list[float]]:
    """Evaluations per CPU-second and per wall second of one population in the loop, and of vectorised searches."""
    problem = make_problem(0)
    form = GramForm(*(np.float32(array) for array in gram_form(problem)))  # float32, as the JAX program
    masks = random_masks(np.random.default_rng(0), population_size)
    evolve(0, form, population_size, 2)
    clocks = [(time.process_time(), time.perf_counter())]
    for seed in range(repeats):
        evolve(seed, form, population_size, generations)
        clocks.append((time.process_time(), time.perf_counter()))
    for mask in masks:
        fitness_loop(problem, mask)
    clocks.append((time.process_time(), time.perf_counter()))
    cpu, wall = np.diff(clocks, axis=0).T
    evaluations = np.array([population_size * generations] * repeats + [population_size])
    rates = {"cpu": (evaluations / cpu).tolist(), "wall": (evaluations / wall).tolist()}
    return {
        "loop_per_cpu_s": rates["cpu"][-1:],
        "loop_per_wall_s": rates["wall"][-1:],
        "vectorised_per_cpu_s": rates["cpu"][:-1],
        "vectorised_per_wall_s": rates["wall"][:-1],
    }


if __name__ == "__main__":
    print(json.dumps(measure(*(int(argument) for argument in sys.argv[1:]))))
