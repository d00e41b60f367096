import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.checkpoints import CheckpointError, CheckpointStore
from moe_jax.types import Topology

ROOT = pathlib.Path(__file__).parent.parent


class State(NamedTuple):
    step: jax.Array
    params: dict


def make_tree(scale: float = 1.0) -> State:
    """A tree with every kind of leaf that a run saves."""
    params = {
        "w": jnp.arange(12.0).reshape(3, 4) * scale,
        "half": jnp.arange(5, dtype=jnp.bfloat16) * scale,
        "ids": (jnp.arange(3), np.arange(4, dtype=np.int64)),
        "topology": Topology(jnp.ones((2, 1, 4), bool), jnp.full((2, 1), 2)),
        "keys": jax.random.split(jax.random.key(7), 3),
        "nothing": None,
        "empty": jnp.zeros((0, 3)),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf]),
    }
    return State(jnp.int32(5), params)


def assert_same(left, right):
    """Equal structure, types and bits; NaN payloads and the sign of zero count."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and isinstance(a, np.ndarray) == isinstance(b, np.ndarray)
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_tree_comes_back_bit_for_bit(tmp_path, is_async):
    tree = make_tree()
    with CheckpointStore(tmp_path / "deep" / "checkpoints", is_async=is_async) as store:
        assert store.latest_step() is None
        store.save(5, tree, {"note": "five"})
        store.wait()
        assert_same(store.restore(5, make_tree(0.0)), tree)
    with CheckpointStore(tmp_path / "deep" / "checkpoints") as store:
        abstract = jax.tree.map(
            lambda x: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype), tree
        )
        assert_same(store.restore(store.latest_step(), abstract), tree)
        assert store.read_metadata(5) == {"note": "five"}
        assert (store.path(5)).is_dir()


def test_an_nnx_state_and_a_sharded_array(tmp_path):
    state = nnx.split(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))[1]
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
    tree = {"model": state, "experts": jax.device_put(jnp.arange(8.0), sharding)}
    with CheckpointStore(tmp_path) as store:
        store.save(0, tree)
        store.wait()
        restored = store.restore(0, jax.tree.map(jnp.zeros_like, tree))
    assert_same(restored, tree)
    assert restored["experts"].sharding == sharding


def test_the_newest_are_kept(tmp_path):
    with CheckpointStore(tmp_path, max_to_keep=2) as store:
        for step in (3, 10, 200):
            store.save(step, {"x": jnp.full(2, float(step))})
        store.wait()
        assert store.steps() == [10, 200] and store.latest_step() == 200
        np.testing.assert_array_equal(store.restore(10, {"x": jnp.zeros(2)})["x"], [10, 10])
        with pytest.raises(CheckpointError, match="no checkpoint of step 3; it has: 10, 200"):
            store.restore(3, {"x": jnp.zeros(2)})
        with pytest.raises(CheckpointError, match="exists already"):
            store.save(10, {"x": jnp.zeros(2)})
        for step in (300, 400, 500):
            store.save(step, {"x": jnp.zeros(2)})
        store.wait()
        assert len(list((tmp_path / "deleted").iterdir())) == 1, "what is deleted must not fill the disk"


def test_donating_right_after_an_async_save_does_not_reach_the_checkpoint(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"w": jnp.zeros((400, 1000)), "v": jnp.zeros(7)}
    with CheckpointStore(tmp_path, max_to_keep=10) as store:
        for step in range(6):
            store.save(step, tree)
            for _ in range(5):
                tree = advance(tree)
        store.wait()
        for step in range(6):
            restored = store.restore(step, tree)
            assert all((leaf == 5.0 * step).all() for leaf in jax.tree.leaves(restored))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": np.zeros(3), "b": np.zeros(2)}, r"a is float64\[2\], expected float64\[3\]"),
        ({"a": np.zeros(2, np.float32), "b": np.zeros(2)}, r"a is float64\[2\], expected float32\[2\]"),
        ({"a": np.zeros(2), "c": np.zeros(2)}, "it holds b, which is not asked for; it lacks c"),
        ({"a": np.zeros(2), "b": {"x": np.zeros(2)}}, "it lacks b/x"),
    ],
)
def test_a_tree_that_does_not_fit_is_named(tmp_path, like, message):
    with CheckpointStore(tmp_path) as store:
        store.save(0, {"a": np.zeros(2), "b": np.zeros(2)})
        store.wait()
        with pytest.raises(CheckpointError, match=message):
            store.restore(0, like)


def test_only_arrays(tmp_path):
    with CheckpointStore(tmp_path) as store, pytest.raises(TypeError, match="leaf 'a/0' is float, not an array"):
        store.save(0, {"a": [1.0]})


def test_half_written_checkpoints_are_ignored_and_removed(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"x": jnp.ones(2)})
    half = tmp_path / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", half)
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


# Orbax prints tracebacks of its threads when it meets damage, so each attempt gets a process of its own.
RESTORE = """
import sys
import numpy as np
from moe_jax.checkpoints import CheckpointError, CheckpointStore
with CheckpointStore(sys.argv[1]) as store:
    for line in sys.stdin:
        try:
            store.restore(7, {"x": np.zeros((50, 100), np.float32)})
            print("restored", flush=True)
        except CheckpointError as error:
            print(error, flush=True)
