"""Parts of `results.json` for any experiment with a trained decoder; the package docstring has the schema."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from moe_jax.data import Document, describe_splits
from moe_jax.models.config import DecoderConfig
from moe_jax.models.cost import model_cost
from moe_jax.trees import count_parameters


def describe_data(splits: Mapping[str, Sequence[Document]]) -> dict[str, Any]:
    """Bytes and documents by split, origin and digests.

    Args:
      splits: documents by split, as `data.split_documents` makes them.
    """
    described = describe_splits(splits)
    domains = described["domains"]
    return {
        "description": [
            "Documents were split before anything else; a long line that occurs in two documents stays in one only.",
            f"The domain python is read from the standard library of Python {described['python']}.",
        ],
        **{
            field: {split: {name: domain[field][split] for name, domain in domains.items()} for split in splits}
            for field in ("bytes", "documents")
        },
        "sources": [{"domain": name, "licence": domain["licence"] or "your own"} for name, domain in domains.items()],
        "digests": {name: domain["sha256"] for name, domain in domains.items()},
    }


def describe_model(config: DecoderConfig, state: nnx.State) -> dict[str, Any]:
    """Sizes of a model; a token's active parameters leave out the experts it does not use.

    Args:
      config: the architecture.
      state: its parameters, and whatever else.
    """
    return {
        "parameters_total": count_parameters(nnx.filter_state(state, nnx.Param)),
        "parameters_active": round(model_cost(config, 1).active_parameters),
        "layers": " ".join(config.layers),
        "num_experts": config.num_experts,
        "num_choices": config.num_choices,
    }


def summarise_search(
    search: Mapping[str, Any], evolved: str, bits: Mapping[str, Any], baseline: Mapping[str, float]
) -> list[str]:
    """The result in sentences, ties and losses included.

    Args:
      search: `results["search"]`.
      evolved: name of the evolved method that was chosen.
      bits: the untouched model's bits per byte on the test split.
      baseline: the n-gram's.
    """
    chosen = next(method for method in search["methods"] if method["name"] == evolved)
    against: dict[str, list[str]] = {}
    for row in chosen["comparisons"]:
        against.setdefault(row["verdict"], []).append(row["against"])
    words = {"better": "better than", "tie": "a tie with", "worse": "worse than", "unknown": "not comparable with"}
    verdicts = "; ".join(f"{words[kind]} {', '.join(names)}" for kind, names in against.items())
    budget = search["budget"]
    return [
        f"The model needs {bits['all']:.3f} bits per byte on the test split; a byte 5-gram trained on "
        f"the same text needs {baseline['all']:.3f}.",
        f"With {budget['experts_kept']} of {budget['experts']} experts kept, {evolved} loses "
        f"{chosen['delta_vs_full']['estimate']:.3f} bits per byte against the untouched model. "
        f"On the test split it is {verdicts}.",
    ]
