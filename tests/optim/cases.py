r"""Gradient matrices that break solvers, and samplers of matrices whose kind is known by construction.

A matrix J f64[K, P] of per-task gradients (rows g_k) is

    strongly stationary   if J^T v = 0 for some v > 0:            no direction improves a task without hurting another;
    weakly stationary     if only for some v >= 0, v != 0:        some tasks cannot be improved together, others can;
    not stationary        else:                                    J d > 0 for some d.

Exactly one of the three holds (theorems of Gordan and Stiemke). Every entry is exactly representable in float32, and
stationarity is exact, not to rounding: it is built on integers and carried by maps that keep it, so that a solver in
float32 and a reference in float64 see the same problem.

Letters: K tasks, P parameters.
"""

from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["none", "weak", "strong"]
GRID = 2.0**-7  # of the random integers: normal values to two digits, and sums of many still exact in float32


class Case(NamedTuple):
    """matrix f64[K, P]; kind of stationarity; scale: what the whole matrix was multiplied by."""

    matrix: np.ndarray
    kind: Kind
    scale: float = 1.0


def single(matrix) -> np.ndarray:
    """Rounded to the nearest float32, as float64."""
    return np.asarray(np.asarray(matrix, np.float32), np.float64)


# Samplers, for property tests.


def normal(rng: np.random.Generator, num_tasks: int, num_params: int, rank: int | None = None) -> np.ndarray:
    """Independent normal entries to two digits; with a `rank`, a product of two such matrices of small integers."""
    if rank is None:
        return GRID * np.round(rng.normal(size=(num_tasks, num_params)) / GRID)
    if not 0 <= rank <= min(num_tasks, num_params):
        raise ValueError(f"rank must be between 0 and min(K, P) = {min(num_tasks, num_params)}, got {rank}")
    left, right = rng.integers(-8, 9, (num_tasks, rank)), rng.integers(-8, 9, (rank, num_params))
    left[:rank, :rank] += 32 * np.eye(rank, dtype=int)  # diagonally dominant enough not to lose rank by chance
    right[:rank, :rank] += 32 * np.eye(rank, dtype=int)
    return GRID * rng.permutation(left @ right, axis=0)


def strongly_stationary(rng: np.random.Generator, num_tasks: int, num_params: int) -> np.ndarray:
    """Some combination with weights 1, 2 and 3 is exactly zero; the last such row is the sum of the others."""
    if num_tasks < 2:
        raise ValueError("One non-zero gradient is never stationary: strongly_stationary needs two tasks")
    rows = normal(rng, num_tasks - 1, num_params)
    rows = np.vstack([rows, -rng.integers(1, 4, num_tasks - 1) @ rows])
    return rng.permutation(rows, axis=0)


def weakly_stationary(rng: np.random.Generator, num_tasks: int, num_params: int) -> np.ndarray:
    """At least two tasks oppose one another exactly; at least one can be improved without changing those."""
    if num_tasks < 3 or num_params < 2:
        raise ValueError("weakly_stationary needs three tasks and two parameters")
    num_stuck = int(rng.integers(2, num_tasks))
    stuck = np.hstack([np.zeros((num_stuck, 1)), strongly_stationary(rng, num_stuck, num_params - 1)])
    return _mix(rng, np.vstack([stuck, _ahead(rng, num_tasks - num_stuck, num_params)]))


def non_stationary(rng: np.random.Generator, num_tasks: int, num_params: int) -> np.ndarray:
    """All tasks improve along some direction, though it is a small part of most gradients."""
    return _mix(rng, _ahead(rng, num_tasks, num_params))


def _ahead(rng, num_tasks, num_params):
    """Rows whose first entry is positive."""
    rows = normal(rng, num_tasks, num_params)
    rows[:, 0] = GRID * rng.integers(16, 64, num_tasks)
    return rows


def _mix(rng, matrix):
    """J M for an integer M of determinant 1, which keeps the kind of J, and a new order of the tasks."""
    size = matrix.shape[1]
    mixer = np.eye(size, dtype=int) + np.tril(
        rng.integers(-1, 2, (size, size)) * (rng.random((size, size)) < 3 / size), -1
    )
    order = rng.permutation(size)
    return rng.permutation(matrix @ mixer[order][:, order], axis=0)


# The table.


