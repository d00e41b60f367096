"""Safetensors files: the reference library reads ours and we read its, and damaged or hostile ones are refused."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.checkpoints.hub.tensor_files import INDEX, Checkpoint, HubError, TensorFile, TensorWriter

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(3, np.int64),
    "c": np.arange(4).astype(ml_dtypes.bfloat16),
    "d": np.zeros((0, 3), np.float16),
    "e": np.array([True, False]),
}


def write(path, arrays=ARRAYS):
    writer = TensorWriter(path, arrays)
    for name in reversed(arrays):  # any order
        writer.arrays[name][...] = arrays[name]
    writer.close()
    return path


def raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(shape=(2,), dtype="F32", offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def test_what_is_written_is_read(tmp_path):
    file = TensorFile(write(tmp_path / "x.safetensors"))
    assert sorted(file.names()) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert (file.dtype(name), file.shape(name)) == (array.dtype, array.shape)
        np.testing.assert_array_equal(file.read(name), array)
    with pytest.raises(ValueError, match="read-only"):
        file.read("a")[0, 0] = 1


@pytest.mark.parity
def test_the_reference_library_agrees(tmp_path):
    from safetensors.numpy import load_file, save_file

    ours = load_file(write(tmp_path / "ours.safetensors"))
    save_file(ARRAYS, tmp_path / "theirs.safetensors")
    theirs = TensorFile(tmp_path / "theirs.safetensors")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(ours[name], array)
        np.testing.assert_array_equal(theirs.read(name), array)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (tensor(), b"1234567", "has [0-9]+ bytes, its header promises"),
        (tensor(), b"123456789", "has [0-9]+ bytes, its header promises"),
        (tensor(offsets=(0, 4)), b"1234", "should take 8 bytes from 0, the header says 0 to 4"),
        (tensor(offsets=(4, 12)), b"1" * 12, "should take 8 bytes from 0, the header says 4 to 12"),
        (tensor(shape=(2**61, 2**61), offsets=(0, 8)), b"1" * 8, "should take .* bytes"),
        (tensor(shape=(-2,)), b"1" * 8, "shape and offsets must be whole numbers"),
        (tensor(shape=(2.0,)), b"1" * 8, "shape and offsets must be whole numbers"),
        (tensor(dtype="Q4"), b"1" * 8, "unknown dtype 'Q4'"),
        ({"a": 5}, b"", "damaged header"),
        ([1], b"", "damaged header"),
        (b"[" * 100_000, b"", "damaged header"),
        (b"{not json", b"", "damaged header"),
        (tensor() | {"b": tensor()["a"]}, b"1" * 8, "tensor 'b'|tensor 'a'"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, header, data, message):
    with pytest.raises(HubError, match=message):
        TensorFile(raw(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [0, 1, 2**62, 10**8 + 1])
def test_absurd_header_lengths_are_refused(tmp_path, length):
    with pytest.raises(HubError, match="no whole safetensors file"):
        TensorFile(raw(tmp_path / "x.safetensors", tensor(), b"1" * 8, length))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_refused_or_harmless(tmp_path, data):
    """Cut off anywhere, or with any byte changed, a file gives an error that says so, or tensors of its own size."""
    content = bytearray(write(tmp_path / "whole.safetensors").read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    try:
        file = TensorFile(path)
    except HubError as error:
        assert str(path) in str(error)
        return
    assert sum(file.read(name).nbytes for name in file.names()) <= len(content)


def test_shards_and_their_index(tmp_path):
    write(tmp_path / "one.safetensors", {"a": ARRAYS["a"]})
    write(tmp_path / "two.safetensors", {"b": ARRAYS["b"]})

    def with_index(places):
        (tmp_path / INDEX).write_text(places if isinstance(places, str) else json.dumps({"weight_map": places}))
        return Checkpoint(tmp_path)

    places = {"a": "one.safetensors", "b": "two.safetensors"}
    assert with_index(places).names() == ["a", "b"]
    np.testing.assert_array_equal(with_index(places).read("a"), ARRAYS["a"])
    for wrong, message in (
        (places | {"c": "two.safetensors"}, "promises tensor 'c' in two.safetensors, which lacks it"),
        (places | {"c": "three.safetensors"}, "names 'three.safetensors', which is no file of that folder"),
        (places | {"c": "../../etc/passwd"}, "names '../../etc/passwd', which is no file of that folder"),
        (places | {"c": 3}, "weight_map must map tensor names to file names"),
        ("{}", "is no index of safetensors files"),
        ("[" * 100_000, "is no index of safetensors files"),
    ):
        with pytest.raises(HubError, match=message):
            with_index(wrong)
    (tmp_path / INDEX).unlink()
    assert Checkpoint(tmp_path).names() == ["a", "b"]
    (tmp_path / "two.safetensors").write_bytes(b"short")
    with pytest.raises(HubError, match=r"two\.safetensors is no whole safetensors file"):
        Checkpoint(tmp_path)
    with pytest.raises(HubError, match=r"pickled checkpoints .* are never opened"):
        (tmp_path / "empty").mkdir()
        Checkpoint(tmp_path / "empty")


def test_a_writer_of_shapes_only(tmp_path):
    writer = TensorWriter(tmp_path / "x.safetensors", {"a": jax.ShapeDtypeStruct((2, 2), np.float32)})
    writer.close()
    np.testing.assert_array_equal(TensorFile(tmp_path / "x.safetensors").read("a"), np.zeros((2, 2)))
