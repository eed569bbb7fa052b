"""Training: state, step, loop, checkpoints, evaluation, report."""

from mtjax.train.evaluate import make_evaluate, predict
from mtjax.train.loop import Fit, NonFiniteLossError, TrainConfig, fit
from mtjax.train.state import TrainState
from mtjax.train.step import StepMetrics, make_train_step, supervised_loss

__all__ = [
    "Fit",
    "NonFiniteLossError",
    "StepMetrics",
    "TrainConfig",
    "TrainState",
    "fit",
    "make_evaluate",
    "make_train_step",
    "predict",
    "supervised_loss",
]
