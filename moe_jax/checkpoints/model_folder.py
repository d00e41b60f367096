"""A model on disk, in our layout: `model.json` says what it is, `weights.safetensors` holds its parameters by path.

import   checkpoint of a family -> folder     one tensor at a time, into a file that is laid out beforehand
export   folder -> checkpoint of its family   one shard at a time
load     folder -> model                      one parameter at a time, onto any sharding
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.checkpoints.families import FAMILIES, Family, family_of
from moe_jax.checkpoints.hub.download import locate
from moe_jax.checkpoints.hub.gguf_llama import LlamaGGUF
from moe_jax.checkpoints.hub.gguf_tokenizer import tokenizer_files
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.table import Binding, bind, import_tensors
from moe_jax.checkpoints.hub.tensor_files import INDEX, Checkpoint, HubError, TensorFile, Tensors, TensorWriter
from moe_jax.models.config import DecoderConfig
from moe_jax.models.encoder_decoder_config import EncoderDecoderConfig
from moe_jax.models.structure import (
    Model,
    ModelConfig,
    array_shapes,
    fill_model,
    named_arrays,
    untrained_arrays,
)

FACTS, WEIGHTS = "model.json", "weights.safetensors"
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
SHARD_BYTES = 5_000_000_000
KINDS: dict[str, type[ModelConfig]] = {"decoder": DecoderConfig, "encoder_decoder": EncoderDecoderConfig}
ShardFn = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


class ModelFacts(NamedTuple):
    """What `model.json` holds.

    Attributes:
      config: the architecture.
      family: a name in `families.FAMILIES`, or "" for a model that came from no checkpoint.
      hub_config: the `config.json` that it came with.
      dtype: of the checkpoint's matrices, which an export writes again.
    """

    config: ModelConfig
    family: str = ""
    hub_config: Mapping[str, Any] = {}
    dtype: str = "float32"


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    on_tensor: Callable[[str, int], None] | None = None,
) -> ModelFacts:
    """Makes a model folder of a checkpoint; the folder appears whole or not at all.

    Args:
      source: a folder with `config.json` and safetensors files, or a `.gguf` file of the Llama architecture.
      out: the folder to make.
      dtype: of matrices in the folder; None keeps the checkpoint's. Routers and selection biases are float32.
      on_tensor: called with each tensor's name and how many there are.

    Raises:
      HubError: an existing `out`, an unknown family, or anything in the checkpoint that does not fit.
      CheckpointError: a damaged `.gguf` file, or one that is not understood.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise HubError(f"{out} exists already; delete it, or choose another folder")
    read, packed, side_files = _open(source)
    family = family_of(read)
    config = family.read(read)
    read.finish()
    tensors = family.open(packed, read.values)
    stored = _stored_dtype(read.values, packed)
    bindings = bindings_of(family, config)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.part")
    unfinished.mkdir(parents=True)
    try:
        writer = TensorWriter(unfinished / WEIGHTS, parameter_shapes(config, dtype or stored), {"format": "moe_jax"})
        given = untrained_arrays(config)
        for path, value in given.items():
            writer.arrays[path][...] = value
        for name in import_tensors(tensors, bindings, writer.arrays, given.keys(), family.ignored(config)):
            if on_tensor is not None:
                on_tensor(name, len(bindings))
        writer.close()
        facts = ModelFacts(config, family.name, read.values, stored)
        _write_facts(unfinished / FACTS, facts)
        for name, content in side_files.items():
            (unfinished / name).write_bytes(content)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return facts


def find_model(name: str | Path) -> Path:
    """The model folder of that name; a checkpoint is imported into the user's cache folder first.

    Args:
      name: a model folder, a checkpoint's folder, a `.gguf` file, or a name on the Hugging Face hub.

    Raises:
      HubError: as `locate` and `import_checkpoint`.
    """
    folder = locate(name)
    if (folder / FACTS).is_file():
        return folder
    files = [folder] if folder.is_file() else sorted([folder / "config.json", *folder.glob("*.safetensors")])
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "moe_jax" / "models"
    imported = cache / f"{folder.resolve().stem}-{digest}"
    if not imported.exists():
        import_checkpoint(folder, imported)
    return imported


