"""Training: state, step, loop, checkpoints, evaluation, report."""

from mtjax.train.evaluate import make_evaluate, predict
from mtjax.train.heterogeneous import heterogeneous_problem
from mtjax.train.images import Augment, image_problem, predict_images
from mtjax.train.loop import Fit, NonFiniteLossError, TrainConfig, fit, fit_problem
from mtjax.train.problem import Problem, table_problem
from mtjax.train.state import TrainState
from mtjax.train.step import StepMetrics, make_train_step, supervised_loss

__all__ = [
    "Augment",
    "Fit",
    "NonFiniteLossError",
    "Problem",
    "StepMetrics",
    "TrainConfig",
    "TrainState",
    "fit",
    "fit_problem",
    "heterogeneous_problem",
    "image_problem",
    "make_evaluate",
    "make_train_step",
    "predict",
    "predict_images",
    "supervised_loss",
    "table_problem",
]
