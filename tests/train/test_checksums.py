"""Checksums: a naive sum by the definition, equal for every layout, and what damage they notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtjax.train import checksums as module
from mtjax.train.checksums import checksums

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "int8", "uint16", "int4", "bool", "complex64")


def make(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random numbers of a dtype."""
    numbers = np.random.default_rng(seed).normal(size=(2, *shape)) * 4
    dtype = jnp.dtype(dtype)
    if dtype.kind == "b":
        return numbers[0] > 0
    return (numbers[0] + 1j * numbers[1] if dtype.kind == "c" else numbers[0]).astype(dtype)


def naive(array: np.ndarray) -> int:
    """The definition, in Python's integers, for elements of at most 32 bits or several words."""

    def scramble(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    size, data, total = min(array.dtype.itemsize, 4), array.tobytes(), 0
    for i in range(len(data) // size):
        word = int.from_bytes(data[i * size : (i + 1) * size], "little")
        key = scramble((i + 0x9E3779B9) % 2**32)
        total += scramble(word ^ key) * (key | 1)
    return total % 2**32


def of(array) -> int:
    (value,) = checksums([array]).values()
    return value


def on_devices(array) -> int:
    return int(module._on_devices(array))


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layout_gives_the_sum_of_the_definition(mesh, dtype: str):
    array = make(dtype, (8, 6))
    # Integers of four bits lie in the low half of a byte whose upper half says nothing; they count as whole numbers.
    expected = naive(array.astype(np.int32) if dtype == "int4" else array)
    assert of(array) == of(np.asfortranarray(array)) == expected
    assert on_devices(jnp.asarray(array)) == expected
    both = jax.device_put(array, jax.NamedSharding(mesh, jax.P("a", "b")))
    assert of(both) == on_devices(both) == expected


def test_layouts_of_one_array(mesh):
    """1, 2 and 8 devices, split along either dimension or none."""
    array = make("float32", (16, 8))
    sums = {of(array)}
    for spec in (jax.P(), jax.P("a"), jax.P("b", "a"), jax.P(("a", "b"))):
        sums.add(on_devices(jax.device_put(array, jax.NamedSharding(mesh, spec))))
    two = jax.make_mesh((2,), ("c",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):  # an ambient mesh is no hindrance for arrays elsewhere
        sums.add(on_devices(jax.device_put(array, jax.NamedSharding(two, jax.P(None, "c")))))
    assert len(sums) == 1


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128"])
def test_wide_elements(dtype: str):
    array = make(dtype, (5, 3))
    with jax.enable_x64(True):
        assert on_devices(jnp.asarray(array)) == of(array) == naive(array)


def test_scalars_empty_arrays_and_keys():
    keys = jax.random.split(jax.random.key(1), 3)
    tree = {"scalar": jnp.int32(7), "empty": jnp.zeros((0, 3)), "keys": keys, "key": keys[1], "list": [np.float32(2)]}
    tree["list"] = [np.asarray(leaf) for leaf in tree["list"]]
    found = checksums(tree)
    assert list(found) == ["empty", "key", "keys", "list/0", "scalar"]
    assert found["empty"] == 0 and found["scalar"] == naive(np.asarray(7, np.int32))
    assert found["keys"] == naive(np.asarray(jax.random.key_data(keys)))
    assert found["key"] == naive(np.asarray(jax.random.key_data(keys[1])))
    for leaf in (tree["scalar"], tree["empty"], jax.random.key_data(keys)):
        assert on_devices(leaf) == of(leaf)
    assert checksums({}) == {} and checksums({"none": None}) == {}


def test_arrays_longer_than_a_block():
    array = make("float32", (2 * module._BLOCK + 5,))
    assert of(array) == on_devices(jnp.asarray(array))


@given(st.sampled_from([d for d in DTYPES if d not in ("bool", "int4")]), st.integers(0, 2**16), st.integers(0, 63))
def test_every_flipped_bit_is_seen(dtype: str, position: int, bit: int):
    """With certainty, as every term is a bijection of its word."""
    array = make(dtype, (3, 5))
    data = bytearray(array.tobytes())
    data[position % len(data)] ^= 1 << bit % 8
    assert of(np.frombuffer(bytes(data), array.dtype)) != of(array)


def test_exchanged_elements_are_seen():
    array = make("float32", (64,))
    whole = of(array)
    for i in range(64):
        for j in range(i):
            other = array.copy()
            other[[i, j]] = array[[j, i]]
            assert of(other) != whole, (i, j)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_other_damage_is_seen(seed: int, count: int):
    """Zeros in a part, a part that is shifted or copied, a constant added to all bits."""
    array = np.random.default_rng(seed).integers(1, 2**32, size=41, dtype=np.uint32)
    part = array.copy()
    part[-count:] = 0
    copied = array.copy()
    copied[-count:] = array[:count]
    others = [part, np.roll(array, count), copied, array[::-1], array ^ np.uint32(seed | 1), np.zeros_like(array)]
    assert of(array) not in [of(other) for other in others]
    assert of(np.zeros(count, np.float32)) != of(np.zeros(count + 1, np.float32))


def test_no_array_is_gathered(mesh):
    """What crosses the network is one sum."""
    sharding = jax.NamedSharding(mesh, jax.P("a", "b"))
    text = module._program.lower(jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=sharding)).compile().as_text()
    lines = [line for line in text.splitlines() if any(f" {name}" in line for name in ("all-", "collective-"))]
    assert lines and all("u32[] all-reduce" in line for line in lines), lines
