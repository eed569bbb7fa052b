"""Checksums of arrays that do not depend on how the arrays are laid out over devices and processes.

    c(x) = sum over words i of mix(w_i, i)   modulo 2^32

w_i is a 32-bit word of the array's bits and i its global position; elements below 32 bits are a word each, those above
are several. A sum modulo 2^32 is the same in any order, so each device adds up what it holds, one number per array
crosses the network, and no array is gathered. `mix` is a bijection of w for every i: a change within one word always
changes the sum; any other change (zeros, elements exchanged) is missed once in 2^32.

Reference: the mixing function is the finaliser of MurmurHash3 (A. Appleby, 2011, public domain).
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
HOST_BYTES = 64 << 20
"""Up to so many bytes are fetched from accelerators and summed by NumPy: compiling programs would take longer."""
_BLOCK = 1 << 15  # words; what is computed on the way stays in the processor's cache


def checksums(tree: PyTree) -> dict[str, int]:
    """The checksum of every leaf.

    Args:
      tree: a pytree of NumPy or JAX arrays of any dtype, typed PRNG keys included, placed anywhere. All processes have
        to ask if some arrays are spread over them.

    Returns:
      "/"-joined path -> checksum, 0 <= checksum < 2^32.
    """
    paths, leaves = named_leaves(tree)
    leaves = [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in leaves]
    fetch = sum(leaf.nbytes for leaf in leaves if _is_here(leaf)) <= HOST_BYTES
    # Programs on devices are only started here, and run while NumPy computes.
    sums = [
        _on_host(np.asarray(leaf)) if _is_here(leaf) and (fetch or _is_in_memory(leaf)) else _on_devices(leaf)
        for leaf in leaves
    ]
    return {path: int(value) for path, value in zip(paths, sums, strict=True)}


def _is_here(leaf: Any) -> bool:
    """Whether this process has the whole array."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _is_in_memory(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or all(device.platform == "cpu" for device in leaf.sharding.device_set)


def named_leaves(tree: PyTree) -> tuple[list[str], list[Any]]:
    """The "/"-joined path of every leaf, and the leaves."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in found], [leaf for _, leaf in found]


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _on_devices(leaf: jax.Array) -> jax.Array:
    """u32[], not waited for if this process alone computes it."""
    sharding = leaf.sharding
    # The ambient mesh may be another one, on which this array does not lie.
    with jax.set_mesh(sharding.mesh) if isinstance(sharding, jax.NamedSharding) else contextlib.nullcontext():
        total = _program(leaf)
    # A CPU runs programs that do not depend on each other side by side, each process in an order of its own: two that
    # sum over processes would wait for each other for ever.
    return total if leaf.is_fully_addressable else jax.block_until_ready(total)


@jax.jit  # one program for each shape, dtype and sharding: parameters and momenta share theirs
def _program(leaf: jax.Array) -> jax.Array:
    # From one position per dimension, not by reshaping, which would move elements between devices.
    index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(stride % 2**32)
        stride *= leaf.shape[axis]
    words = _words_on_devices(leaf)
    terms = [_mix(word, index * np.uint32(len(words)) + np.uint32(n)) for n, word in enumerate(words)]
    return sum(jnp.sum(term, dtype=jnp.uint32) for term in terms)


def _words_on_devices(leaf: jax.Array) -> list[jax.Array]:
    """The 32-bit words of each element, lowest first, each of the leaf's shape."""
    if jnp.iscomplexobj(leaf):
        return _words_on_devices(leaf.real) + _words_on_devices(leaf.imag)
    size = leaf.dtype.itemsize
    if size == 8:
        pairs = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        return [pairs[..., 0], pairs[..., 1]]
    if leaf.dtype == bool or _is_nibble(leaf.dtype):
        return [leaf.astype(jnp.int32).astype(jnp.uint32)]
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size])
    return [bits.astype(jnp.uint32)]


def _on_host(leaf: np.ndarray) -> int:
    leaf = np.ascontiguousarray(leaf).ravel()
    if leaf.dtype == bool or _is_nibble(leaf.dtype):
        leaf = leaf.astype(np.int32)
    words = leaf.view(f"<u{min(leaf.dtype.itemsize, 4)}")
    total = 0
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint32)
        index = np.arange(start, start + block.size, dtype=np.int64).astype(np.uint32)
        total += int(_mix(block, index).sum(dtype=np.uint32))
    return total % 2**32


def _is_nibble(dtype: np.dtype) -> bool:
    """Whether it is an integer of fewer than eight bits."""
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8


def _mix(word, index):
    """Depends on all bits of both; for every index a bijection of the word. Works on NumPy and JAX arrays, u32."""
    key = _scramble(index + np.uint32(0x9E3779B9))
    return _scramble(word ^ key) * (key | np.uint32(1))


def _scramble(x):
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
