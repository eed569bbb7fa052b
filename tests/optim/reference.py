r"""What the methods define, in float64 from the rows of J: slow, dense, and checked in test_reference.py.

The library works on Gramians in float32. Nothing is shared with it here: cones are projected on by least squares on the
rows, which does not square their condition number, and the concave problems of Nash-MTL and FairGrad are solved for d.

    REFERENCES["mgda"](matrix) -> Reference(d, scale, weights, unique, limit, note)

Used throughout: n_k = |g_k|, u_k = g_k / n_k, and the cone C = {y: J y >= 0} of the directions that hurt no task. A
task is *stuck* if no y in C has <g_k, y> > 0; J is stationary if some task is stuck, strongly if all of them are.

Letters: K tasks, P parameters; g_k the rows of J; d the direction; w weights, d = J^T w; eps = 2.2e-16.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import brentq, nnls

EPS = np.finfo(np.float64).eps
ZERO = 1e-13  # what counts as zero, relative to the terms that cancel
RANK = 1e-12  # of unit rows: smaller singular values, relative to the largest, count as zero


class Reference(NamedTuple):
    """What a method should give.

    Attributes:
      d: f64[P].
      scale: the size of the terms that cancel in d: sum_k |w_k| n_k, and where weights are infinite what is said in the
        method. Never less than |d|. A solver cannot be asked for more than |ours - d| <= tolerance * scale.
      weights: f64[K] with d = J^T w, one choice of many if rows are dependent; None if they are infinite.
      unique: False if the definition allows several d; this is then one of them, said in `note`.
      limit: True if the definition has no solution for this matrix and d is the limit said in `note`.
      note: what is out of the ordinary.
    """

    d: np.ndarray
    scale: float
    weights: np.ndarray | None = None
    unique: bool = True
    limit: bool = False
    note: str = ""


def _from_weights(matrix, weights, **rest) -> Reference:
    return Reference(matrix.T @ weights, float(np.abs(weights) @ _norms(matrix)), weights, **rest)


def _norms(matrix):
    return np.linalg.norm(matrix, axis=1)


def _units(matrix):
    """Rows of norm 1; zero rows stay."""
    norm = _norms(matrix)
    return matrix / np.where(norm > 0, norm, 1.0)[:, None]


def _basis(rows, tolerance=RANK):
    """Orthonormal rows that span the given ones."""
    if not len(rows):
        return np.zeros((0, rows.shape[1]))
    _, size, basis = np.linalg.svd(rows, full_matrices=False)
    return basis[size > tolerance * size[0]] if size[0] > 0 else basis[:0]


def _orthogonal(vectors, basis):
    """Their part orthogonal to an orthonormal basis; twice, so that nothing is left to rounding."""
    for _ in range(2):
        vectors = vectors - vectors @ basis.T @ basis
    return vectors


# Cones.


def project_on_cone(rows: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The point y of {y: rows y >= 0} nearest to x, and v >= 0 with y = x + rows^T v (Moreau).

    scipy's NNLS proposes which constraints are active; the least-squares problem on those is then solved to rounding,
    and constraints enter and leave as in Lawson and Hanson until the optimality conditions hold.

    Raises:
      ArithmeticError: if they do not.
    """
    length, norm, unit = np.linalg.norm(x), _norms(rows), _units(rows)
    if length == 0:
        return np.zeros_like(x), np.zeros(len(rows))
    target = x / length
    try:
        v, _ = nnls(unit.T, -target, maxiter=50 * len(rows))
    except RuntimeError:  # too many iterations
        v = np.zeros(len(rows))
    v[norm == 0] = 0.0
    y = target

    for _ in range(20 * len(rows) + 20):
        active = v > 0
        y, goal = target, np.zeros_like(v)
        if active.any():
            goal[active] = np.linalg.lstsq(unit[active].T, -target, rcond=EPS)[0]
            y = _orthogonal(target, _basis(unit[active]))
        if (goal[active] <= 0).any():  # go as far as the signs allow, and drop what stops us
            step = np.where(active & (goal <= 0), v / np.where(active & (goal <= 0), v - goal, 1.0), np.inf)
            v = np.where(active & (step > step.min()), v + step.min() * (goal - v), 0.0)
            continue
        v = goal
        slack = np.where(active, np.inf, unit @ y)
        if slack.min() >= -1e-15 - 1e-14 * np.linalg.norm(y):
            break
        v[slack.argmin()] = 1e-300  # enters; the next least-squares problem gives its size
    y = np.where(np.linalg.norm(y) <= ZERO, 0.0, y)

    slack, rounding = unit @ y, 1e-14 * (1 + v.sum())
    errors = {
        "J y >= 0": -slack.min() / (1e-14 + 1e-13 * np.linalg.norm(y)),
        "y = x + J^T v": np.abs(target + unit.T @ v - y).max() / rounding,
        "v_k <g_k, y> = 0": np.abs(v * slack).max() / rounding,
    }
    if not max(errors.values()) <= 1:
        raise ArithmeticError(f"The projection violates its optimality conditions, in units of rounding: {errors}")
    return length * y, length * v / np.where(norm > 0, norm, 1.0)


