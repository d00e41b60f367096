"""Draws pictures of README.md: two of a finished run of the main job, or one of how a model routes texts.

    python -m experiments.readme_pictures RUN
    python -m experiments.readme_pictures RUN --out experiments/results
    python -m experiments.readme_pictures runs/upcycle/NAME/routing/MIXTURE

Writes `evolve_topology_front.png` and `evolve_topology_masks.png`, and prints what their captions need; of a routing
report, also one of `moe-jax inspect --text`, it writes `routing_specialisation.png`.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.topology_search import FRONTS
from moe_jax.report.pictures import plot_front, plot_masks, plot_specialisation
from moe_jax.runs import read_json, read_progress

RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or of a routing report")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the pictures go")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = read_json(arguments.run / "results.json")
    if "search" not in results:
        save(draw_specialisation(results["routing"]), arguments.out / "routing_specialisation.png")
        return
    status = read_progress(arguments.run).status
    if status != "finished":
        parser.error(f"{arguments.run} is {status}, not finished; continue it with --workdir {arguments.run} --resume")
    search = results["search"]
    with np.load(arguments.run / "traces" / "topologies.npz", allow_pickle=False) as topologies:
        masks = draw_masks(search, topologies["names"], topologies["keep"], topologies["num_choices"])
    for name, figure in (("front", draw_front(search)), ("masks", masks)):
        save(figure, arguments.out / f"evolve_topology_{name}.png")
    print(caption(search, read_json(arguments.run / "environment.json"), arguments.run))


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, whose dark ink would vanish in a reader's dark theme without a background of its own."""
    figure.savefig(path, dpi=160, facecolor="white")
    print(path)


def draw_specialisation(routing: dict[str, Any]) -> Figure:
    """Which experts serve which domain, of `results["routing"]` as `moe_jax.report` defines it."""
    domain_load = [layer["domain_load"] for layer in routing["layers"]]
    return plot_specialisation(np.array(domain_load, float), routing["domains"], num_choices=routing["num_choices"])


def draw_front(search: dict[str, Any]) -> Figure:
    """Fronts of all seeds, `results["search"]` as `moe_jax.report` defines it; the evolved one in colour.

    The reference point of the hypervolume lies far outside and would press the fronts together; the report shows it.
    """
    points: dict[str, list[list[float]]] = {}
    for entry in search["front"]:
        points.setdefault(entry["method"], []).extend(entry["points"])
    return plot_front(
        points,
        objectives=search["objectives"],
        full_model=search["full_model"],
        emphasised=FRONTS[:1],
    )


def draw_masks(search: dict[str, Any], names: np.ndarray, keep: np.ndarray, num_choices: np.ndarray) -> Figure:
    """Masks `[M, L, E]` of the methods that keep an equal number of experts; a front has no single mask."""
    compared = [method["name"] for method in search["methods"]]
    rows = [list(names).index(name) for name in compared if name in names]
    return plot_masks([str(names[row]) for row in rows], keep[rows], num_choices[rows])


def caption(search: dict[str, Any], environment: dict[str, Any], run: Path) -> str:
    """Device, versions, seeds and the command, in a sentence."""
    budget, packages = search["budget"], environment["packages"]
    return (
        f"{environment['cpu_count']} {environment['backend']} cores, Python {environment['python']}, "
        f"JAX {packages['jax']}; {budget['seeds']} seeds, {budget['evaluations']} evaluations per seed; "
        f"{budget['experts_kept']} of {budget['experts']} experts kept; "
        f"drawn by `python -m experiments.readme_pictures {run}`"
    )


if __name__ == "__main__":
    main()
