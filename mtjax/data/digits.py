r"""Handwritten digits as a multitask table: 1,797 images of 8 x 8 pixels and six questions about each.

| task        | kind       | label                                                                        |
|-------------|------------|------------------------------------------------------------------------------|
| `digit`     | multiclass | which of the ten digits it is                                                |
| `odd`       | binary     | its parity                                                                   |
| `large`     | binary     | whether it is greater than 4                                                 |
| `ink`       | regression | mean of the pixels, 0 (white) to 1 (black)                                   |
| `symmetry`  | regression | correlation of the image with its mirror image, left for right (1: the same) |
| `top_share` | regression | share of the ink that lies in the upper four rows                            |

A set for experiments on objectives: it comes with scikit-learn, an epoch takes milliseconds, and the tasks differ in
kind, in loss scale and in what they look at. `odd` and `large` are functions of `digit`; `ink` is linear in the pixels,
while `symmetry` compares them in pairs. Regression labels are computed from the image and carry no noise.

*Few rows and wrong labels* are what methods that seek flat minima claim to withstand, so both can be asked for.
`train_rows` keeps the first rows of a fixed order in which every ten rows show every digit once: a smaller training set
is part of a larger one. `label_noise` replaces that share of the *training* labels of each class task by another class,
drawn at random and for each task by itself. Validation and test labels are never touched.

Pixels are encoded as (value - 5) / 6, which nearly standardises the whole set (mean 4.88, standard deviation 6.02).
These are constants, so that the inputs do not change with the number of training rows, and the pixels that are white
in all of them stay inputs.

Letters: N rows.

Source: `sklearn.datasets.load_digits`, the test part of "Optical Recognition of Handwritten Digits" of the UCI
repository (Alpaydin and Kaynak 1998, CC BY 4.0), 13 writers. The split is random: writers are in training and in test.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mtjax import metrics
from mtjax.data.encoders import NumericColumn, TabularEncoder, TargetColumn
from mtjax.data.splits import SPLITS
from mtjax.data.tabular import TabularDataset
from mtjax.tasks import Task

# The area under the ROC curve is above 0.99 after a few epochs: accuracy tells models apart, so it comes first.
TASKS = (
    Task(
        "digit",
        "multiclass",
        num_classes=10,
        metrics=(metrics.accuracy(), metrics.auroc_ovr(), metrics.f1(), metrics.log_loss()),
    ),
    *(
        Task(name, "binary", metrics=(metrics.accuracy(), metrics.auroc(), metrics.f1(), metrics.log_loss()))
        for name in ("odd", "large")
    ),
    *(Task(name, "regression") for name in ("ink", "symmetry", "top_share")),
)
CLASSES = {"digit": tuple("0123456789"), "odd": ("even", "odd"), "large": ("0-4", "5-9")}
TEST_ROWS, VALIDATION_ROWS = 600, 300
_SIDE = 8


def load(
    train_rows: int | None = None,
    *,
    label_noise: float = 0.0,
    seed: int = 0,
    tasks: Sequence[str] | None = None,
) -> TabularDataset:
    """Loads the digits as a data set: 600 rows to test, 300 to validate, up to 897 to train.

    Args:
      train_rows: number of training rows; None: all 897.
      label_noise: share of the training labels of each class task to replace, in [0, 1).
      seed: seed of the split and of the noise.
      tasks: names of the tasks, in the order wanted; None: all six.

    Returns:
      The data set; its `rows` are positions in scikit-learn's table.

    Raises:
      ImportError: if scikit-learn is not installed.
      ValueError: for an unknown task, a share outside of [0, 1), or more training rows than there are.

    >>> data = load(100, label_noise=0.2)
    >>> data.num_numeric, [task.name for task in data.tasks]
    (64, ['digit', 'odd', 'large', 'ink', 'symmetry', 'top_share'])
    >>> data.notes
    ['Label noise: 20 of 100 training labels of each of digit, odd, large are wrong.']
    """
    known = {task.name: task for task in TASKS}
    names = list(known if tasks is None else tasks)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"The digits have no task {unknown[0]!r}; they have {', '.join(known)}")
    if not 0 <= label_noise < 1:
        raise ValueError(f"label_noise is a share of labels in [0, 1), got {label_noise}")
    images, digits = read()
    pool = len(digits) - TEST_ROWS - VALIDATION_ROWS
    train_rows = pool if train_rows is None else train_rows
    if not 0 < train_rows <= pool:
        raise ValueError(f"train_rows asks for {train_rows} rows of the digits; expected 1 to {pool}")

    order = _balanced_order(digits, np.random.default_rng([seed, 0]))
    held_out = TEST_ROWS + VALIDATION_ROWS
    parts = (order[held_out : held_out + train_rows], order[TEST_ROWS:held_out], order[:TEST_ROWS])
    rows = dict(zip(SPLITS, parts, strict=True))
    encoder = TabularEncoder(
        categorical=(),
        numeric=tuple(NumericColumn(f"pixel_{i}_{j}", 5.0, 6.0) for i in range(_SIDE) for j in range(_SIDE)),
        targets=tuple(TargetColumn(name, name, known[name].kind, CLASSES.get(name, ())) for name in names),
    )
    numeric = ((images.reshape(len(images), -1) - 5.0) / 6.0).astype(np.float32)
    truth = labels(images, digits)
    batches = {
        split: {
            "categorical": np.zeros((len(index), 0), np.int32),
            "numeric": numeric[index],
            "labels": {name: truth[name][index] for name in names},
        }
        for split, index in rows.items()
    }
    notes, wrong = [], round(label_noise * train_rows)
    if wrong:
        noisy = [name for name in names if name in CLASSES]
        for name in noisy:
            # A stream for each task by its place in TASKS, so that the noise does not depend on which others are asked.
            rng = np.random.default_rng([seed, 1, list(known).index(name)])
            batches["train"]["labels"][name] = _corrupt(batches["train"]["labels"][name], name, wrong, rng)
        if noisy:
            notes = [f"Label noise: {wrong} of {train_rows} training labels of each of {', '.join(noisy)} are wrong."]
    fitted = tuple(known[name].fit(batches["train"]["labels"][name]) for name in names)
    return TabularDataset(encoder, fitted, **batches, rows=rows, notes=notes)


def read() -> tuple[np.ndarray, np.ndarray]:
    """Images f64[N, 8, 8] with values 0 to 16, and digits i64[N].

    Raises:
      ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("The digits come with scikit-learn: pip install scikit-learn") from error
    table = datasets.load_digits()
    return table.images, table.target


