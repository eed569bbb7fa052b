"""Every objective method on the landscape of CAGrad and Nash-MTL: who reaches the Pareto front, and where.

Paper:   Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, section 5.1;
         Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, section 5.1.
Claims:  descent on the sum of the losses gets stuck on its way to the front, MGDA and PCGrad end anywhere on it, CAGrad
         where the sum is least. If one loss is scaled by 0.1, Sum, PCGrad and MGDA miss the front from some starts, and
         Nash-MTL reaches balanced points from all, whatever the scale.
Data:    none; `landscape.py` holds the functions. Five starting points, two scales of the first loss, Adam at 1e-3 for
         100,000 steps as in CAGrad's code; Nash-MTL's schedule is the first 35,000, and its claims are judged there.
Command: python experiments/objectives/toy.py              # less than two minutes on two CPU cores
Results: experiments/results/objectives_toy.json, experiments/results/figures/objectives_toy.png
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # as in experiments/tabular/multitab.py

import jax
import jax.numpy as jnp
import landscape
import methods
import numpy as np
import optax

import mtjax
from mtjax import plots_objectives as plots
from mtjax.train import command, report, tables
from mtjax.train.config import override

ROOT = pathlib.Path(__file__).resolve().parent.parent
SYSTEM = "objectives_toy"
BASELINE = "Sum"
REACHED = 0.25
"""A path has arrived if its last point is this close to the front in loss space, whose ends are 27.7 apart."""
NASH_STEPS = 35_000
"""Schedule of Nash-MTL, by which its claims are judged; paths that go on begin with it."""
BATCH = 12
"""Rows of a batch. They are all alike, but methods on several independent batches cut it into two or three."""


TABLE = methods.METHODS | {
    "EPO": methods.Entry(functools.partial(mtjax.optim.epo, (0.5, 0.5)), "Gramian"),
    "PMTL": methods.Entry(functools.partial(mtjax.optim.pmtl, ((0.8, 0.2), (0.5, 0.5), (0.2, 0.8)), 1), "Gramian"),
}
"""The methods of all experiments, and two that ask for a preference: here one for equal losses."""


SLOW = ("EPO", "F-CAGrad")
"""As long as all others together: only in preset paper, or by name."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and budgets. `--set steps=1000` overrides any field.

    Attributes:
      steps: number of updates.
      learning_rate: of Adam.
      records: points of a path that are kept, besides the start.
      scales: scale of the first loss; the second has scale 1.
      seeds: runs of a method that draws random numbers; others are run once.
      methods: their names; by default all but the two that take longest.
    """

    steps: int = 100_000
    learning_rate: float = 1e-3
    records: int = 1000
    scales: tuple[float, ...] = (1.0, 0.1)
    seeds: int = 3
    methods: tuple[str, ...] = tuple(name for name in TABLE if name not in SLOW)

    def __post_init__(self):
        if min(self.steps, self.records, self.seeds) < 1 or self.steps % self.records:
            raise ValueError(
                f"steps, records and seeds must be >= 1 and steps a multiple of records, got {self.steps}, "
                f"{self.records} and {self.seeds}"
            )
        if not self.scales or min(self.scales) <= 0 or self.learning_rate <= 0:
            raise ValueError(f"scales and learning_rate must be > 0, got {self.scales} and {self.learning_rate}")


DEMO = Config()
SMOKE = Config(steps=400, learning_rate=0.05, records=20, seeds=2, methods=("Sum", "PCGrad"))
PAPER = Config(seeds=5, methods=tuple(TABLE))
PRESETS = {"smoke": SMOKE, "demo": DEMO, "paper": PAPER}

PUBLISHED: dict[str, dict[str, Any]] = {
    "FAMO": {"weight_decay": 0.0},  # "the objective is not changing", as the authors' script says
}
"""Hyper-parameters that authors chose for this landscape; all others are those of the papers in general."""


@dataclasses.dataclass
class Arguments:
    """Draw the trajectories of all objective methods on the landscape of the CAGrad and Nash-MTL papers."""

    preset: Literal["smoke", "demo", "paper"] = "demo"
    """smoke: seconds, few methods. demo: the published schedules. paper: also the slowest two methods, more seeds."""
    methods: tuple[str, ...] = ()
    """Methods to run; by default all but two. `--methods list` names them."""
    seeds: int | None = None
    """Runs of a method that draws random numbers."""
    run: pathlib.Path | None = None
    """Run directory; by default a new one under runs/objectives_toy."""
    set: Annotated[tuple[str, ...], "FIELD=VALUE"] = ()
    """Override configuration fields, e.g. --set steps=3500 learning_rate=0.01."""


@dataclasses.dataclass(frozen=True)
class Paths:
    """What one method did; letters: C scales, S seeds, P starting points, n records.

    Attributes:
      points: f32[C, S, P, n + 1, 2], parameters over time.
      every: steps between two records.
      compile_s: seconds to trace and compile.
      run_s: seconds to run.
    """

    points: np.ndarray
    every: int
    compile_s: float
    run_s: float

    @functools.cached_property
    def places(self) -> landscape.Place:
        """Distance to the front and position along it over time, arrays [C, S, P, n + 1]."""
        return landscape.place(self.points)

    def arrived(self, step: int | None = None) -> np.ndarray:
        """bool[C, S, P]: the path is on the front at a step, by default the last one."""
        return self.places.distance[..., -1 if step is None else step // self.every] < REACHED

    @property
    def arrival(self) -> np.ndarray:
        """f64[C, S, P]: the step from which on a path is on the front; NaN if it is not there at the end."""
        away = ~(self.places.distance < REACHED)
        last = away.shape[-1] - 1 - np.argmax(away[..., ::-1], axis=-1)
        return np.where(self.arrived(), self.every * np.where(away.any(-1), last + 1, 0), np.nan)

    @property
    def imbalance(self) -> np.ndarray:
        """f64[C, S]: mean over the starting points of how far from the middle of the front a path ends.

        0 is the middle, 1 an end of the front; NaN if a path does not arrive.
        """
        return np.where(self.arrived().all(-1), np.abs(2.0 * self.places.share[..., -1] - 1.0).mean(-1), np.nan)


def left_out(entry: methods.Entry) -> str | None:
    """Why a method has no place on this landscape; None if it has."""
    if entry.min_tasks > len(landscape.TASKS):
        return f"needs {entry.min_tasks} tasks"
    return "works on the features of a shared trunk, and here is none" if entry.features else None


def make_paths(method: mtjax.optim.Method, config: Config) -> Callable[[Any, Any, Any], jax.Array]:
    """The program of one method: `(scales f32[C], seeds i32[S], starts f32[P, 2]) -> f32[C, S, P, n + 1, 2]`."""
    adam = optax.adam(config.learning_rate)

    def loss_fn(params, batch):
        return landscape.losses(params["x"], batch["scale"][0])

    update = mtjax.value_and_update(loss_fn, method)

    def path(scale, seed, start):
        batch = {"scale": jnp.broadcast_to(jnp.stack([scale, jnp.ones_like(scale)]), (BATCH, 2))}

        def step(_, state):
            params, adam_state, method_state = state
            _, gradient, method_state = update(params, method_state, batch)
            updates, adam_state = adam.update(gradient, adam_state, params)
            params = optax.apply_updates(params, updates)
            if mtjax.optim.observes(method):
                method_state = mtjax.optim.observe(method, method_state, loss_fn(params, batch))
            return params, adam_state, method_state

        def record(state, _):
            state = jax.lax.fori_loop(0, config.steps // config.records, step, state)
            return state, state[0]["x"]

        params = {"x": start}
        method_state = reseed(mtjax.optim.init(method, params, num_tasks=2), seed)
        _, points = jax.lax.scan(record, (params, adam.init(params), method_state), None, length=config.records)
        return jnp.concatenate([start[None], points])

    over_starts = jax.vmap(path, (None, None, 0))
    return jax.vmap(jax.vmap(over_starts, (None, 0, None)), (0, None, None))


def lanes(method: mtjax.optim.Method, config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the program of a method is run on; one seed is enough where nothing is random."""
    seeds = np.arange(config.seeds if is_random(method) else 1)
    return np.asarray(config.scales, np.float32), seeds, np.asarray(landscape.STARTS, np.float32)


