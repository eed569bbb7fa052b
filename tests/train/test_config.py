"""Overriding frozen dataclasses by name, and reading them back from JSON."""

import dataclasses
import json
from typing import Literal

import pytest

from mtjax.train import TrainConfig
from mtjax.train.config import from_json, override


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    clip: float | None = None
    mode: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate must be >= 0, got {self.rate}")


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 8
    sizes: tuple[int, ...] = (4, 2)
    rows: tuple[int, ...] | None = (1, 2, 3)
    name: str = "x"
    flag: bool = False
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("width=16", Config(width=16)),
        ("sizes=(8,)", Config(sizes=(8,))),
        ("sizes=[8, 4]", Config(sizes=(8, 4))),
        ("sizes=8,4", Config(sizes=(8, 4))),
        ("rows=None", Config(rows=None)),
        ("name=deep net", Config(name="deep net")),
        ("name=a=b", Config(name="a=b")),
        ("flag=True", Config(flag=True)),
        ("inner.rate=1e-3", Config(inner=Inner(rate=0.001))),
        ("inner.rate=2", Config(inner=Inner(rate=2.0))),
        ("inner.clip=0.5", Config(inner=Inner(clip=0.5))),
        ("inner.clip=None", Config()),
        ("inner.mode=b", Config(inner=Inner(mode="b"))),
    ],
)
def test_values(assignment, expected):
    changed = override(Config(), [assignment])
    assert changed == expected
    assert hash(changed) == hash(expected), "still a static argument"
    assert isinstance(changed.inner.rate, float) and isinstance(changed.sizes, tuple)


def test_later_assignments_win_and_the_original_stays():
    config = Config()
    assert override(config, ["width=1", "inner.rate=3", "width=2"]) == Config(width=2, inner=Inner(rate=3.0))
    assert override(config, []) is config == Config()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("width", "--set takes field=value, got 'width'"),
        ("widht=4", r"--set widht: no field 'widht' in Config; did you mean 'width'\? \(width, sizes, rows, name, "),
        ("zzz=4", r"--set zzz: no field 'zzz' in Config \(width, "),
        ("inner.rat=4", r"--set inner.rat: no field 'rat' in Inner; did you mean 'rate'\?"),
        ("width.x=4", "--set width.x: 'width' has no fields of its own"),
        ("inner=4", "--set inner: set one of its fields: inner.rate, inner.clip, inner.mode"),
        ("width=wide", "--set width: expected int, such as 8, got 'wide'"),
        ("width=1.5", "--set width: expected int, such as 8, got 1.5"),
        ("width=True", "--set width: expected int, such as 8, got True"),
        ("flag=1", "--set flag: expected bool, such as False, got 1"),
        ("inner.rate=fast", "--set inner.rate: expected float, such as 0.1, got 'fast'"),
        ("sizes=8", r"--set sizes: expected tuple\[int, ...\], such as \(4, 2\), got 8"),
        ("sizes=(8, 'x')", r"--set sizes: expected tuple\[int, ...\], such as \(4, 2\), got \(8, 'x'\)"),
        ("inner.mode=c", "--set inner.mode: expected typing.Literal.*, such as a, got 'c'"),
        ("inner.rate=-1", "rate must be >= 0, got -1.0"),
        ("=4", "--set : no field '' in Config"),
    ],
)
def test_errors_are_sentences(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(Config(), [assignment])


def test_json_round_trip():
    config = Config(sizes=(3,), rows=None, inner=Inner(clip=0.5))
    text = json.dumps(dataclasses.asdict(config))
    again = from_json(Config, json.loads(text))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("batch_size", "max_epochs", "evals_per_epoch", "patience", "steps_per_dispatch")),
        *((name, 0) for name in ("eval_batch_size", "context_rows", "checkpoint_every", "chunk_size")),
        ("weight_decay", -0.1),
        ("conflict_rows", -1),
        ("clip_norm", 0.0),
        ("clip_norm", float("nan")),
    ],
)
def test_train_config_is_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} must be >=? "):
        TrainConfig(**{field: value})
    with pytest.raises(ValueError, match=f"{field} must be >=? "):
        dataclasses.replace(TrainConfig(), **{field: value})
