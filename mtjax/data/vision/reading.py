"""Finding and reading the files of a data set of images, with errors that name what is missing.

Nothing is ever unpickled: arrays of `.npy` files are read without, and of `.mat` files one named variable.

Letters: H x W pixels of an image, C classes.
"""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

IGNORED = 255
Folder = str | os.PathLike


def folder_of(folder: Folder, *needed: str, what: str) -> pathlib.Path:
    """The folder as a path, after checking that it and the folders `needed` in it exist."""
    path = pathlib.Path(folder).expanduser()
    lacking = [name for name in ("", *needed) if not (path / name).is_dir()]
    if lacking:
        raise FileNotFoundError(f"No folder {path / lacking[0]}; expected {what}")
    return path


def read_names(path: pathlib.Path, *, what: str) -> tuple[str, ...]:
    """The names in a list of images, one a line."""
    if not path.is_file():
        raise FileNotFoundError(f"No file {path}; expected {what}, one name a line")
    names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if not names:
        raise ValueError(f"{path} names no image; expected {what}, one name a line")
    return names


def find(names: Sequence[str], patterns: Sequence[str], folder: pathlib.Path, *, what: str, optional: bool = False):
    """One file per name.

    Args:
      names: of images.
      patterns: paths inside `folder` with {} for the name, in order of preference.
      folder: of the data set.
      what: these files are, for the error.
      optional: whether files may be missing; if all are, this still is an error.

    Returns:
      A tuple of paths, None where there is no such file.

    Raises:
      FileNotFoundError: if files are missing and not optional; it lists the first ones.
    """
    candidates = [[folder / pattern.format(name) for pattern in patterns] for name in names]
    paths = tuple(next((path for path in group if path.is_file()), None) for group in candidates)
    lacking = [name for name, path in zip(names, paths, strict=True) if path is None]
    if len(lacking) == len(names) or (lacking and not optional):
        listed = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        expected = " or ".join(pattern.format("NAME") for pattern in patterns)
        raise FileNotFoundError(
            f"{len(lacking)} of {len(names)} {what} are missing in {folder}: expected {expected} for NAME = {listed}"
        )
    return paths


def check_tasks(tasks: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """The tasks as a tuple, after checking that the data set has them."""
    tasks, known = tuple(tasks), tuple(known)
    strange = [task for task in tasks if task not in known]
    if strange:
        raise ValueError(f"This data set has no task {strange[0]!r}; it has {', '.join(known)}")
    return tasks


def check_choice(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raises a ValueError unless the value is one of those known."""
    if value not in tuple(known):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def prepared_tfds(name: str, split: str, data_dir: Folder | None) -> Any:
    """A split of a data set that tensorflow-datasets has prepared; read without TensorFlow."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=None if data_dir is None else os.fspath(data_dir))
    try:
        return builder.as_data_source(split=split)
    except (AssertionError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{builder.data_dir} does not hold {name!r} as array_record or parquet, which are read without TensorFlow; "
            f"prepare it with tfds.builder({name!r}, file_format='array_record').download_and_prepare() ({reason})"
        ) from error


def read_image(path: pathlib.Path) -> np.ndarray:
    """u8[H, W, 3]; grey, palette and CMYK images are converted."""
    from PIL import Image

    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def read_numbers(path: pathlib.Path) -> np.ndarray:
    """The numbers in the pixels of a one-channel image, [H, W], 8 or 16 bits; of a palette the entries' positions."""
    from PIL import Image

    with Image.open(path) as image:
        values = np.array(image)
    if values.ndim != 2:
        raise ValueError(f"{path} has {values.shape[-1]} channels; expected a label image with one")
    return values


def read_array(path: pathlib.Path) -> np.ndarray:
    """The array in a .npy file, without a last axis of size 1."""
    try:
        values = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is no .npy file of plain numbers: {error}") from error
    return values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values


def read_mat(path: pathlib.Path, variable: str) -> np.ndarray:
    """One variable of a MATLAB file (up to version 7.2)."""
    import scipy.io

    content = scipy.io.loadmat(path, variable_names=[variable])
    if variable not in content:
        raise ValueError(f"{path} has no variable {variable!r}")
    return content[variable]


def read_classes(
    path: pathlib.Path, count: int, *, zero: Literal["class", "unlabelled"], variable: str = ""
) -> np.ndarray:
    """Class numbers u8[H, W] of a .png file, or of a .mat file's `variable`; 255 stays ignored.

    Args:
      path: of the file.
      count: C, number of classes.
      zero: 'class': the file holds 0 ... C-1; 'unlabelled': it holds 1 ... C, and 0 where there is no label.
      variable: name of the variable in a .mat file.
    """
    values = (read_mat(path, variable) if path.suffix == ".mat" else read_numbers(path)).astype(np.int64)
    first = int(zero == "unlabelled")
    known = values[values != IGNORED]
    if known.size and not 0 <= known.min() <= known.max() < count + first:
        raise ValueError(f"{path} holds classes {known.min()} to {known.max()}; expected 0 to {count + first - 1}")
    unlabelled = (values == IGNORED) | (values < first)
    return np.where(unlabelled, IGNORED, values - first).astype(np.uint8)


def read_mask(path: pathlib.Path) -> np.ndarray:
    """0 or 1, u8[H, W]: values above one half of a .npy file, above one half of white of an image."""
    from PIL import Image

    if path.suffix == ".npy":
        return (read_array(path) > 0.5).astype(np.uint8)
    with Image.open(path) as image:
        return (np.array(image.convert("L")) > 127).astype(np.uint8)


def read_depth(path: pathlib.Path) -> np.ndarray:
    """f32[H, W] of a .npy file or a .mat file's variable 'depth'; NaN where it is not positive."""
    return positive(read_mat(path, "depth") if path.suffix == ".mat" else read_array(path))


def read_normals(path: pathlib.Path) -> np.ndarray:
    """Unit vectors f32[H, W, 3] of a .npy file, or of an image whose value v stands for 2 v / 255 - 1."""
    vectors = read_array(path) if path.suffix == ".npy" else 2.0 * read_image(path) / 255.0 - 1.0
    if vectors.ndim != 3 or vectors.shape[-1] != 3:
        raise ValueError(f"{path} has shape {vectors.shape}; expected normals [H, W, 3]")
    return unit(vectors)


def positive(values: np.ndarray) -> np.ndarray:
    """f32, NaN where a value is not positive and finite."""
    values = np.asarray(values, np.float32)
    return np.where(np.isfinite(values) & (values > 0), values, np.float32(np.nan))


def unit(vectors: np.ndarray, shortest: float = 0.5) -> np.ndarray:
    """f32[H, W, 3] scaled to length 1; NaN where the length is below `shortest`, a placeholder for "unknown"."""
    vectors = np.asarray(vectors, np.float32)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    known = np.isfinite(length) & (length >= shortest)
    return np.where(known, vectors / np.where(known, length, 1.0), np.float32(np.nan))