def export_checkpoint(
    folder: str | Path, out: str | Path, *, family: str | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a model folder as a checkpoint that `transformers` opens; it appears whole or not at all.

    Args:
      folder: a model folder.
      out: the folder to make.
      family: a name in `FAMILIES`; None for the one that it came from, or else the first that can express it.
      shard_bytes: size from which on the tensors are cut into several files.

    Raises:
      HubError: an existing `out`, or a model that no family, or not the one asked for, can express.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise HubError(f"{out} exists already; delete it, or choose another folder")
    facts = read_facts(folder)
    chosen = _exporting_family(facts, family)
    hub_config = dict(facts.hub_config) if chosen.name == facts.family else chosen.write(facts.config)
    hub_config |= {"architectures": [chosen.architecture], "model_type": chosen.name, "dtype": facts.dtype}
    hub_config.pop("quantization_config", None)  # it is written unpacked
    weights = TensorFile(folder / WEIGHTS)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.part")
    unfinished.mkdir(parents=True)
    try:
        _write_shards(unfinished, bindings_of(chosen, facts.config), weights, np.dtype(facts.dtype), shard_bytes)
        (unfinished / "config.json").write_text(json.dumps(hub_config, indent=2) + "\n")
        for name, content in _side_files(folder).items():
            (unfinished / name).write_bytes(content)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_model(folder: str | Path, *, dtype: str | None = None, sharding: ShardFn | None = None, **changes: Any) -> Any:
    """Builds the model of a folder, a `Decoder` or an `EncoderDecoder`; each device reads its own part of the file.

    Args:
      folder: a model folder.
      dtype: of the matrices; None keeps the folder's. What is float32 for a reason, routers and balance, stays.
      sharding: from a parameter's path and shape to where it should lie; None for the default device.
      changes: fields of the config to change that change no parameter, such as `compute_dtype` or `backend`.

    Raises:
      HubError: no model folder, or a damaged one.
    """
    facts, weights = read_facts(folder), TensorFile(Path(folder) / WEIGHTS)
    config = dataclasses.replace(facts.config, **changes)
    targets = parameter_shapes(config, dtype or "float32")

    def array_of(path: str, leaf: nnx.Variable) -> jax.Array:
        if path not in weights.names() or weights.shape(path) != leaf.shape:
            raise HubError(f"{folder}/{WEIGHTS} has no {path} of shape {list(leaf.shape)}, which {FACTS} asks for")
        array = weights.read(path)
        target = array.dtype if dtype is None else targets[path].dtype
        return _put(array, target, None if sharding is None else sharding(path, array.shape))

    return fill_model(config, array_of)


def _put(array: np.ndarray, dtype: np.dtype, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """An array of the file on its device, or each part of it on its own."""
    if sharding is None:
        return jnp.array(array, dtype)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part].astype(dtype))


