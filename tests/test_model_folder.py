"""Model folders without torch: writing, reading, exporting our own models, sharding, memory, hostile configs."""

import copy
import dataclasses
import json
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_jax.checkpoints.families import family_of
from moe_jax.checkpoints.families.mixtral import MIXTRAL
from moe_jax.checkpoints.hub.hub_config import HubConfig
from moe_jax.checkpoints.hub.tensor_files import Checkpoint, HubError, TensorWriter
from moe_jax.checkpoints.model_folder import export_checkpoint, import_checkpoint, load_model, read_facts, save_model
from moe_jax.cli import main
from moe_jax.models.config import DecoderConfig
from moe_jax.models.decoder import Decoder

from .hub_configs_deepseek import CONFIGS
from .hub_configs_mixtral import HUB_CONFIGS

PUBLISHED = {name: row[0] for name, row in {**HUB_CONFIGS, **CONFIGS}.items()}
TINY = DecoderConfig(
    vocab_size=32, width=16, layers=("moe", "moe"), num_heads=2, num_kv_heads=1, num_experts=4, expert_hidden=8
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Our own model, written as a model folder."""
    path = tmp_path_factory.mktemp("models") / "ours"
    save_model(Decoder(TINY, key=jax.random.key(0)), path)
    return path


def arrays(model):
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def equal(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_what_is_saved_is_loaded(folder):
    model = load_model(folder, compute_dtype="bfloat16")
    equal(arrays(model), arrays(Decoder(TINY, key=jax.random.key(0))))
    assert model.config == dataclasses.replace(TINY, compute_dtype="bfloat16")
    assert read_facts(folder).config == TINY


def test_our_own_model_is_exported_and_comes_back_bit_for_bit(folder, tmp_path):
    export_checkpoint(folder, tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "mixtral"
    import_checkpoint(tmp_path / "theirs", tmp_path / "back")
    equal(arrays(load_model(tmp_path / "back")), arrays(load_model(folder)))


def test_a_model_that_no_family_expresses_says_why(tmp_path):
    save_model(Decoder(dataclasses.replace(TINY, context=1), key=jax.random.key(0)), tmp_path / "ours")
    with pytest.raises(HubError, match=r"no checkpoint can express this model: .*mixtral: context=1 would become 0"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_device_holds_its_part(folder):
    mesh = Mesh(np.array(jax.devices()[:4]), ("expert",))

    def sharding(path, shape):
        return NamedSharding(mesh, P(None, "expert") if path.endswith(("experts/w_in", "experts/w_out")) else P())

    model = load_model(folder, sharding=sharding)
    w_in = model.stacks[0].feed_forward.experts.w_in[...]
    assert {shard.data.shape for shard in w_in.addressable_shards} == {(2, 1, 16, 16)}
    equal(arrays(model), arrays(load_model(folder)))


def test_a_cast_on_the_way_keeps_the_router(folder, tmp_path):
    export_checkpoint(folder, tmp_path / "theirs")
    import_checkpoint(tmp_path / "theirs", tmp_path / "half", dtype="bfloat16")
    half = load_model(tmp_path / "half")
    assert half.embedding[...].dtype == jnp.bfloat16
    assert half.stacks[0].feed_forward.router.kernel[...].dtype == jnp.float32
    tokens = jnp.arange(6)[None]
    np.testing.assert_allclose(half(tokens)[0], load_model(folder)(tokens)[0], atol=0.1)


_MEASURE = """
import resource, sys
import numpy as np
from moe_jax.checkpoints.hub.tensor_files import TensorWriter
from moe_jax.checkpoints.model_folder import import_checkpoint
import jax; jax.numpy.zeros(1).block_until_ready()
import_checkpoint(sys.argv[1], sys.argv[2])  # the small one warms everything up
anonymous = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
import threading
peak, done = [anonymous()], threading.Event()
def watch():
    while not done.wait(0.002):
        peak.append(anonymous())
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
import_checkpoint(sys.argv[3], sys.argv[4])
done.set(); thread.join()
print(max(peak) - before)
"""


def test_memory_stays_below_the_largest_tensor(folder, tmp_path):
    """256 MiB of experts in tensors of 16 MiB: what is not mapped from a file grows by no more than 1.2 tensors."""
    export_checkpoint(folder, tmp_path / "small")
    config = dataclasses.replace(TINY, width=1024, expert_hidden=4096, num_experts=2, layers=("moe",) * 4)
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_text(json.dumps(MIXTRAL.write(config) | {"model_type": "mixtral"}))
    from moe_jax.checkpoints.model_folder import bindings_of, parameter_shapes

    ours, shapes = parameter_shapes(config, "float32"), {}
    for binding in bindings_of(MIXTRAL, config):
        shapes[binding.theirs] = jax.eval_shape(lambda b=binding: b.export(np.zeros(ours[b.path].shape, bool)))
    largest = 4 * max(np.prod(shape.shape) for shape in shapes.values())
    TensorWriter(
        big / "model.safetensors", {name: jax.ShapeDtypeStruct(s.shape, np.float32) for name, s in shapes.items()}
    ).close()
    paths = [tmp_path / "small", tmp_path / "one", big, tmp_path / "two"]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, paths)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 1.2 * largest


def test_a_kill_leaves_no_half_folder(folder, tmp_path, monkeypatch):
    export_checkpoint(folder, tmp_path / "theirs")

    def stop(name, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(tmp_path / "theirs", tmp_path / "out", on_tensor=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@pytest.fixture(scope="module")
def theirs(folder, tmp_path_factory):
    """The same model as a checkpoint."""
    path = tmp_path_factory.mktemp("models") / "theirs"
    export_checkpoint(folder, path)
    return path


def altered(theirs, tmp_path, drop=(), add=None, reshape=None):
    """The checkpoint with other tensors."""
    source, out = Checkpoint(theirs), tmp_path / "altered"
    out.mkdir()
    (out / "config.json").write_bytes((theirs / "config.json").read_bytes())
    tensors = {name: source.read(name) for name in source.names() if name not in drop} | (add or {})
    tensors |= {name: tensors[name].reshape(shape) for name, shape in (reshape or {}).items()}
    writer = TensorWriter(out / "model.safetensors", tensors)
    for name, value in tensors.items():
        writer.arrays[name][...] = value
    writer.close()
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["model.norm.weight"]}, "lacks tensor 'model.norm.weight'"),
        ({"add": {"model.extra": np.zeros(3)}}, r"1 tensors that its config does not account for: \['model.extra'\]"),
        ({"reshape": {"lm_head.weight": (16, 32)}}, r"'lm_head.weight' has shape \[16, 32\], the config asks for \[32"),
    ],
)
def test_tensors_that_do_not_fit(theirs, tmp_path, change, message):
    with pytest.raises(HubError, match=message):
        import_checkpoint(altered(theirs, tmp_path, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "many"}, "'hidden_size' must be of type int, got 'many'"),
        ({"hidden_size": True}, "'hidden_size' must be of type int, got True"),
        ({"hidden_size": 2**60}, "'hidden_size' must be in"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' must be in"),
        ({"num_local_experts": -4}, "'num_local_experts' must be in"),
        ({"num_experts_per_tok": 9}, "num_choices must be in"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported for this family; known: 'silu'"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"attention_sink_strength": 2}, "says attention_sink_strength=2, which this import does not know"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rotary positions of type 'spiral' are not supported"),
        ({"rope_parameters": {"rope_type": "linear", "wobble": 3}}, "parameter wobble=3 of 'linear' rotary"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; known: "),
    ],
)
def test_configs_that_cannot_be_meant(theirs, change, message):
    hub = HubConfig(json.loads((theirs / "config.json").read_text()) | change)
    with pytest.raises(ValueError, match=message):
        family = family_of(hub)
        family.read(hub)
        hub.finish()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_place_of_a_config_is_read_or_refused(data):
    """No other exception, no hanging, no memory for absurd sizes: nothing is allocated before the config is checked."""
    values = copy.deepcopy(PUBLISHED[data.draw(st.sampled_from(sorted(PUBLISHED)))])
    places = [values, *(inner for inner in values.values() if isinstance(inner, dict))]
    place = data.draw(st.sampled_from(places))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(_JSON)
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        hub = HubConfig(values)
        family_of(hub).read(hub)
    except ValueError as error:
        assert str(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit < 500_000  # KiB


def test_commands(theirs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["import", str(theirs), "models/one"]) == 0
    assert "mixtral" in (shown := capsys.readouterr().out) and "moe-jax inspect models/one" in shown
    for model in ("models/one", str(theirs)):
        assert main(["inspect", model]) == 0
        assert "2 of 4 in a layer" in capsys.readouterr().out
    assert main(["export", "models/one", "out"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    for arguments, message in (
        (["import", str(theirs), "models/one"], "models/one exists already"),
        (["import", "nowhere", "models/two"], "nowhere is neither a folder, nor a .gguf file, nor a name"),
        (["inspect", str(tmp_path)], "config.json does not exist"),
        (["export", str(tmp_path), "x"], "is no model folder"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_generate_and_inspect_a_text(tmp_path, capsys, monkeypatch):
    """Models of bytes need no tokenizer; texts, figures and the report come out."""
    monkeypatch.chdir(tmp_path)
    save_model(Decoder(dataclasses.replace(TINY, vocab_size=256), key=jax.random.key(0)), "bytes")
    settings = ["--max-tokens", "20", "--temperature", "0.9", "--top-k", "50", "--seed", "3"]
    shown = []
    for _ in range(2):
        assert main(["generate", "bytes", "--prompt", "Once", *settings]) == 0
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out and "[4 + 20 tokens" in shown[0].err
    (tmp_path / "lines.txt").write_text("Once upon\n\nTwo\n")
    assert main(["generate", "bytes", "--prompts", "lines.txt", "--out", "texts.jsonl", *settings]) == 0
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Once upon", "Two"] and {row["tokens"] for row in rows} == {20}
    capsys.readouterr()
    assert main(["inspect", "bytes", "--text", "lines.txt"]) == 0
    report = capsys.readouterr().out.splitlines()[-1]
    assert report == "bytes/routing/report.html" and "How bytes routes" in (tmp_path / report).read_text()
    for arguments, message in (
        (["generate", "bytes", "--prompt", "x", "--top-p", "2"], "top_p=2.0 must be in"),
        (["generate", "bytes", "--prompt", "x", "--chat"], "has no chat template"),
        (["generate", "bytes", "--prompt", ""], "prompt 0 is empty"),
        (["generate", "bytes", "--prompts", "none.txt"], "none.txt is no file"),
        (["inspect", "bytes", "--text", "none.txt"], "none.txt is no file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
