"""Control vectors in files: both formats, damaged ones, full disks."""

import os
import pathlib
import tempfile

import gguf
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy

from keras_nlp_cache.surgery.control_vector import ControlVector
from tests.test_control_vectors import every_format
from tests.test_control_vectors import SUFFIXES
from tests.test_control_vectors import vector_for
from tests.test_control_vectors import vectors


@hypothesis.given(vectors, st.text(min_size=1), st.sampled_from(SUFFIXES))
def test_files_go_both_ways(vector, hint, suffix):
    vector = ControlVector(vector.directions, hint)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, f"vector{suffix}")
        vector.save(path)
        assert os.listdir(folder) == [path.name]
        loaded = ControlVector.load(str(path))
    # Read whole, for the file is gone.
    assert loaded == vector and loaded.model_hint == hint
    for x in loaded.directions.values():
        assert x.dtype == "float32" and not x.flags.writeable


def test_other_readers_find_the_keys_of_repeng(tmp_path):
    vector = vector_for([1, 4])
    vector.save(tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    layer_count = reader.get_field("controlvector.layer_count")
    assert layer_count.types == [gguf.GGUFValueType.UINT32]
    assert [x.name for x in reader.tensors] == ["direction.1", "direction.4"]
    for x, direction in zip(reader.tensors, vector.directions.values()):
        assert x.tensor_type == gguf.GGMLQuantizationType.F32
        np.testing.assert_array_equal(x.data, direction)

    vector.save(tmp_path / "x.safetensors")
    tensors = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert sorted(tensors) == ["direction.1", "direction.4"]


def write_gguf(path, tensors, architecture="controlvector", hint="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_safetensors(path, tensors, architecture="control_vector"):
    metadata = {"format": architecture, "model_hint": "llama"}
    safetensors.numpy.save_file(tensors, path, metadata)


WRITERS = {".gguf": write_gguf, ".safetensors": write_safetensors}
ONES = np.ones(4, "float32")
NOT_VECTORS = {
    "no directions": ({}, {}, "without tensors"),
    "another architecture": (
        {"direction.1": ONES},
        {"architecture": "llama"},
        "'llama'",
    ),
    "another tensor": (
        {"direction.1": ONES, "token_embd.weight": ONES},
        {},
        "named `direction.<block>`.*'token_embd.weight'",
    ),
    "no index": ({"direction.x": ONES}, {}, "'direction.x'"),
    "a negative index": ({"direction.-1": ONES}, {}, "'direction.-1'"),
    "a matrix": ({"direction.1": np.ones((2, 4), "float32")}, {}, "block 1"),
    "different sizes": (
        {"direction.1": ONES, "direction.2": np.ones(8, "float32")},
        {},
        r"same size.*\[4, 8\]",
    ),
    "not finite": ({"direction.1": ONES * np.nan}, {}, "finite"),
}


@every_format
@pytest.mark.parametrize("kind", NOT_VECTORS)
def test_files_that_are_no_control_vectors(kind, suffix, tmp_path):
    tensors, kwargs, words = NOT_VECTORS[kind]
    path = tmp_path / f"other{suffix}"
    WRITERS[suffix](path, tensors, **kwargs)
    with pytest.raises(ValueError, match=words) as error:
        ControlVector.load(path)
    assert str(path) in str(error.value)


def test_metadata_that_is_missing(tmp_path):
    write_gguf(tmp_path / "x.gguf", {"direction.1": ONES}, hint=None)
    with pytest.raises(ValueError, match="x.gguf.*controlvector.model_hint"):
        ControlVector.load(tmp_path / "x.gguf")
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"direction.1": ONES}, path)
    with pytest.raises(ValueError, match="x.safetensors.*metadata"):
        ControlVector.load(path)


def test_paths(tmp_path):
    vector = vector_for([1])
    for use in (vector.save, ControlVector.load):
        with pytest.raises(ValueError, match="safetensors.*gguf.*x.npz"):
            use(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError):
        ControlVector.load(tmp_path / "nowhere.gguf")
    with pytest.raises(OSError):
        vector.save(tmp_path / "nowhere" / "x.gguf")


def complete_file(suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, f"x{suffix}")
        ControlVector({1: ONES, 2: np.arange(8)[4:]}, "llama").save(path)
        return path.read_bytes()


COMPLETE = {suffix: complete_file(suffix) for suffix in SUFFIXES}
# One bit makes a number of the type of a string, an array. Its length then
# is read from the string, and is as good as endless.
ENDLESS = COMPLETE[".gguf"].index(b"model_hint") + len("model_hint")


@every_format
def test_truncated_files(suffix, tmp_path):
    path = tmp_path / f"truncated{suffix}"
    whole = COMPLETE[suffix].rstrip(b"\0")  # GGUF files end with padding.
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated"):
            ControlVector.load(path)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    st.sampled_from(SUFFIXES),
    st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 255)),
        min_size=1,
        max_size=4,
    ),
)
@hypothesis.example(".gguf", [(ENDLESS, 9)])
def test_garbled_files(suffix, changes):
    """A file is refused or read, and nothing else happens."""
    content = bytearray(COMPLETE[suffix])
    for i, byte in changes:
        content[i % len(content)] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, f"garbled{suffix}")
        path.write_bytes(content)
        try:
            assert isinstance(ControlVector.load(path), ControlVector)
        except ValueError as e:
            assert str(path) in str(e)


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


FAULTS = {
    "the first byte": {
        ".gguf": (gguf.GGUFWriter, "write_header_to_file"),
        ".safetensors": (pathlib.Path, "write_bytes"),
    },
    "halfway": {
        ".gguf": (gguf.GGUFWriter, "write_tensors_to_file"),
        ".safetensors": (safetensors.numpy, "save"),
    },
    "the last step": dict.fromkeys(SUFFIXES, (os, "replace")),
}


@every_format
@pytest.mark.parametrize("when", FAULTS)
@pytest.mark.parametrize("older", [True, False])
def test_a_full_disk(suffix, when, older, tmp_path, monkeypatch):
    path = tmp_path / f"x{suffix}"
    if older:
        vector_for([1]).save(path)
    monkeypatch.setattr(*FAULTS[when][suffix], full_disk)
    with pytest.raises(OSError, match="No space left"):
        vector_for([2]).save(path)
    assert list(tmp_path.iterdir()) == [path] * older
    if older:
        assert ControlVector.load(path) == vector_for([1])


@every_format
def test_a_file_that_grows_too_large(suffix, tmp_path):
    """No fault is injected here: the system refuses to write on."""
    resource = pytest.importorskip("resource")
    path = tmp_path / f"x{suffix}"
    vector_for([1]).save(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError):
            vector_for(range(20)).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path]
    assert ControlVector.load(path) == vector_for([1])


@every_format
def test_links_and_modes_are_kept(suffix, tmp_path):
    path, link = tmp_path / f"x{suffix}", tmp_path / f"link{suffix}"
    vector_for([1]).save(path)
    path.chmod(0o640)
    link.symlink_to(path)
    vector_for([2]).save(link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert ControlVector.load(path) == vector_for([2])
