"""Stored data sets: what is read is what was written, a damaged file is noticed, and names follow configurations."""

import dataclasses
import json
import os
import pathlib
import tempfile

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mtjax import sharding
from mtjax.data.pde import store


@dataclasses.dataclass(frozen=True)
class Inner:
    length: float = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = 3
    kernel: Inner = Inner()
    forms: tuple = ("a", "b")
    period: float | None = None


class Maker:
    """Arrays that count how often they are made."""

    def __init__(self):
        self.calls = 0

    def __call__(self, progress):
        self.calls += 1
        progress(1, 1)
        rng = np.random.default_rng(0)
        return {
            "inputs": {"code": rng.normal(size=(3, 4)).astype(np.float32), "image": rng.random((3, 2, 2))},
            "mask": rng.random((3, 50)) > 0.5,
            "task": np.arange(3, dtype=np.int32),
            "empty": np.zeros((0, 2)),
        }


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[key], value)
        else:
            assert found[key].dtype == value.dtype and found[key].shape == value.shape
            np.testing.assert_array_equal(found[key], value)


def test_made_once_and_read_bit_by_bit(tmp_path):
    make = Maker()
    first = store.cached("tiny", Config(), make, folder=tmp_path)
    again = store.cached("tiny", Config(), make, folder=tmp_path)
    assert make.calls == 1
    assert_same(first, Maker()(lambda *_: None))
    assert_same(again, first)
    assert [path.name for path in tmp_path.iterdir()] == [store.path_of("tiny", Config(), folder=tmp_path).name]


def test_data_are_made_on_one_device_whatever_the_mesh(tmp_path):
    devices = []

    def make(progress):
        made = jax.jit(lambda x: 2 * x)(np.arange(8.0))
        devices.append(made.devices())
        return {"x": np.asarray(made)}

    mesh = sharding.make_mesh("data=8")
    with jax.set_mesh(mesh):
        store.cached("one", Config(), make, folder=tmp_path)
        assert sharding.current_mesh() == mesh  # again
        assert len(jax.jit(lambda x: 2 * x)(np.arange(8.0)).devices()) == 8
    assert [len(found) for found in devices] == [1]


def test_the_file_is_a_plain_npz_with_its_configuration(tmp_path):
    store.cached("tiny", Config(rows=7), Maker(), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(f"tiny-v{store.FORMAT_VERSION}-") and path.suffix == ".npz"
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["inputs/code"], Maker()(lambda *_: None)["inputs"]["code"])
        header = json.loads(archive["header.json"])
    assert header["config"]["fields"]["rows"] == 7
    assert header["config"]["fields"]["kernel"]["fields"] == {"length": 0.1}


def test_equal_data_give_equal_bytes(tmp_path):
    for folder in ("a", "b"):
        store.cached("tiny", Config(), Maker(), folder=tmp_path / folder)
    (a,), (b,) = ((tmp_path / folder).iterdir() for folder in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "other"])
def test_a_damaged_file_is_made_anew_with_a_message(tmp_path, damage):
    make = Maker()
    expected = store.cached("tiny", Config(), make, folder=tmp_path)
    path = store.path_of("tiny", Config(), folder=tmp_path)
    whole = path.read_bytes()
    if damage == "other":
        store.cached("tiny", Config(rows=4), Maker(), folder=tmp_path)
        changed = store.path_of("tiny", Config(rows=4), folder=tmp_path).read_bytes()
    else:
        position = whole.index(b"image.npy") + 120  # inside of the compressed array
        flipped = whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :]
        changed = {"cut": whole[:-100], "flip": flipped, "empty": b"", "text": b"not a data set"}[damage]
    path.write_bytes(changed)
    with pytest.warns(UserWarning, match=r"is damaged .* made anew"):
        found = store.cached("tiny", Config(), make, folder=tmp_path)
    assert make.calls == 2
    assert_same(found, expected)
    assert path.read_bytes() == whole


