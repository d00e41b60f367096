"""`moe-jax import HF_DIR_OR_ID OUT`: makes a model folder of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_jax.runs.bars import bar, progress_display


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the sub-command to the parser."""
    parser = commands.add_parser(
        "import",
        help="make a model folder of a public checkpoint",
        description="Makes a model folder of a checkpoint in the format of transformers: a folder, or a name on the "
        "Hugging Face hub, which is downloaded first; or of a .gguf file of the Llama architecture. Tensors are read "
        "one at a time, and nothing is ever unpickled.",
        epilog="examples:\n  moe-jax import downloads/OLMoE-1B-7B models/olmoe\n"
        "  moe-jax import mistralai/Mixtral-8x7B-v0.1 models/mixtral --dtype bfloat16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="HF_DIR_OR_ID", help="a folder with config.json, a .gguf file, or org/model")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the matrices (default: the checkpoint's)"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Imports, with a bar, and says what came."""
    # Only here, since loading JAX takes longer than the other commands.
    from moe_jax.checkpoints.hub.download import locate
    from moe_jax.checkpoints.model_folder import import_checkpoint
    from moe_jax.models.description import model_size

    source = locate(arguments.source, revision=arguments.revision)
    with progress_display() as display, bar(display, "tensors", 0) as progress:

        def on_tensor(name: str, total: int) -> None:
            display.update(progress.task, total=total)
            progress.advance()

        facts = import_checkpoint(source, arguments.out, dtype=arguments.dtype, on_tensor=on_tensor)
    size = model_size(facts.config)
    print(
        f"{arguments.out}: {facts.family}, {size.parameters:,} parameters, {size.active:,} active; "
        f"look at it with: moe-jax inspect {arguments.out}"
    )
