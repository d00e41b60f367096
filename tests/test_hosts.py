"""Several processes on this machine as hosts: how they meet, what they agree on, and a state that changes meshes."""

import json
import socket
import threading
import time

import jax
import numpy as np
import pytest

from moe_jax.checkpoints import CheckpointStore
from moe_jax.checkpoints.digest import digest_arrays
from moe_jax.hosts import HostsError, any_host, gather_texts, initialize_hosts, is_first_host, num_hosts
from tests.hosts_program import finish, free_port


def outcomes(*places: str, timeout: float = 2.0, port: int | None = None) -> list[str]:
    """What hosts that cannot come together are told; their threads stand for processes, since none reaches JAX."""
    port = port or free_port()
    told = [""] * len(places)

    def meet(number: int) -> None:
        with pytest.raises(HostsError) as caught:
            initialize_hosts(f"127.0.0.1:{port},{places[number]}", timeout)
        told[number] = str(caught.value)

    threads = [threading.Thread(target=meet, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return told


def test_one_host_is_the_first_and_agrees_with_itself():
    assert is_first_host() and num_hosts() == 1
    assert gather_texts("é") == ["é"] and any_host(True) and not any_host(False)


@pytest.mark.parametrize("hosts", ["here", "a:b,2,0", "localhost:1234,2", "localhost:1234,2,2", "localhost:99999,2,0"])
def test_what_does_not_name_a_host_is_refused(hosts):
    with pytest.raises(HostsError, match="--hosts=ADDRESS:PORT,COUNT,INDEX"):
        initialize_hosts(hosts)


def test_auto_wants_a_cluster():
    with pytest.raises(HostsError, match="found no cluster"):
        initialize_hosts("auto")


def test_a_first_host_that_is_not_there():
    start = time.monotonic()
    (told,) = outcomes("2,1")
    assert "host 1 of 2 cannot reach host 0 at 127.0.0.1" in told and "index 0" in told
    assert 2 <= time.monotonic() - start < 10


def test_hosts_that_do_not_come_are_named():
    told = outcomes("4,0", "4,2")
    assert all("of 4 hosts these did not come in time: 1, 3" in line for line in told)


def test_different_counts_and_equal_indices_are_named():
    told = outcomes("3,0", "4,3", timeout=20.0)
    assert all("host 0 was started as one of 3 hosts, host 3 as one of 4" in line for line in told)
    told = outcomes("3,0", "3,1", "3,1", timeout=20.0)
    assert all("two hosts were started with index 1" in line for line in told)


def test_a_port_that_something_else_has():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            other, _ = server.accept()
            other.recv(100)
            other.close()

        threading.Thread(target=answer).start()
        assert "is another program running on that port" in outcomes("2,1", port=port)[0]
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        assert "choose another port" in outcomes("2,0", port=server.getsockname()[1])[0]


def slow_sum(array: np.ndarray) -> int:
    """The digest's sum, word by word."""

    def factor(axis: int, index: int) -> int:
        state = (index + 1 + (axis << 40)) * 0x9E3779B97F4A7C15 % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return (state ^ (state >> 31)) | 1

    words = array.view(f"u{min(array.itemsize, 4)}")
    total = 0
    for index in np.ndindex(words.shape):
        term = int(words[index])
        for axis, place in enumerate(index):
            term *= factor(axis, place)
        total += term
    return total % 2**64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int8", "bool", "float8_e4m3fn"])
def test_a_digest_is_the_sum_of_its_words(rng, dtype):
    array = rng.normal(size=(3, 4, 5)).astype(jax.numpy.dtype(dtype))
    assert digest_arrays({"x": array}) == {"x": f"{slow_sum(array):016x}"}


def test_a_digest_depends_on_every_word_and_on_no_mesh(rng):
    array = rng.normal(size=(4, 8)).astype(np.float32)
    digest = digest_arrays({"x": array})
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in ((None,), ("a",), (None, "b"), ("a", "b"), (("b", "a"),), (None, ("a", "b"))):
        placed = jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))
        assert digest_arrays({"x": placed}) == digest
    for index in np.ndindex(array.shape):
        for bit in (0, 31):
            changed = array.copy()
            changed.view(np.uint32)[index] ^= np.uint32(1 << bit)
            assert digest_arrays({"x": changed}) != digest
    swapped = array[::-1]
    assert digest_arrays({"x": swapped}) != digest
    assert digest_arrays({"x": np.float32(3)}) == digest_arrays({"x": jax.numpy.float32(3)})