def labels(images: np.ndarray, digits: np.ndarray) -> Mapping[str, np.ndarray]:
    """The six label columns f32[N].

    >>> column = np.zeros((1, 8, 8))
    >>> column[0, 0, 3:5] = 16.0  # two black pixels in the first row, left and right of the middle
    >>> {name: values.tolist() for name, values in labels(column, np.array([1])).items()}
    {'digit': [1.0], 'odd': [1.0], 'large': [0.0], 'ink': [0.03125], 'symmetry': [1.0], 'top_share': [1.0]}
    """
    centred = images - images.mean(axis=(1, 2), keepdims=True)
    mirrored = (centred * centred[:, :, ::-1]).sum(axis=(1, 2))
    columns = {
        "digit": digits,
        "odd": digits % 2,
        "large": digits > 4,
        "ink": images.mean(axis=(1, 2)) / 16.0,
        "symmetry": mirrored / (centred**2).sum(axis=(1, 2)),
        "top_share": images[:, : _SIDE // 2].sum(axis=(1, 2)) / images.sum(axis=(1, 2)),
    }
    return {name: np.asarray(values, np.float32) for name, values in columns.items()}


def _balanced_order(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order of the rows that visits all classes in turn."""
    order = rng.permutation(len(digits))
    turn = np.empty(len(digits), int)
    for digit in np.unique(digits):
        of_class = np.flatnonzero(digits[order] == digit)
        turn[of_class] = np.arange(len(of_class))
    return order[np.argsort(turn, kind="stable")]


def _corrupt(values: np.ndarray, name: str, wrong: int, rng: np.random.Generator) -> np.ndarray:
    """`wrong` of the class indices replaced by another one."""
    classes = len(CLASSES[name])
    result = values.copy()
    chosen = rng.choice(len(values), wrong, replace=False)
    result[chosen] = (result[chosen] + rng.integers(1, classes, wrong)) % classes
    return result
