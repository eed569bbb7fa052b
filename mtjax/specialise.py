r"""What a program reads of its parameters: a function of parameters and inputs, with the rest of the parameters gone.

    function(params, *inputs) = program(values, *inputs)

A program for one task reads one row of every array that is stacked over tasks, and leaves some arrays alone. Traced
into a jaxpr, all operations that depend on parameters alone can be done beforehand. They are, wherever this leaves
fewer bytes than it takes: rows of stacked arrays, sums, casts to a narrower type; a transposition stays in the program.

Loops are not opened: of an array that is split up inside of a scan all is kept.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from mtjax.sharding import path_of

PyTree = Any
INLINED = ("jit", "pjit", "remat2", "checkpoint")  # calls that only group equations


class Step(NamedTuple):
    """An equation, and the numbers of what it reads (or literals) and writes."""

    equation: core.JaxprEqn
    reads: list[int | core.Literal]
    writes: list[int]


def specialise(
    function: Callable[..., PyTree], params: PyTree, *inputs: PyTree
) -> tuple[dict[str, jax.Array], Callable[..., PyTree]]:
    """Splits a function into what can be computed from its parameters now, and the program that is left.

    Args:
      function: `function(params, *inputs)`, pure.
      params: arrays.
      inputs: arrays or `jax.ShapeDtypeStruct`, whose shapes may have symbolic dimensions.

    Returns:
      values, and `program(values, *inputs)`, which returns what the function does for inputs of these shapes. Keys of
      values are paths of parameters, joined by '/': the parameter, or the only part of it that is read; 'computed' for
      what comes from several. A second part of the same parameter has '_1' behind its name.

    >>> params = {"kernel": jax.numpy.arange(6.0).reshape(3, 2), "other": jax.numpy.ones(100)}
    >>> values, program = specialise(lambda params, x: params["kernel"][1] * x, params, jax.numpy.ones(2))
    >>> jax.tree.map(np.shape, values), program(values, jax.numpy.ones(2)).tolist()
    ({'kernel': (1, 2)}, [2.0, 3.0])
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(params, *inputs)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    graph = _Graph()
    arguments = [graph.new(var) for var in closed.jaxpr.invars]
    for number, (path, leaf) in zip(arguments, leaves, strict=False):  # the first arguments
        graph.known[number], graph.origin[number] = leaf, {path_of(path)}
    outputs = graph.add(closed.jaxpr, arguments, closed.consts)
    kept, stored = graph.split(outputs)
    names = graph.names(stored)
    values = {name: graph.value(number) for number, name in names.items()}
    constants = dict(graph.constants)

    def program(values: Mapping[str, jax.Array], *inputs: PyTree) -> PyTree:
        env = constants | {number: values[name] for number, name in names.items()}
        env |= dict(zip(arguments[len(leaves) :], jax.tree.leaves(inputs), strict=True))
        for step in kept:
            env |= dict(zip(step.writes, _run(step.equation, [_read(env, r) for r in step.reads]), strict=True))
        return jax.tree.unflatten(jax.tree.structure(shape), [_read(env, number) for number in outputs])

    return values, program


def _read(env: Mapping[int, Any], what: int | core.Literal) -> Any:
    return what.val if isinstance(what, core.Literal) else env[what]


def _run(equation: core.JaxprEqn, operands: list) -> list:
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


class _Graph:
    """A jaxpr with its calls opened; everything that is read or written has a number.

    Attributes:
      steps: in order.
      avals: by number.
      constants: values that are part of the program.
      known: values of parameters, and what was computed from them.
      origin: names of the parameters that a known number depends on; none for what depends on nothing at all.
    """

    def __init__(self):
        self.steps: list[Step] = []
        self.avals: list[Any] = []
        self.constants: dict[int, Any] = {}
        self.known: dict[int, Any] = {}
        self.origin: dict[int, set[str]] = {}
        self.made_by: dict[int, Step] = {}

    def new(self, var: core.Var) -> int:
        self.avals.append(var.aval)
        return len(self.avals) - 1

    def add(self, jaxpr: core.Jaxpr, arguments: list, consts: Any) -> list[int | core.Literal]:
        """Appends the equations of a jaxpr; the numbers of its outputs."""
        env = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = self.new(var)
            self.constants[env[var]] = self.known[env[var]] = value
            self.origin[env[var]] = set()

        def number(var):
            return var if isinstance(var, core.Literal) else env[var]

        for equation in jaxpr.eqns:
            reads = [number(var) for var in equation.invars]
            if equation.primitive.name in INLINED:
                inner = equation.params["jaxpr"]
                inner, own = (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, [])
                env |= dict(zip(equation.outvars, self.add(inner, reads, own), strict=True))
                continue
            writes = [self.new(var) for var in equation.outvars]
            env |= dict(zip(equation.outvars, writes, strict=True))
            step = Step(equation, reads, writes)
            self.steps.append(step)
            self.made_by |= dict.fromkeys(writes, step)
            read = [r for r in reads if not isinstance(r, core.Literal)]
            fixed = all(isinstance(size, int) for var in equation.outvars for size in var.aval.shape)
            if fixed and not equation.effects and all(r in self.origin for r in read):
                self.origin |= dict.fromkeys(writes, set().union(*(self.origin[r] for r in read)))
        return [number(var) for var in jaxpr.outvars]

    def split(self, outputs: list) -> tuple[list[Step], list[int]]:
        """Steps that the program keeps, and numbers whose values it is given."""
        needed = {number for number in outputs if not isinstance(number, core.Literal)}
        kept, stored = [], []

        def size(numbers):
            return sum(math.prod(self.avals[n].shape) * self.avals[n].dtype.itemsize for n in set(numbers))

        for step in reversed(self.steps):
            wanted = [number for number in step.writes if number in needed]
            if not wanted and not step.equation.effects:
                continue
            read = [r for r in step.reads if not isinstance(r, core.Literal)]
            of_params = [number for number in read if self.origin.get(number)]
            if wanted and all(self.origin.get(number) for number in wanted) and size(wanted) < size(of_params):
                stored += wanted
                continue
            kept.append(step)
            needed |= set(read)
        stored += [number for number in needed if number in self.known and number not in self.constants]
        return kept[::-1], sorted(stored)

    def value(self, number: int) -> Any:
        """Computes a known number."""
        if number not in self.known:
            step = self.made_by[number]
            operands = [r.val if isinstance(r, core.Literal) else self.value(r) for r in step.reads]
            self.known |= dict(zip(step.writes, _run(step.equation, operands), strict=True))
        return self.known[number]

    def names(self, numbers: list[int]) -> dict[int, str]:
        """A name for each value; equal parts of the same parameter have the same."""
        names: dict[int, str] = {}
        taken: dict[str, np.ndarray] = {}
        for number in numbers:
            own, value = self.origin[number], np.asarray(self.value(number))
            base = next(iter(own)) if len(own) == 1 else "computed"
            for name in itertools.chain([base], (f"{base}_{copy}" for copy in itertools.count(1))):
                if name not in taken or _same(taken[name], value):
                    break
            names[number], taken[name] = name, value
        return names


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same bits of the same type."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