def save_model(model: Model, folder: str | Path, facts: ModelFacts | None = None) -> None:
    """Writes a model of our own as a model folder, which appears whole or not at all.

    Args:
      model: its parameters are written in their dtypes.
      folder: the folder to make.
      facts: where it came from, if from a checkpoint.

    Raises:
      HubError: an existing folder.
    """
    folder = Path(folder)
    if folder.exists():
        raise HubError(f"{folder} exists already; delete it, or choose another folder")
    flat = named_arrays(model)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    unfinished.mkdir(parents=True)
    try:
        writer = TensorWriter(unfinished / WEIGHTS, flat, {"format": "moe_jax"})
        for name, value in flat.items():
            writer.arrays[name][...] = np.asarray(value)
        writer.close()
        _write_facts(unfinished / FACTS, facts or ModelFacts(model.config))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_facts(folder: str | Path) -> ModelFacts:
    """What a model folder says about itself.

    Raises:
      HubError: no model folder, or one with a damaged `model.json`.
    """
    path = Path(folder) / FACTS
    if not path.is_file():
        raise HubError(f"{folder} is no model folder: it has no {FACTS}; make one with moe-jax import")
    try:
        facts = json.loads(path.read_bytes())
        kind = KINDS[facts["kind"]]
        config = kind(**{key: _hashable(value) for key, value in facts["config"].items()})
        return ModelFacts(config, facts["family"], facts["hub_config"], facts["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(f"{path} is damaged ({error}); import the model again") from error


def bindings_of(family: Family, config: ModelConfig) -> list[Binding]:
    """Every tensor of a checkpoint with its place in ours."""
    runs = enumerate(config.runs if isinstance(config, DecoderConfig) else [])
    place = {layer: (f"stacks/{stack}", layer - run.start) for stack, (_, run) in runs for layer in run}
    return list(bind(family.table(config), place))


def parameter_shapes(config: ModelConfig, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a model's arrays by path: `dtype` for all but routers and what is not trained."""
    shapes = {}
    for path, leaf in array_shapes(config).items():
        keeps = "/router/" in path or not isinstance(leaf, nnx.Param)
        shapes[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if keeps else jnp.dtype(dtype))
    return shapes


def _open(source: Path) -> tuple[HubConfig, Tensors, dict[str, bytes]]:
    """A checkpoint's config, its tensors, and the files of its tokenizer."""
    if source.suffix != ".gguf":
        return HubConfig.load(source / "config.json"), Checkpoint(source), _side_files(source)
    gguf = LlamaGGUF(source)
    return HubConfig(gguf.config, str(source)), gguf, tokenizer_files(gguf.file)


def _side_files(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer."""
    return {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}


def _hashable(value: Any) -> Any:
    """JSON's lists as tuples, within mappings too."""
    if isinstance(value, dict):
        return {key: _hashable(item) for key, item in value.items()}
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _write_facts(path: Path, facts: ModelFacts) -> None:
    config = {}
    for field in dataclasses.fields(facts.config):
        value = getattr(facts.config, field.name)
        config[field.name] = dict(value) if isinstance(value, Mapping) else value
    kind = next(name for name, kind in KINDS.items() if isinstance(facts.config, kind))
    text = {
        "kind": kind,
        "config": config,
        "family": facts.family,
        "hub_config": dict(facts.hub_config),
        "dtype": facts.dtype,
    }
    path.write_text(json.dumps(text, indent=2) + "\n")


def _stored_dtype(hub_config: Mapping[str, Any], packed: Tensors) -> str:
    """The dtype that the checkpoint's config names, or that of most of its numbers but for those that are packed."""
    sizes = {"float32": 0, "bfloat16": 0, "float16": 0}
    named = hub_config.get("dtype") or hub_config.get("torch_dtype")
    if named in list(sizes):
        return named
    for name in packed.names():
        key = str(packed.read(name).dtype)
        if key in sizes:
            sizes[key] += math.prod(packed.shape(name))
    return max(sizes, key=lambda key: sizes[key])


def _exporting_family(facts: ModelFacts, name: str | None) -> Family:
    """The family to write; every family refuses what it cannot express by reading back what it would write."""
    name = name or facts.family
    if name and name not in FAMILIES:
        raise HubError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    reasons = {}
    for family in [FAMILIES[name]] if name else FAMILIES.values():
        if reason := family.refuses(facts.config):
            reasons[family.name] = reason
        else:
            return family
    listed = "; ".join(f"{family}: {reason}" for family, reason in reasons.items())
    raise HubError(f"no checkpoint can express this model: {listed}")


def _write_shards(
    folder: Path, bindings: list[Binding], weights: TensorFile, dtype: np.dtype, shard_bytes: int
) -> None:
    """Writes the tensors into files of about `shard_bytes`, with an index if there are several."""
    shapes = {}
    for binding in bindings:
        exported = binding.export(weights.read(binding.path))
        own = np.dtype(np.float32) if binding.entry.is_float32 else dtype
        shapes[binding.theirs] = jax.ShapeDtypeStruct(exported.shape, own)
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for name, shape in shapes.items():
        own = math.prod(shape.shape) * shape.dtype.itemsize
        if shards[-1] and size + own > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += own
    by_name = {binding.theirs: binding for binding in bindings}
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    for file, shard in zip(names, shards, strict=True):
        writer = TensorWriter(folder / file, shard)
        for name, target in writer.arrays.items():
            target[...] = by_name[name].export(weights.read(by_name[name].path))
        writer.close()
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(math.prod(shape.shape) * shape.dtype.itemsize for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