def follow(method: mtjax.optim.Method, config: Config) -> Paths:
    """Runs a method from all starting points, at all scales and with all seeds at once."""
    arguments = lanes(method, config)
    began = time.perf_counter()
    compiled = jax.jit(make_paths(method, config)).lower(*arguments).compile()
    ready = time.perf_counter()
    points = np.asarray(compiled(*arguments))
    return Paths(points, config.steps // config.records, ready - began, time.perf_counter() - ready)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_random(method: mtjax.optim.Method) -> bool:
    """Whether the state of a method holds a random key."""
    state = jax.eval_shape(lambda: mtjax.optim.init(method, {"x": jnp.zeros(2)}, num_tasks=2))
    return any(map(_is_key, jax.tree.leaves(state)))


def reseed(state: Any, seed: jax.Array) -> Any:
    """The state with its random keys made those of a seed; one that holds none is as it was."""
    return jax.tree.map(lambda leaf: jax.random.fold_in(leaf, seed) if _is_key(leaf) else leaf, state)


# What was found.


def rows(found: Mapping[str, Paths], config: Config) -> list[report.Row]:
    """Report rows: for each scale how many starts arrive, when the last of them does, and the imbalance."""
    result = []
    for name, paths in found.items():
        for c, scale in enumerate(config.scales):
            metrics = {
                "starts on the front": (paths.arrived()[c].sum(-1), True),
                "steps until all are": (paths.arrival[c].max(-1), False),
                "imbalance": (paths.imbalance[c], False),
            }
            task = task_name(scale)
            for metric, (values, higher) in metrics.items():
                made = report.result_rows(name, {task: {metric: values}}, baseline=BASELINE)
                result += [row | {"higher_is_better": higher, "family": TABLE[name].family} for row in made]
    return result


def task_name(scale: float) -> str:
    return f"loss 1 x {scale:g}"


def findings(found: Mapping[str, Paths], config: Config) -> list[report.Finding]:
    """The claims of the papers, as far as the methods and scales of this run can speak to them."""
    claims = [
        claim
        for scale, judge in ((1.0, _claims_of_cagrad), (0.1, _claims_of_nash_mtl))
        if scale in config.scales
        for claim in judge(found, config, config.scales.index(scale))
    ]
    return claims or [report.Finding("your own comparison", "-", "-", None, "no claim of the papers was tested")]


def _claims_of_cagrad(found: Mapping[str, Paths], config: Config, c: int) -> Iterator[report.Finding]:
    """Both losses at scale 1, judged at the last step."""
    where = f"{task_name(config.scales[c])}, {config.steps:,} steps"
    for name in ("CAGrad", "IMTL-G"):
        if {"Sum", name} <= found.keys():
            stuck, ours = (_count(found[method], c) for method in ("Sum", name))
            claim = f"{name} reaches the front from all starts, descent on the sum does not ({where})"
            reason = f"closer than {REACHED:g} to the front, whose ends are 27.7 apart"
            yield report.Finding(claim, f"Sum {_of(stuck)}", f"{name} {_of(ours)}", ours == _ALL > stuck, reason)
    others = [name for name in ("MGDA", "PCGrad") if name in found]
    if "CAGrad" in found and others:
        shares = {name: found[name].places.share[c, ..., -1].ravel() for name in (*others, "CAGrad")}
        spans = {name: f"{name} {share.min():.2f} to {share.max():.2f}" for name, share in shares.items()}
        close = np.abs(shares["CAGrad"] - 0.5).max() < 0.05
        claim = f"CAGrad ends where the sum is least, {_listing(others)} anywhere on the front ({where})"
        reason = "position along the front: 0 best of loss 2, 1 best of loss 1; the sum is least at 0.5"
        holds = bool(close and all(np.ptp(shares[name]) > 0.1 for name in others))
        yield report.Finding(claim, ", ".join(spans[name] for name in others), spans["CAGrad"], holds, reason)


def _claims_of_nash_mtl(found: Mapping[str, Paths], config: Config, c: int) -> Iterator[report.Finding]:
    """The first loss at scale 0.1, judged at the last step of that paper's schedule."""
    step = min(NASH_STEPS, config.steps)
    where = f"{task_name(config.scales[c])}, {step:,} steps"
    for name in ("Sum", "PCGrad", "MGDA"):
        if name in found:
            theirs = _count(found[name], c, step)
            claim = f"{name} misses the front from some starts ({where})"
            yield report.Finding(claim, _of(_ALL), _of(theirs), theirs < _ALL, _late(found[name], c))
    for name in ("Nash-MTL", "IMTL-G", "FAMO"):
        if name in found:
            ours = _count(found[name], c, step)
            claim = f"{name} reaches the front from all starts ({where})"
            baseline = f"Sum {_of(_count(found['Sum'], c, step))}" if "Sum" in found else "-"
            yield report.Finding(claim, baseline, _of(ours), ours == _ALL, _late(found[name], c))
    if {"CAGrad", "Nash-MTL"} <= found.keys():
        theirs, ours = (float(found[name].imbalance[c].mean()) for name in ("CAGrad", "Nash-MTL"))
        holds = None if np.isnan([ours, theirs]).any() else ours < theirs
        claim = f"Nash-MTL ends nearer to the middle of the front than CAGrad ({task_name(config.scales[c])})"
        reason = "imbalance at the last step: 0 middle, 1 end of the front; n/a if a start does not arrive"
        texts = (report.format_mean(theirs), report.format_mean(ours))
        yield report.Finding(claim, f"CAGrad {texts[0]}", f"Nash-MTL {texts[1]}", holds, reason)
    if "Nash-MTL" in found and 1.0 in config.scales:
        moved = {
            name: np.abs(np.diff(found[name].places.share[[config.scales.index(1.0), c], ..., -1], axis=0)).max()
            for name in ("CAGrad", "Nash-MTL")
            if name in found
        }
        texts = {name: f"{name} {shift:.3f}" for name, shift in moved.items()}
        claim = f"where Nash-MTL ends does not depend on the scale of a loss (1 against {config.scales[c]:g})"
        reason = "largest shift of an end along the front, of length 1; less than 0.02 counts as none"
        ours = texts.pop("Nash-MTL")
        yield report.Finding(claim, "".join(texts.values()) or "-", ours, bool(moved["Nash-MTL"] < 0.02), reason)


_ALL = len(landscape.STARTS)


def _count(paths: Paths, c: int, step: int | None = None) -> float:
    """Starts on the front at a step, mean over seeds."""
    return float(paths.arrived(step)[c].sum(-1).mean())


def _of(count: float) -> str:
    return f"{count:.3g} of {_ALL} starts"


def _late(paths: Paths, c: int) -> str:
    last = paths.arrival[c].max()
    return "not all have arrived at the last step" if np.isnan(last) else f"the last one arrived at step {last:,.0f}"


def _listing(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def draw(found: Mapping[str, Paths], config: Config, scale: float) -> Any:
    """The figure for one scale: parameters above, losses below, the first seed of each method."""
    c = config.scales.index(scale)
    front = landscape.front()
    grid = np.linspace(-11.0, 11.0, 121)
    points = np.stack(np.meshgrid(grid, grid), axis=-1)
    factors = np.array([scale, 1.0])
    total = np.asarray(landscape.losses(jnp.asarray(points), factors)).sum(-1)
    top = 35.0 * factors
    square, corner = (-11.0, 11.0), [(-0.04 * edge, edge) for edge in top]
    heights = (grid, grid, total)
    planes = [
        plots.Plane(
            square, square, "parameters, contours of the sum of the losses", ("x₁", "x₂"), front.points, heights
        ),
        plots.Plane(*corner, f"losses, the first x {scale:g}", ("loss 1", "loss 2"), front.losses * factors),
    ]
    paths = {
        name: (of.points[c, 0], np.asarray(landscape.losses(jnp.asarray(of.points[c, 0]), factors)))
        for name, of in found.items()
    }
    return plots.trajectories(
        paths,
        planes,
        arrived={name: of.arrived()[c, 0] for name, of in found.items()},
        notes={name: _thousands(of.arrival[c, 0].max()) for name, of in found.items()},
        groups={name: methods.FAMILIES[TABLE[name].family] for name in found},
        title=f"Two losses, the first x {scale:g}, from five starting points: "
        f"how many reach the front in {config.steps:,} steps, and after how many thousand",
        columns=12,
    )


def _thousands(step: float) -> str:
    return "" if np.isnan(step) else f", {step / 1000:.0f}k"


# The command.


def run(args: Arguments) -> int:
    """Runs the experiment; returns the exit status."""
    began = time.perf_counter()
    if args.methods == ("list",):
        print("\n".join(f"{name:<16}{entry.family}" for name, entry in TABLE.items()))
        return 0
    config = override(PRESETS[args.preset], args.set)
    names = methods.chosen(args.methods or config.methods, TABLE)
    config = dataclasses.replace(config, methods=names, seeds=config.seeds if args.seeds is None else args.seeds)
    directory = args.run or pathlib.Path("runs") / SYSTEM / time.strftime("%Y%m%d-%H%M%S")
    where = report.provenance(outputs=[directory, ROOT / "results"])
    command.write_run(directory, args, config=dataclasses.asdict(config))

    reasons = {name: left_out(TABLE[name]) for name in names}
    for name, reason in reasons.items():
        if reason:
            print(f"{name:<14}left out: {reason}")
    taking_part = [name for name in names if not reasons[name]]
    found: dict[str, Paths] = {}
    # A program this small keeps one core busy, whether it is compiled or run.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        made = (TABLE[name].make(**PUBLISHED.get(name, {})) for name in taking_part)
        for name, paths in zip(taking_part, pool.map(lambda method: follow(method, config), made), strict=True):
            found[name] = paths
            counts = ", ".join(f"{_count(paths, c):.3g}" for c in range(len(config.scales)))
            seconds = f"compiled in {paths.compile_s:.1f} s, ran in {paths.run_s:.1f} s"
            print(f"{name:<14}{counts} of {_ALL} starts on the front; {seconds}", flush=True)
    if not found:
        raise ValueError("--methods: none of these has a place on this landscape (see above)")

    result = report.from_findings(
        SYSTEM,
        findings(found, config),
        preset=args.preset,
        seeds=range(config.seeds),
        wall_s=round(time.perf_counter() - began, 1),
        rows=rows(found, config),
        provenance=where,
        details={
            "config": dataclasses.asdict(config),
            "starts": landscape.STARTS,
            "reached_below": REACHED,
            "published": {name: PUBLISHED[name] for name in found if name in PUBLISHED},
            "left_out": {name: reason for name, reason in reasons.items() if reason},
            "ends": {
                name: {
                    task_name(scale): {
                        "distance": paths.places.distance[c, ..., -1].round(4).tolist(),
                        "share": paths.places.share[c, ..., -1].round(4).tolist(),
                        "arrival": paths.arrival[c].tolist(),
                    }
                    for c, scale in enumerate(config.scales)
                }
                for name, paths in found.items()
            },
        },
    )
    tables.print_report(result)
    drawn = {scale: draw(found, config, scale) for scale in config.scales}
    # The last scale is the picture of the papers.
    names = {scale: SYSTEM if scale == config.scales[-1] else f"scale_{scale:g}" for scale in config.scales}
    pictures = [plots.save_small(drawn[scale], directory / "figures" / f"{names[scale]}.png") for scale in drawn]
    kept = args.preset == "demo" and (args.methods, args.seeds, args.set) == ((), None, ())
    # Only that one is kept.
    command.publish(result, directory, pictures[-1:], ROOT / "results" if kept else None)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = command.parse(Arguments, argv, prog="toy.py")
    return command.run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
