"""The claims of the field that a comparison can speak to, each with a paired test.

Scores are means over tasks of the main metrics (accuracy, AUROC, explained variance: 1 is perfect) on test rows. Runs
are paired by seed, so that every test is a t-test of differences over S seeds; where many methods are held against one
reference, Holm's correction keeps the chance of a single false finding below 5 %.

Letters: S seeds.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from compare_outcomes import Outcome
from competitors import SINGLE, SUM, TABLE, TUNED

import mtjax
from mtjax.train import report
from mtjax.train.compare import mean_and_se, verdict

ALPHA = 0.05
NEGLIGIBLE = 0.005
"""A difference of scores that nobody would pay for."""
BALANCING = ("SI", "GLS", "UW", "IMTL-L", "DB-MTL", "IMTL-G", "Nash-MTL", "FairGrad", "FAMO")
"""Methods to which the scale of a loss means nothing, or little."""

Found = Mapping[str, tuple[Sequence[mtjax.Task], Mapping[str, Outcome]]]
"""Data set -> its tasks and the outcomes of methods."""
Scores = Mapping[str, np.ndarray]
"""Method -> scores f64[S]."""


def p_value(difference: np.ndarray) -> float:
    """Of the two-sided t-test that paired differences have mean 0; 1 with one seed."""
    from scipy import stats

    mean, se = mean_and_se(difference)
    if difference.size < 2 or mean == 0:
        return 1.0
    return float(2 * stats.t.sf(abs(mean) / se, difference.size - 1)) if se > 0 else 0.0


def holm(p_values: Mapping[str, float], alpha: float = ALPHA) -> list[str]:
    """Names whose null hypothesis is rejected, the chance of any false rejection being at most alpha (Holm 1979).

    >>> holm({"a": 0.04, "b": 0.01, "c": 0.03})  # 0.01 < 0.05 / 3, but 0.03 > 0.05 / 2
    ['b']
    """
    rejected = []
    for i, name in enumerate(sorted(p_values, key=p_values.get)):
        if p_values[name] > alpha / (len(p_values) - i):
            break
        rejected.append(name)
    return rejected


def contenders(tasks: Sequence[mtjax.Task], outcomes: Mapping[str, Outcome]) -> dict[str, np.ndarray]:
    """Scores f64[S] of the objective methods: all but baselines, and but those that diverged."""
    scores = {name: of.score(tasks) for name, of in outcomes.items() if name not in (SINGLE, SUM, TUNED)}
    return {name: score for name, score in scores.items() if np.isfinite(score).all()}


def against(scores: Scores, reference: np.ndarray) -> tuple[list[str], list[str]]:
    """Methods significantly above and below a reference, by paired t-tests over seeds with Holm's correction."""
    found = holm({name: p_value(score - reference) for name, score in scores.items()})
    return tuple([name for name in found if sign * (scores[name] - reference).mean() > 0] for sign in (1, -1))


def compared(claim: str, ours: np.ndarray, theirs: np.ndarray, who: str, reference: str, more: str = ""):
    """The finding on "ours is above theirs", f64[S] each, by a paired t-test over seeds."""
    mean, se = mean_and_se(ours - theirs)
    reason = f"{who} minus {reference}: {mean:+.4f} ± {se:.4f} over {ours.size} paired seeds{more}"
    texts = (f"{reference}: {report.format_mean(*mean_and_se(theirs))}", report.format_mean(*mean_and_se(ours)))
    return report.Finding(claim, *texts, verdict(mean, se, ours.size), reason)


def findings(found: Found) -> list[report.Finding]:
    """The claims, as far as the methods and data of this run can speak to them."""
    result = []
    scores = {name: contenders(*of) for name, of in found.items()}
    for name, (tasks, outcomes) in found.items():
        if scores[name]:
            result.append(beat_sum(name, scores[name], outcomes[SUM].score(tasks)))
        if scores[name] and TUNED in outcomes:
            result.append(no_better(name, scores[name], outcomes, tasks))
    members = [name for name in BALANCING if name in scores.get("bench", {})]
    if members:
        claim = "balancing losses of unequal scale beats the plain sum (bench)"
        tasks, outcomes = found["bench"]
        mean = np.mean([scores["bench"][name] for name in members], axis=0)
        result.append(compared(claim, mean, outcomes[SUM].score(tasks), f"mean of {', '.join(members)}", SUM))
    gramian, losses = (family_mean(scores.values(), family) for family in ("Gramian", "losses"))
    if gramian is not None and losses is not None:
        claim = "methods that read gradients (Gramian) beat those that read losses"
        result.append(compared(claim, gramian, losses, "Gramian", "losses", f", mean of {', '.join(found)}"))
    return result or [report.Finding("your own comparison", "-", "-", None, "no claim of the field was tested")]


def beat_sum(name: str, scores: Scores, plain: np.ndarray) -> report.Finding:
    """Whether objective methods are better than the plain sum on average; which ones are by themselves."""
    above, below = against(scores, plain)
    claim = f"objective methods beat the plain sum on average ({name})"
    more = f"; better by itself: {listing(above)}; worse: {listing(below)} of {len(scores)} (Holm, {ALPHA:g})"
    mean = np.mean(list(scores.values()), axis=0)
    return compared(claim, mean, plain, f"mean of {len(scores)} methods", SUM, more)


def no_better(
    name: str, scores: Scores, outcomes: Mapping[str, Outcome], tasks: Sequence[mtjax.Task]
) -> report.Finding:
    """Whether no method beats the tuned weighted sum.

    False if one does significantly. True only if none does and the one that validation rows would choose is not more
    than negligibly better: the upper end of its 95 % interval is below `NEGLIGIBLE`.
    """
    from scipy import stats

    reference = outcomes[TUNED].score(tasks)
    above, below = against(scores, reference)
    pick = max(scores, key=lambda method: outcomes[method].validation_score)
    mean, se = mean_and_se(scores[pick] - reference)
    reach = mean + se * stats.t.ppf(0.975, max(reference.size - 1, 1))
    holds = False if above else True if reach < NEGLIGIBLE else None
    weights = ", ".join(f"{key} {value}" for key, value in outcomes[TUNED].setting.items())
    reason = (
        f"better: {listing(above)}; worse: {listing(below)} of {len(scores)} (Holm, {ALPHA:g}); best by validation: "
        f"{pick}, {mean:+.4f} ± {se:.4f}; weights of the sum: {weights}"
    )
    theirs, ours = (report.format_mean(*mean_and_se(values)) for values in (reference, scores[pick]))
    claim = f"no method beats a tuned weighted sum ({name})"
    return report.Finding(claim, f"{TUNED}: {theirs}", f"{pick}: {ours}", holds, reason)


def family_mean(scores: Iterable[Scores], family: str) -> np.ndarray | None:
    """f64[S], mean over data sets of the mean over the methods of a family; None if one has no such method."""
    means = []
    for of in scores:
        members = [score for name, score in of.items() if TABLE[name].family == family]
        if not members:
            return None
        means.append(np.mean(members, axis=0))
    return np.mean(means, axis=0)


def listing(names: Sequence[str], most: int = 6) -> str:
    """The names, at most so many, and how many more there are.

    >>> listing([]), listing(["a", "b", "c"], 2)
    ('none', 'a, b and 1 more')
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest
