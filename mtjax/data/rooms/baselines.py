"""What a predictor that never looks at the image reaches: the numbers to print beside every result.

Two of each kind: one prediction for all pixels of all images ('constant'), and one for every pixel position
('per_pixel'), from the labels of the training split:

    segmentation, parts    most frequent class                 mIoU over the classes of the test split, higher is better
    depth, disparity       mean                                RMSE over the pixels that have a label, lower
    normals                normalised mean                     mean angle 2 atan2(|p - g|, |p + g|) in degrees, lower
    edge, saliency         frequency, threshold by training F  F = 2 TP / (2 TP + FP + FN) over all pixels, higher
    classification         most frequent class                 accuracy, higher

Letters: B images, H height, W width, C classes.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

IGNORED = 255
Scores = dict[str, float]


def baselines(train: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Scores]:
    """No-learning baselines of every task that both splits label.

    Args:
      train: a split of `load`, or its 'labels': {task: array}.
      test: the same of the split that is measured.

    Returns:
      {task: {'metric': name, 'constant': score, 'per_pixel': score}} (classification has no 'per_pixel').
    """
    train, test = train.get("labels", train), test.get("labels", test)
    found = {}
    for task, label in test.items():
        if task in train and task in _KINDS:
            metric, score = _KINDS[task]
            found[task] = {"metric": metric, **score(np.asarray(train[task]), np.asarray(label))}
    return found


def mean_iou(prediction: np.ndarray, label: np.ndarray) -> float:
    """Mean over the classes in the label or the prediction of |p and g| / |p or g|, ignored pixels left out.

    >>> mean_iou(np.array([0, 0, 1, 1]), np.array([0, 1, 1, IGNORED]))
    0.5
    """
    valid = label != IGNORED
    count = int(max(prediction.max(initial=0), label[valid].max(initial=0))) + 1
    pairs = np.bincount(label[valid].astype(np.int64) * count + prediction[valid], minlength=count**2)
    confusion = pairs.reshape(count, count)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return float(np.mean(confusion.diagonal()[union > 0] / union[union > 0]))


def angular_error(prediction: np.ndarray, label: np.ndarray) -> float:
    """Mean angle in degrees between unit vectors [..., 3] where the label is not NaN."""
    apart = np.linalg.norm(prediction - label, axis=-1)
    together = np.linalg.norm(prediction + label, axis=-1)
    return float(np.degrees(np.nanmean(2 * np.arctan2(apart, together))))


def f_score(prediction: np.ndarray, label: np.ndarray) -> float:
    """F = 2 TP / (2 TP + FP + FN) of a mask, ignored pixels left out; 0 if both are empty.

    >>> f_score(np.array([True, True, False, True]), np.array([1, 0, 1, IGNORED]))
    0.5
    """
    valid = label != IGNORED
    hits = np.sum(prediction & (label == 1) & valid)
    total = np.sum(prediction & valid) + np.sum((label == 1) & valid)
    return float(2 * hits / total) if total else 0.0


def _segmentation(train: np.ndarray, test: np.ndarray) -> Scores:
    count = int(train[train != IGNORED].max(initial=0)) + 1
    frequency = np.stack([(train == c).sum(0) for c in range(count)], -1)
    constant, per_pixel = frequency.sum((0, 1)).argmax(), frequency.argmax(-1)
    return {
        "constant": mean_iou(np.broadcast_to(constant, test.shape), test),
        "per_pixel": mean_iou(np.broadcast_to(per_pixel, test.shape), test),
    }


def _depth(train: np.ndarray, test: np.ndarray) -> Scores:
    train, test = train.astype(np.float64), test.astype(np.float64)
    constant, per_pixel = np.nanmean(train), _nanmean(train)
    per_pixel = np.where(np.isnan(per_pixel), constant, per_pixel)
    return {
        name: float(np.sqrt(np.nanmean((guess - test) ** 2)))
        for name, guess in (("constant", constant), ("per_pixel", per_pixel))
    }


def _normals(train: np.ndarray, test: np.ndarray) -> Scores:
    train, test = train.astype(np.float64), test.astype(np.float64)
    constant, per_pixel = np.nanmean(train, (0, 1, 2)), _nanmean(train)
    per_pixel = np.where(np.isnan(per_pixel), constant, per_pixel)
    unit = lambda v: v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-9)  # noqa: E731
    return {
        "constant": angular_error(unit(constant), unit(test)),
        "per_pixel": angular_error(unit(per_pixel), unit(test)),
    }


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the images; NaN where no image has a value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, 0)


def _mask(train: np.ndarray, test: np.ndarray) -> Scores:
    valid = train != IGNORED
    prior = ((train == 1) & valid).sum(0) / np.maximum(valid.sum(0), 1)
    thresholds = np.quantile(prior, np.linspace(0, 0.99, 50))
    scores = [f_score(np.broadcast_to(prior >= t, train.shape), train) for t in thresholds]
    chosen = prior >= thresholds[int(np.argmax(scores))]
    return {
        "constant": f_score(np.ones(test.shape, bool), test),
        "per_pixel": f_score(np.broadcast_to(chosen, test.shape), test),
    }


def _classification(train: np.ndarray, test: np.ndarray) -> Scores:
    return {"constant": float(np.mean(test == np.bincount(train).argmax()))}


_KINDS = {
    "segmentation": ("mIoU", _segmentation),
    "parts": ("mIoU", _segmentation),
    "depth": ("RMSE", _depth),
    "disparity": ("RMSE", _depth),
    "normals": ("degrees", _normals),
    "edge": ("F", _mask),
    "saliency": ("F", _mask),
    "classification": ("accuracy", _classification),
}