def test_every_cut_of_a_file_is_noticed(tmp_path):
    store.cached("tiny", Config(), Maker(), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(store._DAMAGE):
            store.read(path)


def test_nothing_is_left_of_a_generation_that_fails(tmp_path):
    def fail(progress):
        raise RuntimeError("solver did not converge")

    with pytest.raises(RuntimeError, match="did not converge"):
        store.cached("tiny", Config(), fail, folder=tmp_path)
    with pytest.raises(ValueError, match="Python objects"):
        store.cached("tiny", Config(), lambda _: {"a": np.array([None])}, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.npz"
    store.write(path, {"good": np.zeros(3)}, {})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Object arrays"):
        store.write(path, {"good": np.ones(1000), "bad": np.array([None])}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"] and path.read_bytes() == before


def test_names_follow_the_configuration(tmp_path):
    class Newer(Config):
        version = 2

    variants = [
        Config(),
        Config(rows=4),
        Config(kernel=Inner(0.2)),
        Config(forms=("a",)),
        Config(period=1.0),
        Config(forms=(1,)),
        Config(forms=("1",)),
        Newer(),
    ]
    paths = {store.path_of("tiny", config, folder=tmp_path) for config in variants}
    assert len(paths) == len(variants)
    assert (store.described(Config())["version"], store.described(Newer())["version"]) == (1, 2)
    assert store.path_of("tiny", Config(forms=["a", "b"]), folder=tmp_path) == store.path_of(
        "tiny", Config(rows=np.int64(3)), folder=tmp_path
    )
    assert store.path_of("other", Config(), folder=tmp_path) not in paths


def test_the_folder_is_the_argument_then_the_variable_then_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MTJAX_DATA", str(tmp_path / "variable"))
    assert store.path_of("tiny", Config()).parent == tmp_path / "variable"
    assert store.path_of("tiny", Config(), folder=tmp_path).parent == tmp_path
    monkeypatch.setenv("MTJAX_DATA", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.path_of("tiny", Config()).parent == tmp_path / "home" / ".cache" / "mtjax"


@pytest.mark.parametrize(
    ("name", "config", "arrays", "message"),
    [
        ("../tiny", Config(), {}, "cannot begin a file's name"),
        ("tiny", {"rows": 3}, {}, "instance of a dataclass"),
        ("tiny", Config, {}, "instance of a dataclass"),
        ("tiny", Config(period=lambda x: x), {}, r"config\.period is a function"),
        ("tiny", Config(), {"a/b": np.zeros(2)}, "without '/'"),
        ("tiny", Config(), {1: np.zeros(2)}, "non-empty string"),
    ],
)
def test_bad_input(tmp_path, name, config, arrays, message):
    with pytest.raises(ValueError, match=message):
        store.cached(name, config, lambda _: arrays, folder=tmp_path)


def test_a_folder_that_cannot_be_made_is_found_before_anything_is_generated(tmp_path):
    (tmp_path / "file").write_text("")
    make = Maker()
    with pytest.raises(OSError, match="MTJAX_DATA"):
        store.cached("tiny", Config(), make, folder=tmp_path / "file" / "below")
    assert make.calls == 0


def test_progress_speaks_only_of_what_takes_long(capsys):
    cases = ((60.0, True, ""), (0.0, False, ""), (0.0, True, "Long: 1 of 2 in 0 s\n"))
    for after_s, enabled, expected in cases:
        with store.progress_bar("Long", enabled=enabled, after_s=after_s, every_s=0.0) as advance:
            advance(1, 2)
        assert capsys.readouterr().out == expected


keys = st.text(st.characters(codec="ascii", exclude_characters="/"), min_size=1, max_size=5).filter(str.isidentifier)
arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int32, np.bool_, np.uint8]), hnp.array_shapes(max_dims=3, max_side=4)
)


@settings(max_examples=15)
@given(st.recursive(st.dictionaries(keys, arrays, min_size=1), lambda s: st.dictionaries(keys, s, min_size=1)))
def test_any_nested_arrays_survive(tree):
    assert_same(store.nested(store.flatten(tree)), tree)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.npz"
        store.write(path, store.flatten(tree), {})
        assert_same(store.read(path, {}), tree)
        assert os.listdir(folder) == ["a.npz"]