def least_distance(rows: np.ndarray, bound: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """The shortest z with rows z >= bound and its multipliers v >= 0, z = rows^T v; or None and v of a contradiction.

    A contradiction is v >= 0 with rows^T v = 0, bound . v = 1. Zero rows may only have bounds <= 0.

    Reference: Lawson and Hanson, "Solving Least Squares Problems", 1974, algorithm LDP (23.27).
    """
    norm = _norms(rows)
    unit, bound = _units(rows), bound / np.where(norm > 0, norm, 1.0)
    if not (bound > 0).any():
        return np.zeros(rows.shape[1]), np.zeros(len(rows))
    size = np.abs(bound).max()
    last = np.eye(rows.shape[1] + 1)[-1]
    y, v = project_on_cone(np.column_stack([unit, bound / size]), -last)
    if np.linalg.norm(y) == 0:
        return None, v / size / np.where(norm > 0, norm, 1.0)
    # On the active constraints z is the pseudo-inverse of their bounds: more exact than the ratio -y[:-1] / y[-1].
    active = v > 0
    z = np.linalg.lstsq(unit[active], bound[active], rcond=EPS)[0]
    v = np.where(active, v * size / -y[-1], 0.0)
    return z, v / np.where(norm > 0, norm, 1.0)


def stuck(matrix: np.ndarray) -> np.ndarray:
    """bool[K]: tasks that no direction improves without hurting another (zero rows included)."""
    unit = _units(matrix)
    return np.array([np.linalg.norm(project_on_cone(unit, row)[0]) <= 1e-10 for row in unit])


# Quadratic programmes.


def mgda(matrix: np.ndarray) -> Reference:
    """Shortest vector of the convex hull: d = z / |z|^2 for the shortest z with <g_k, z> >= 1; 0 if there is none."""
    norm = _norms(matrix)
    if (norm == 0).any():
        weights = (norm == 0) / (norm == 0).sum()
        return Reference(np.zeros(matrix.shape[1]), 0.0, weights, note="zero rows take all the weight")
    size = norm.min()
    z, v = least_distance(matrix / size, np.ones(len(matrix)))
    weights = v / v.sum()
    if z is None:
        return Reference(np.zeros(matrix.shape[1]), float(weights @ norm), weights, note="stationary")
    return Reference(size * z / (z @ z), float(weights @ norm), weights)


def dual_proj(matrix: np.ndarray, preference: np.ndarray | None = None) -> Reference:
    """Projection of the mean gradient on C."""
    preference = np.full(len(matrix), 1 / len(matrix)) if preference is None else np.asarray(preference)
    mean = preference @ matrix
    if np.linalg.norm(mean) <= ZERO * (np.abs(preference) @ _norms(matrix)):
        mean = np.zeros_like(mean)
    y, v = project_on_cone(matrix, mean)
    return Reference(y, float(np.abs(preference + v) @ _norms(matrix)), preference + v)


def upgrad(matrix: np.ndarray, preference: np.ndarray | None = None) -> Reference:
    """Mean of the projections of the gradients on C."""
    preference = np.full(len(matrix), 1 / len(matrix)) if preference is None else np.asarray(preference)
    d, weights = np.zeros(matrix.shape[1]), np.zeros(len(matrix))
    for share, row, one in zip(preference, matrix, np.eye(len(matrix)), strict=True):
        y, v = project_on_cone(matrix, row)
        d, weights = d + share * y, weights + share * (one + v)
    return Reference(d, float(np.abs(weights) @ _norms(matrix)), weights)


def pcd(matrix: np.ndarray, tau: float = 0.02, norms: np.ndarray | None = None, eps: float = 0.0) -> Reference:
    """Nearest d to g_1 / m_1 with <g_k, d> / m_k >= tau n_k^2 / m_k^2 for k > 1, rescaled to |g_1|.

    `norms`: m before eps, m_k = sqrt(norms_k^2 + eps); by default those of the matrix, as in the first step.
    """
    norm = _norms(matrix)
    divisor = np.sqrt((norm if norms is None else np.asarray(norms)) ** 2 + eps)
    inverse = np.where(divisor > 0, 1 / np.where(divisor > 0, divisor, 1.0), 0.0)
    rows, first = matrix * inverse[:, None], np.eye(len(matrix))[0]
    z, v = least_distance(rows[1:], tau * (rows[1:] ** 2).sum(1) - rows[1:] @ rows[0])
    if z is None:
        return _from_weights(matrix, first, note="contradictory constraints: they are dropped")
    total = first + np.r_[0.0, v]
    d, size = rows[0] + z, np.linalg.norm(rows[0]) + v @ _norms(rows[1:])
    if np.linalg.norm(d) <= ZERO * size:
        return Reference(np.zeros_like(d), float(norm[0]), 0 * first, note="no direction is left")
    factor = norm[0] / np.linalg.norm(d)
    return Reference(factor * d, float(factor * size), factor * total * inverse)


def cagrad(matrix: np.ndarray, c: float = 0.5) -> Reference:
    r"""argmax_d min_k <g_k, d> over |d - g_0| <= c |g_0|, with g_0 the mean gradient; not rescaled.

    For the multiplier t > 0 of the ball, t d is the shortest vector in the hull of the rows g_k + t g_0. |d - g_0|
    falls with t, so that t is the root of a monotone function. If d stays inside the ball for all t > 0, then J is
    stationary, the maximum is 0, and every point of the ball in C attains it: the nearest to g_0 is given (t -> 0).
    """
    uniform = np.full(len(matrix), 1 / len(matrix))
    mean, norm = uniform @ matrix, _norms(matrix)
    radius = c * np.linalg.norm(mean)
    if np.linalg.norm(mean) <= ZERO * norm.mean():
        return Reference(np.zeros_like(mean), float(norm.mean()), 0 * uniform, note="the mean gradient is zero")
    if c == 0:
        return _from_weights(matrix, uniform)

    def excess(log_t):
        """(|d - g_0| - c |g_0|) / (c |g_0|), d and weights of t."""
        t = np.exp(log_t)
        inner = mgda(matrix + t * mean)
        return np.linalg.norm(inner.d / t - mean) / radius - 1, inner.d / t, uniform + inner.weights / t

    inside = dual_proj(matrix)
    if not mgda(matrix).d.any() and np.linalg.norm(inside.d - mean) <= radius * (1 + 1e-9):
        return inside._replace(unique=False, note="every d of the ball with J d >= 0; this is the nearest to the mean")
    # |d - g_0| = |g_w| / t <= max n_k / t: inside the ball from here on.
    high = np.log(norm.max() / radius) + 1
    low = next((high - i for i in range(1, 100) if excess(high - i)[0] >= 0), None)
    if low is None:
        raise ArithmeticError("CAGrad: no multiplier puts d outside the ball, and yet J is not stationary")
    _, d, weights = excess(brentq(lambda log_t: excess(log_t)[0], low, low + 1, xtol=1e-15, rtol=4 * EPS))
    d = mean + (d - mean) * (radius / np.linalg.norm(d - mean))
    return Reference(d, float(np.abs(weights) @ norm), weights)


# Concave maximisation.


def fairgrad(matrix: np.ndarray, alpha: float = 1.0) -> Reference:
    r"""argmax_d sum_k u(<g_k, d>) - |d|^2 / 2, u(s) = s^(1 - alpha) / (1 - alpha) or log s: (G w)_k = w_k^(-1/alpha).

    Its stationarity condition is d = sum_k w_k g_k with w_k = <g_k, d>^-alpha. If tasks are stuck there is no w (theirs
    are infinite). The limit is the maximum over the tasks that are not, among directions in C: d = 0 if there are none.
    It is also that of G + eps I as eps -> 0. Then `scale` is what each task alone would contribute, sum_k |d_k|.

    Damped Newton on d in an orthonormal basis of its span.
    """
    if alpha == 0:
        return _from_weights(matrix, np.ones(len(matrix)))
    norm, unit = _norms(matrix), _units(matrix)
    present = norm > 0
    held = stuck(matrix)
    alone = norm[present] ** ((1 - alpha) / (1 + alpha))
    note = f"{held.sum()} of {len(matrix)} tasks cannot be improved" if held.any() else ""
    if held.all():
        return Reference(np.zeros(matrix.shape[1]), float(alone.sum()), None, limit=True, note=note)

    free = _orthogonal(unit[~held], _basis(unit[held]))
    basis = _basis(free)
    rows = free @ basis.T
    # d = size x: the coefficients of u are then at most 1.
    size = (norm[~held] ** (1 - alpha)).max() ** (1 / (1 + alpha))
    factor = norm[~held] ** (1 - alpha) / size ** (1 + alpha)
    start = sum(project_on_cone(rows, row)[0] for row in rows)
    x = _maximize(rows, factor, alpha, start)
    share = size * factor * (rows @ x) ** -alpha  # w_k n_k
    d = size * basis.T @ x
    if held.any():
        return Reference(d, float(share.sum() + alone.sum()), None, limit=True, note=note)
    return Reference(d, float(share.sum()), share / norm)


def nash(matrix: np.ndarray, max_norm: float | None = None) -> Reference:
    """FairGrad with alpha = 1: (G w)_k = 1 / w_k, hence |d|^2 is the number of tasks. `max_norm` clips |d|."""
    exact = fairgrad(matrix, 1.0)
    length = np.linalg.norm(exact.d)
    factor = 1.0 if max_norm is None or length <= max_norm else max_norm / length
    weights = None if exact.weights is None else factor * exact.weights
    return exact._replace(d=factor * exact.d, scale=factor * exact.scale, weights=weights)


def _maximize(rows, factor, alpha, x):
    """argmax_x sum_k factor_k u(<rows_k, x>) - |x|^2 / 2 from an x with rows x > 0."""

    def objective(x):
        s = rows @ x
        if not (s > 0).all():
            return np.inf
        utility = np.log(s) if alpha == 1 else s ** (1 - alpha) / (1 - alpha)
        return x @ x / 2 - factor @ utility

    s = rows @ x
    x = x * (factor @ s ** (1 - alpha) / (x @ x)) ** (1 / (1 + alpha))  # the best on its ray
    value, full = objective(x), 0
    for _ in range(2000):
        s = rows @ x
        weight = factor * s**-alpha
        root = np.sqrt(alpha * weight / s)
        # Newton's system H = I + rows^T root^2 rows as a least-squares problem, gradient = [I, rows^T root] residual.
        design = np.vstack([np.eye(len(x)), root[:, None] * rows])
        step = -np.linalg.lstsq(design, np.r_[x, -weight / root], rcond=None)[0]
        gap = np.linalg.norm(design @ step)
        if gap <= 1e-6 * np.linalg.norm(x) and (rows @ (x + step) > 0).all():
            # Converges quadratically: two full steps from here reach rounding.
            x, full = x + step, full + 1
            if full == 3:
                return x
            continue
        slope, length = -(gap**2), 1.0
        while not (objective(x + length * step) <= value + 0.1 * length * slope):
            length /= 2
            if length < 1e-12:
                raise ArithmeticError(f"FairGrad: no ascent at a Newton decrement of {gap}")
        x = x + length * step
        value = objective(x)
    raise ArithmeticError("FairGrad: Newton's method did not converge")


# Linear algebra.


def imtl_g(matrix: np.ndarray, pinv: Literal["cosine", "gramian"] = "cosine", rank: float = RANK) -> Reference:
    r"""d = sum_k w_k g_k with equal <u_k, d> and sum_k w_k = 1: w proportional to N^-1 R^+ 1, R the cosine matrix.

    'gramian': w proportional to G^+ n, as TorchJD has it: the same for independent rows. If rows are dependent, there
    may be no solution (`limit` is True) or several with different d (`unique` is False); the pseudo-inverse chooses.
    Zero rows have weight 0, and singular values of the (unit) rows below `rank` of the largest count as zero. d = 0 if
    the weights sum to zero.
    """
    norm = _norms(matrix)
    unit, inverse = _units(matrix), np.where(norm > 0, 1 / np.where(norm > 0, norm, 1.0), 0.0)
    rows, right = (unit, (norm > 0).astype(float)) if pinv == "cosine" else (matrix, norm)
    left, size, _ = _svd(rows, rank)
    v = left @ (_project(right, left) / size**2) * (inverse if pinv == "cosine" else 1.0)
    if abs(v.sum()) <= 1e-12 * np.abs(v).sum():
        return Reference(np.zeros(matrix.shape[1]), float(norm.max()), 0 * v, True, True, "the weights sum to zero")
    # U d = t 1 asks for 1 in the range of U; then a = N w is known up to the kernel of U^T, and t up to 1/n on it.
    left, _, _ = _svd(unit, rank)
    solvable, unique = (
        np.linalg.norm(_orthogonal(vector, left.T)) <= 1e-9 * np.linalg.norm(vector)
        for vector in ((norm > 0).astype(float), inverse)
    )
    note = "" if solvable and unique else "the rows are dependent: the choice of the pseudo-inverse"
    return _from_weights(matrix, v / v.sum(), unique=bool(unique or not solvable), limit=not solvable, note=note)


def aligned_mtl(
    matrix: np.ndarray,
    scale_mode: Literal["min", "median", "rmse"] = "min",
    preference: np.ndarray | None = None,
    eps: float = EPS,
) -> Reference:
    r"""d = s W V^T w for the thin singular value decomposition J = V diag(sigma) W^T, w = 1 by default.

    s: the least sigma, the median one (the lower of two), or their root mean square. Squared singular values below
    K `eps` of the largest do not count. `note` tells if one lies within a factor 100 of that, where d jumps.
    """
    preference = np.ones(len(matrix)) if preference is None else np.asarray(preference)
    if not matrix.any():
        return _from_weights(matrix, preference, note="all gradients are zero")
    tolerance = np.sqrt(len(matrix) * eps)
    left, size, right = _svd(matrix, tolerance)
    values = np.linalg.svd(matrix, compute_uv=False) / size[0]
    close = ((values > tolerance / 10) & (values < 10 * tolerance)).any()
    scale = {"min": size[-1], "median": size[len(size) // 2], "rmse": np.sqrt((size**2).mean())}[scale_mode]
    weights = left @ ((preference @ left) / size) * scale
    reference = _from_weights(matrix, weights, note="the rank is a matter of rounding" if close else "")
    return reference._replace(d=scale * (preference @ left) @ right)


def config(matrix: np.ndarray, preference: np.ndarray | None = None, rank: float = RANK) -> Reference:
    r"""x = U^+ 1 on unit rows; d = (sum_k <g_k, x>) x / |x|^2; 0 if x = 0. Zero rows are left out of x.

    Singular values of U below `rank` of the largest count as zero.
    """
    unit, norm = _units(matrix), _norms(matrix)
    target = np.where(norm > 0, np.ones(len(matrix)) if preference is None else np.asarray(preference), 0.0)
    if not matrix.any():
        return Reference(np.zeros(matrix.shape[1]), 0.0, np.zeros(len(matrix)), note="all gradients are zero")
    left, size, right = _svd(unit, rank)
    along = _project(target, left)
    x = (along / size) @ right
    if not along.any():
        return Reference(np.zeros_like(x), float(norm.sum()), 0 * target, note="no common direction")
    factor = (matrix @ x).sum() / (x @ x)
    weights = factor * (left @ (along / size**2)) / np.where(norm > 0, norm, 1.0)
    return Reference(factor * x, float(max(np.abs(weights) @ norm, norm.sum())), weights)


def _svd(rows, tolerance):
    """Thin decomposition without the singular values below tolerance x the largest."""
    left, size, right = np.linalg.svd(rows, full_matrices=False)
    kept = size > tolerance * size[0]
    return left[:, kept], size[kept], right[kept]


def _project(vector, columns):
    """Coefficients in an orthonormal basis, without what is zero to rounding: small singular values may divide them."""
    along = vector @ columns
    return np.where(np.abs(along) <= ZERO * np.linalg.norm(vector), 0.0, along)


# Surgery.


def pcgrad(matrix: np.ndarray, orders: Sequence | None = None, reduction: Literal["sum", "mean"] = "sum") -> Reference:
    """For each i, walk over j != i in the order orders[i]: where <g_i', g_j> < 0, remove the part of g_i' along g_j.

    Orders are 0, ..., K - 1 if not given. `scale` sums the absolute coefficients of all g_i'.
    """
    return gradvac(matrix, orders, reduction=reduction)[0]


def gradvac(
    matrix: np.ndarray,
    orders: Sequence | None = None,
    targets: np.ndarray | None = None,
    beta: float = 1e-2,
    reduction: Literal["sum", "mean"] = "sum",
) -> tuple[Reference, np.ndarray]:
    r"""As PCGrad, towards a target cosine p_ij instead of 0, which then moves to (1 - beta) p_ij + beta c.

    Where c = cos(g_i', g_j) < p_ij = p: g_i' += |g_i'| (p sqrt(1 - c^2) - c sqrt(1 - p^2)) / (|g_j| sqrt(1 - p^2)) g_j.
    Zero gradients neither move nor count. c is the cosine before the move.

    Returns:
      The reference, and the new targets f64[K, K]. Targets are zero at first, which makes the first step PCGrad.
    """
    num_tasks = len(matrix)
    orders = [range(num_tasks)] * num_tasks if orders is None else orders
    targets = np.zeros((num_tasks, num_tasks)) if targets is None else np.array(targets)
    norm, coefficients = _norms(matrix), np.eye(num_tasks)
    for i, order in enumerate(orders):
        gradient = matrix[i]
        for j in order:
            size = np.linalg.norm(gradient)
            # What is left of a gradient that was removed altogether is rounding.
            if j == i or norm[j] == 0 or size <= ZERO * np.abs(coefficients[i]) @ norm:
                continue
            cosine, target = np.clip(gradient @ matrix[j] / (size * norm[j]), -1, 1), targets[i, j]
            if cosine < target:
                step = size / norm[j] * (target * np.sqrt((1 - cosine**2) / (1 - target**2)) - cosine)
                gradient = gradient + step * matrix[j]
                coefficients[i, j] += step
            targets[i, j] = (1 - beta) * target + beta * cosine
    share = 1.0 if reduction == "sum" else 1 / num_tasks
    reference = _from_weights(matrix, share * coefficients.sum(0))
    return reference._replace(scale=float(share * (np.abs(coefficients) @ norm).sum())), targets


def krum(matrix: np.ndarray, num_byzantine: int = 0, num_selected: int = 1, squared: bool = True) -> Reference:
    """Mean of the rows with the least sum of (squared) distances to their K - num_byzantine - 2 nearest others.

    The paper squares the distances, TorchJD does not. `unique` is False if a tie decides; the first row wins.
    """
    num_tasks = len(matrix)
    if num_tasks < num_byzantine + 3:
        raise ValueError(f"Krum needs num_byzantine + 3 = {num_byzantine + 3} rows, got {num_tasks}")
    distance = np.array([np.delete(_norms(matrix - row), i) for i, row in enumerate(matrix)])
    score = np.sort(distance ** (2 if squared else 1), 1)[:, : num_tasks - num_byzantine - 2].sum(1)
    order = np.argsort(score, kind="stable")
    chosen, left = score[order[:num_selected]], score[order[num_selected:]]
    unique = not len(left) or left[0] - chosen[-1] > 1e-9 * score.max()
    weights = np.isin(np.arange(num_tasks), order[:num_selected]) / num_selected
    return _from_weights(matrix, weights, unique=unique, note="" if unique else "a tie")


REFERENCES: dict[str, Callable[..., Reference]] = {
    "mgda": mgda,
    "upgrad": upgrad,
    "dual_proj": dual_proj,
    "cagrad": cagrad,
    "nash": nash,
    "fairgrad": fairgrad,
    "imtl_g": imtl_g,
    "aligned_mtl": aligned_mtl,
    "config": config,
    "pcgrad": pcgrad,
    "gradvac": lambda *args, **hyper: gradvac(*args, **hyper)[0],
    "pcd": pcd,
    "krum": krum,
}