def _table() -> dict[str, Case]:
    rng = np.random.default_rng(2024)
    table = {}

    def add(name, matrix, kind, scale=1.0):
        table[name] = Case(np.asarray(matrix, np.float64), kind, scale)

    # Generic. Many tasks in few dimensions are stationary.
    for num_tasks, num_params, kind in (
        (2, 2, "none"),
        (2, 10, "none"),
        (3, 5, "none"),
        (4, 6, "none"),
        (5, 5, "none"),
        (8, 4, "strong"),
        (8, 20, "none"),
        (10, 3, "strong"),
        (16, 100, "none"),
        (20, 10, "none"),
        (40, 256, "none"),
        (64, 256, "none"),
        (64, 16, "strong"),
    ):
        add(f"normal {num_tasks}x{num_params}", normal(rng, num_tasks, num_params), kind)
    for num_tasks, num_params, rank, kind in (
        (4, 6, 1, "strong"),
        (4, 6, 2, "strong"),
        (4, 6, 3, "none"),
        (9, 11, 3, "strong"),
        (9, 11, 6, "none"),
        (9, 11, 8, "none"),
    ):
        add(f"normal {num_tasks}x{num_params} of rank {rank}", normal(rng, num_tasks, num_params, rank), kind)
    add("the 2x3 of TorchJD", [[-4, 1, 1], [6, 1, 1]], "none")
    add("orthogonal rows", np.diag([1.0, 2.0, 4.0]), "none")
    add("no conflict", np.abs(normal(rng, 4, 6)) + GRID, "none")

    # One task, one parameter, zeros.
    add("one task", normal(rng, 1, 5), "none")
    add("one task and one parameter", [[-1.5]], "none")
    add("one parameter, agreeing", [[0.5], [2.0], [1.0]], "none")
    add("one parameter, conflicting", [[0.5], [-2.0], [1.0]], "strong")
    add("one parameter, one zero", [[0.5], [0.0], [1.0]], "weak")
    rows = non_stationary(rng, 4, 6)
    add("a zero row", rows * np.array([[1.0], [0.0], [1.0], [1.0]]), "weak")
    add("a zero row beside opposite rows", np.vstack([rows[:1], 0 * rows[:1], -rows[:1]]), "strong")
    add("all zero", np.zeros((3, 4)), "strong")
    add("one task, zero", np.zeros((1, 4)), "strong")

    # Parallel rows.
    row = normal(rng, 1, 6)
    add("identical", np.repeat(row, 4, 0), "none")
    add("an identical pair", rows[[0, 0, 1]], "none")
    add("collinear", row * np.array([[1.0], [2.0], [0.5], [7.0]]), "none")
    add("opposite", row * np.array([[1.0], [-1.0]]), "strong")
    add("opposite, 1 to 3", row * np.array([[1.0], [-3.0]]), "strong")
    add("opposite, two against two", row * np.array([[1.0], [-1.0], [1.0], [-1.0]]), "strong")
    add("opposite, and an orthogonal row", [[1.0, 2, 0], [-1, -2, 0], [2, -1, 1]], "weak")
    cosine = single([[1.0, 0.0, 0.0], [0.99, np.sqrt(1 - 0.99**2), 0.0]])
    add("a pair at cosine 0.99", cosine, "none")
    add("a pair at cosine -0.99", cosine * np.array([[1.0], [-1.0]]), "none")

    # Stationary: J^T v = 0 exactly.
    for num_tasks, num_params in ((3, 5), (4, 6), (5, 4), (6, 10), (7, 12), (8, 20)):
        add(f"strongly stationary {num_tasks}x{num_params}", strongly_stationary(rng, num_tasks, num_params), "strong")
    uneven = normal(rng, 3, 6)
    add("strongly stationary, weights 1 to 1000", np.vstack([uneven, -np.array([1.0, 30, 1000]) @ uneven]), "strong")
    add("simplex vertices", np.eye(4) - 0.25, "strong")
    add("weakly stationary 4x6", weakly_stationary(rng, 4, 6), "weak")
    add("weakly stationary 8x20", weakly_stationary(rng, 8, 20), "weak")

    # Nearly so. The small part is 2^-20, about 1e-6.
    pair, small = normal(rng, 2, 8), 2.0**-20 * np.round(8 * rng.normal(size=(1, 8))) / 8
    add("nearly dependent", np.vstack([pair, pair[:1] + pair[1:] + small]), "none")
    add("nearly stationary", np.vstack([pair, -pair[:1] - pair[1:] + small]), "none")
    add("nearly identical", np.vstack([pair[:1], pair[:1] + small]), "none")
    add("nearly opposite", np.vstack([pair[:1], -pair[:1] + small]), "none")
    camp = normal(rng, 1, 64)
    camps = np.repeat(camp, 8, 0) * np.array([[1.0], [1], [1], [1], [-1], [-1], [-1], [-1]])
    add("two camps", single(camps + 0.1 * normal(rng, 8, 64)), "none")

    # Scales.
    generic = normal(rng, 5, 12)
    for power in (2, 4, 8):
        add(
            f"row norms 1e-{power} to 1e{power}",
            single(generic * np.logspace(-power, power, 5)[[2, 0, 4, 1, 3], None]),
            "none",
        )
    add("one row ten times as long", generic * np.array([[1.0], [10], [1], [1], [1]]), "none")
    conflicting = non_stationary(rng, 4, 6)
    for scale in (1e-10, 1e-5, 1e5, 1e10):
        add(f"scale {scale:.0e}", single(scale * conflicting), "none", scale)
    for power in (-33, 33):
        name = f"strongly stationary, scale 2^{power}"
        add(name, 2.0**power * strongly_stationary(rng, 4, 6), "strong", 2.0**power)
    return table


CASES = _table()
