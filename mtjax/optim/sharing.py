"""Which leaves of the parameters several tasks share, and what is computed on these alone.

A multi-objective method is about parameters on which tasks can disagree. `shared_leaves` turns what the user says (or
what a Jacobian shows) into one flag per leaf: a Python bool where it is known before the computation, so that the other
branch is never built, else a traced one.

Letters: K tasks.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mtjax import gradients

PyTree = Any


def shared_leaves(is_shared: Any, params: PyTree, jacobian: PyTree | None = None) -> PyTree | None:
    """bool per leaf of `params`: a Python bool where that is known, a traced one where it depends on the Jacobian.

    None if it depends on the Jacobian and none is given.
    """
    if is_shared is None:
        if jacobian is None:
            return None
        return jax.tree.map(lambda rows: several_rows(row_is_used(rows)), jacobian)
    if callable(is_shared):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: bool(is_shared(jax.tree_util.keystr(path, simple=True, separator="/"))), params
        )
    return jax.tree.map(lambda flag, leaves: jax.tree.map(lambda _: bool(flag), leaves), is_shared, params)


def row_is_used(rows: jax.Array) -> jax.Array:
    """[K, ...] -> bool[K]: rows that are not zero."""
    return jnp.any(rows != 0, axis=tuple(range(1, rows.ndim)))


def several_rows(used: jax.Array) -> jax.Array:
    """bool[K] -> bool[]: whether at least two tasks use a leaf."""
    return jnp.sum(used) > 1


def all_shared(shared: PyTree) -> bool:
    """True if it is known that every leaf is shared."""
    return all(flag is True for flag in jax.tree.leaves(shared))


def shared_gramian(jacobian: PyTree, shared: PyTree, other: PyTree | None = None) -> jax.Array:
    """f[K, K] Gramian of the shared leaves; with another Jacobian in the place of the second factor if given."""
    return gradients.gramian(jacobian, other, shared)


def only_shared(shared: PyTree, tree: PyTree) -> PyTree:
    """The tree with None in the place of leaves that are not shared; zeros where that is known at run time only."""

    def pick(flag, leaf):
        if isinstance(flag, bool):
            return leaf if flag else None
        return jnp.where(flag, leaf, jnp.zeros_like(leaf))

    return jax.tree.map(pick, shared, tree)


def select_shared(shared: PyTree, aggregated: PyTree, summed: PyTree) -> PyTree:
    """`aggregated` on shared leaves (it may have None elsewhere), `summed` on task-specific ones."""

    def select(flag, b, a):
        if flag is None:  # an empty subtree of the parameters
            return None
        return (a if flag else b) if isinstance(flag, bool) else jnp.where(flag, a, b)

    return jax.tree.map(select, shared, summed, aggregated, is_leaf=lambda node: node is None)
