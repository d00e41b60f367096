"""`moe-jax generate MODEL`: continues prompts, or answers them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.cli.tokenizer import open_model_tokenizer
from moe_jax.runs import ConfigError

if TYPE_CHECKING:
    import jax

    from moe_jax.data.tokenizer import TextTokenizer
    from moe_jax.models.encoder_decoder import EncoderDecoder
    from moe_jax.models.generate import Generator


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the sub-command to the parser."""
    parser = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continues a prompt as the text comes, or every line of a file as a batch. The model is a model "
        "folder, a checkpoint's folder, a GGUF file, or a name on the Hugging Face hub; what is no model folder yet is "
        "imported into the user's cache folder first.",
        epilog='examples:\n  moe-jax generate models/olmoe --prompt "Once upon a time" --temperature 0.8 --top-p 0.95\n'
        '  moe-jax generate models/smollm2 --chat --prompt "Why is the sky blue?" --max-tokens 200\n'
        "  moe-jax generate models/olmoe --prompts lines.txt --out texts.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder, a checkpoint, a .gguf file, or org/model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="the text to continue; - reads it from standard input")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="a file of prompts, one a line, done as one batch")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where a batch goes, as JSON lines (default: shown)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="new tokens at most (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="keep the likeliest that sum to X")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="keep the N likeliest (default: all)")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="X", help="keep those with X times the top one's")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 repeats less")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="to compute in (default: float32 on a CPU)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Generates; texts on standard output, figures on standard error."""
    import jax

    from moe_jax.checkpoints.model_folder import find_model, load_model
    from moe_jax.models.encoder_decoder import EncoderDecoder
    from moe_jax.models.generate import Generator
    from moe_jax.models.sampling import Sampling

    try:
        sampling = Sampling(
            arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p, arguments.repetition_penalty
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    folder = find_model(arguments.model)
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    model = load_model(folder, dtype=dtype, compute_dtype=dtype)
    tokenizer = open_model_tokenizer(folder, model.config.vocab_size)
    prompts = [_encode(tokenizer, text, arguments) for text in _texts(arguments)]
    request = {
        "max_tokens": arguments.max_tokens,
        "sampling": sampling,
        "stop_tokens": tokenizer.stop_ids,
        "seed": arguments.seed,
    }
    try:
        if isinstance(model, EncoderDecoder):
            _show(tokenizer, prompts, _write_targets(model, prompts, request), arguments)
            return
        generator = Generator(model)
        del model  # the generator has laid its weights out anew
        if arguments.prompts is None:
            _stream(generator, tokenizer, prompts[0], request)
        else:
            made = generator.generate(prompts, **request)
            _show(tokenizer, prompts, made.tokens, arguments)
            rates = (made.prefill_tokens_per_second, made.decode_tokens_per_second)
            print("[{:.0f} prompt tokens/s, {:.1f} new tokens/s, compilation included]".format(*rates), file=sys.stderr)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _texts(arguments: argparse.Namespace) -> list[str]:
    """The prompts."""
    if arguments.prompts is None:
        return [sys.stdin.read() if arguments.prompt == "-" else arguments.prompt]
    if not arguments.prompts.is_file():
        raise ConfigError(f"{arguments.prompts} is no file: give one with a prompt in each line")
    texts = [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ConfigError(f"{arguments.prompts} has no prompts: put one into each line")
    return texts


def _encode(tokenizer: TextTokenizer, text: str, arguments: argparse.Namespace) -> list[int]:
    """The prompt's token ids."""
    if not arguments.chat:
        return tokenizer.encode(text)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    try:
        chat = tokenizer.apply_chat_template([*system, {"role": "user", "content": text}])
    except (ValueError, ImportError) as error:
        raise ConfigError(str(error)) from error
    return tokenizer.encode(chat, add_special_tokens=False)


def _stream(generator: Generator, tokenizer: TextTokenizer, prompt: list[int], request: dict) -> None:
    """Prints a text as it comes."""
    text, seconds, count = tokenizer.stream(), [], 0
    for chunk in generator.stream([prompt], **request):
        print("".join(text.push(token) for token in chunk.tokens[0]), end="", flush=True)
        seconds.append(chunk.seconds)
        count += len(chunk.tokens[0])
    print(text.finish(), flush=True)
    # The first chunk of each program waits for its compilation.
    steady = sum(seconds[2:])
    rate = f", {(count - 17) / steady:.1f} tokens/s once compiled" if steady else ""
    print(f"[{len(prompt)} + {count} tokens, first after {seconds[0]:.1f} s{rate}]", file=sys.stderr)


def _show(
    tokenizer: TextTokenizer, prompts: list[list[int]], made: list[list[int]], arguments: argparse.Namespace
) -> None:
    """Writes or prints the texts of a batch."""
    texts = [tokenizer.decode(tokens) for tokens in made]
    if arguments.out is None:
        print("\n---\n".join(texts))
    else:
        lines = [
            json.dumps({"prompt": tokenizer.decode(p), "text": text, "tokens": len(tokens)}, ensure_ascii=False)
            for p, text, tokens in zip(prompts, texts, made, strict=True)
        ]
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(arguments.out)
    print(f"[{len(prompts)} texts, {sum(map(len, made))} new tokens]", file=sys.stderr)


def _write_targets(model: EncoderDecoder, prompts: list[list[int]], request: dict) -> list[list[int]]:
    """What an encoder-decoder writes for each source."""
    import jax
    import numpy as np

    from moe_jax.models.generate_target import generate_target
    from moe_jax.models.sampling import next_tokens

    settings = request["sampling"].settings
    if "repetition_penalty" in settings:
        raise ValueError("--repetition-penalty is for decoders: leave it out for this encoder-decoder")
    source = np.full((len(prompts), max(map(len, prompts))), model.config.pad_id, np.int32)
    mask = np.arange(source.shape[1])[None, :] < np.array([len(prompt) for prompt in prompts])[:, None]
    for row, prompt in zip(source, prompts, strict=True):
        row[: len(prompt)] = prompt

    def sample(logits: jax.Array, key: jax.Array) -> jax.Array:
        return next_tokens(logits, settings, jax.random.split(key, len(logits)), None)

    made = generate_target(
        model,
        jax.numpy.asarray(source),
        jax.numpy.asarray(mask),
        max_tokens=request["max_tokens"],
        stop_ids=request["stop_tokens"] or None,
        sample=sample,
        key=jax.random.key(request["seed"]),
    )
    return [row[1:length].tolist() for row, length in zip(np.asarray(made.tokens), made.lengths.tolist(), strict=True)]
