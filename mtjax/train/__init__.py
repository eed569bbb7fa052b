"""Training: state, step, loop, checkpoints, evaluation, report."""

from mtjax.train.evaluate import make_evaluate, predict
from mtjax.train.loop import Fit, NonFiniteLossError, TrainConfig, fit, fit_problem
from mtjax.train.problem import Problem, table_problem
from mtjax.train.state import TrainState
from mtjax.train.step import StepMetrics, make_train_step, supervised_loss

__all__ = [
    "Fit",
    "NonFiniteLossError",
    "Problem",
    "StepMetrics",
    "TrainConfig",
    "TrainState",
    "fit",
    "fit_problem",
    "make_evaluate",
    "make_train_step",
    "predict",
    "supervised_loss",
    "table_problem",
]