# Saves a state that is split over all devices of all hosts, or restores it and says what is in it.
CHANGE_MESH = """
import json, sys
import jax, numpy as np
from moe_jax.checkpoints import CheckpointStore
from moe_jax.hosts import any_host, gather_texts, initialize_hosts, is_first_host, num_hosts
action, folder = sys.argv[1:3]
if len(sys.argv) > 3:
    initialize_hosts(sys.argv[3].removeprefix("--hosts="))
mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = {"w": jax.P(None, "data"), "b": jax.P("data"), "scale": jax.P(), "step": jax.P()}
values = {"w": np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32),
          "b": np.arange(8, dtype=np.int32) - 3, "scale": np.full((3, 3), 0.1, np.float32), "step": np.int32(5)}
def placed(name, value):
    return jax.make_array_from_callback(value.shape, jax.NamedSharding(mesh, sharding[name]), lambda i: value[i])
tree = {name: placed(name, value if action == "save" else np.zeros_like(value)) for name, value in values.items()}
with CheckpointStore(folder, keep_every=10) as store:
    if action == "save":
        for step in (10, 11, 12, 13):
            store.save(step, tree, {"hosts": num_hosts()})
        store.wait()
    else:
        newest = store.restore_newest(tree)
        assert all((np.asarray(shard.data) == values[name][shard.index]).all()
                   for name, leaf in newest.tree.items() for shard in leaf.addressable_shards)
        assert all(leaf.sharding.is_equivalent_to(tree[name].sharding, leaf.ndim) for name, leaf in newest.tree.items())
        print(json.dumps({"step": newest.step, "damaged": newest.damaged, "steps": store.steps(),
            "hosts": gather_texts(f"host {jax.process_index()}é" * (1 + jax.process_index())),
            "any": [any_host(False), any_host(jax.process_index() == num_hosts() - 1)], "first": is_first_host()}))
"""


def told_by(folder, count: int, logs, devices: int, is_slurm: bool = False) -> list[dict]:
    """What each host finds in the newest good checkpoint."""
    texts = finish(["-c", CHANGE_MESH, "restore", str(folder)], count, logs, devices, is_slurm)
    # Libraries may log behind it.
    return [json.loads(next(line for line in text.splitlines() if line.startswith('{"step"'))) for text in texts]


def test_a_state_moves_between_meshes_and_numbers_of_hosts(tmp_path):
    """Two hosts of two devices write it, four of one and this process read it; damage on one host is told to both."""
    folder = tmp_path / "checkpoints"
    finish(["-c", CHANGE_MESH, "save", str(folder)], 2, tmp_path / "save", devices=2)
    assert sorted(path.name for path in folder.iterdir()) == ["10", "12", "13"]
    for index, told in enumerate(told_by(folder, 4, tmp_path / "four", 1, is_slurm=True)):
        assert told == {
            "step": 13,
            "damaged": {},
            "steps": [10, 12, 13],
            "any": [False, True],
            "first": index == 0,
            "hosts": [f"host {i}é" * (1 + i) for i in range(4)],
        }
    like = {"b": np.zeros(8, np.int32), "scale": np.zeros((3, 3), np.float32), "step": np.int32(0)}
    like["w"] = jax.numpy.zeros((64, 4096))
    with CheckpointStore(folder) as store:
        restored = store.restore(13, like)
    np.testing.assert_array_equal(restored["b"], np.arange(8) - 3)
    np.testing.assert_array_equal(restored["w"], np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32))
    # What host 1 wrote and, since the mesh is the same, host 1 alone reads.
    files = [path for path in (folder / "13" / "state" / "ocdbt.process_1").rglob("*") if path.is_file()]
    damaged = max(files, key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    for told in told_by(folder, 2, tmp_path / "damaged", 2):
        assert told["step"] == 12 and list(told["damaged"]) == ["13"]
    assert sorted(path.name for path in folder.iterdir()) == ["10", "12", "damaged"]
    with CheckpointStore(folder) as store:
        assert store.read_metadata(12) == {"hosts": 2}