"""


def test_damage_is_found_and_named(tmp_path):
    value = np.random.default_rng(0).normal(size=(50, 100)).astype(np.float32)
    with CheckpointStore(tmp_path, is_async=False) as store:
        store.save(3, {"x": value})
        store.save(7, {"x": value})
    files = [path for path in (tmp_path / "7").rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    facts = next(path for path in files if path.parent.name == "facts" and "digest" in path.read_text())
    process = subprocess.Popen(
        [sys.executable, "-c", RESTORE, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def outcome() -> str:
        process.stdin.write("again\n")
        process.stdin.flush()
        return process.stdout.readline()

    assert outcome() == "restored\n"
    for path in (data, facts):
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 16
        for bad in (bytes(flipped), good[: len(good) // 2]):
            path.write_bytes(bad)
            assert outcome().startswith(f"checkpoint {tmp_path / '7'} is damaged (")
        path.write_bytes(good)
    assert outcome() == "restored\n"
    data.unlink()
    assert outcome().endswith("delete that folder to go on from step 3\n")
    process.communicate()


# A process whose files may have at most 100 kB stands for a disk that fails in the midst of a save.
FAIL = """
import resource, sys
import numpy as np
from moe_jax.checkpoints import CheckpointError, CheckpointStore
with CheckpointStore(sys.argv[1]) as store:
    store.save(1, {"x": np.zeros(5)})
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        store.save(2, {"x": np.random.default_rng(0).normal(size=200_000)})
        store.wait()
    except CheckpointError as error:
        print(error)
"""


def test_a_write_that_fails_is_told_and_leaves_the_checkpoint_before(tmp_path):
    command = [sys.executable, "-c", FAIL, str(tmp_path)]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.stdout.startswith(f"a checkpoint could not be written to {tmp_path} ("), result.stderr
    assert "it goes on from the last checkpoint" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


# Forked writers of one process that has imported everything: each dies at a random moment of its saves.
WRITE = """
import os, pathlib, random, signal, sys, time
import numpy as np
import orbax.checkpoint
from moe_jax.checkpoints import CheckpointStore
folder = pathlib.Path(sys.argv[1])
delays = random.Random(0)

def write():
    with CheckpointStore(folder, max_to_keep=2, is_async=False) as store:
        latest = store.latest_step()
        if latest is not None:
            x = store.restore(latest, {"x": np.zeros(20000)})["x"]
            assert (x == latest).all() and store.read_metadata(latest) == {"step": latest}
        while True:
            latest = -1 if latest is None else latest
            latest += 1
            store.save(latest, {"x": np.full(20000, float(latest))}, {"step": latest})

deaths = 0
for attempt in range(8):
    child = os.fork()
    if child == 0:
        try:
            write()
        finally:
            os._exit(1)
    time.sleep(delays.uniform(0.3, 0.8))
    os.kill(child, signal.SIGKILL)
    deaths += os.waitpid(child, 0)[1] == signal.SIGKILL
print(deaths)
"""


def test_kill_9_while_saving_leaves_a_good_checkpoint(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", WRITE, str(tmp_path)]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    # A writer that finds a bad checkpoint ends with code 1 instead of the signal.
    assert result.stdout.split() == ["8"], result.stderr
    assert "Traceback" not in result.stderr and "WARNING" not in result.stderr
    with CheckpointStore(tmp_path) as store:
        latest = store.latest_step()
        assert latest > 3
        np.testing.assert_array_equal(store.restore(latest, {"x": np.zeros(20000)})["x"], np.full(20000, latest))
