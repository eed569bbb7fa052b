"""Command lines: errors as sentences, run directories, and the arguments of a resumed run."""

import dataclasses
import os
import pathlib
import warnings

import jax
import pytest

from mtjax.train import NonFiniteLossError
from mtjax.train.command import (
    newest_run,
    read_run,
    refuse_run,
    resumed_arguments,
    run_command,
    write_run,
    write_same,
)


@dataclasses.dataclass
class Args:
    preset: str = "demo"
    data: str | None = None
    path: pathlib.Path | None = None
    set: tuple[str, ...] = ()
    run: pathlib.Path | None = None
    resume: bool = False


def raising(error: BaseException):
    def body():
        raise error

    return body


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a sentence"),
        FileNotFoundError("a sentence"),
        ImportError("a sentence"),
        OSError("a sentence"),
    ],
)
def test_an_error_is_a_sentence_and_status_2(capsys, monkeypatch, error):
    assert run_command(raising(error)) == 2
    assert capsys.readouterr() == ("", "error: a sentence\n")
    monkeypatch.setenv("MTJAX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_command(raising(error))


def test_a_loss_that_is_not_finite_is_a_sentence(capsys):
    assert run_command(raising(NonFiniteLossError("price", 7, "seed 0, rate 0.1", "nan", 4))) == 2
    sentence = "The loss of task 'price' became nan at step 7 (seed 0, rate 0.1); last good checkpoint: step 4"
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_an_interrupt_is_status_130_and_a_bug_keeps_its_traceback(capsys):
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"
    with pytest.raises(TypeError, match="a bug"):
        run_command(raising(TypeError("a bug")))
    assert run_command(lambda: 5) == 5


def test_a_warning_is_one_line(capsys):
    def body():
        warnings.simplefilter("always")
        warnings.warn("mind the gap", stacklevel=1)
        return 0

    assert run_command(body) == 0
    assert capsys.readouterr().err == "warning: mind the gap\n"


def test_a_compile_cache_that_was_chosen_is_kept():
    chosen = jax.config.jax_compilation_cache_dir
    assert chosen is not None  # by conftest.py
    run_command(lambda: 0)
    assert jax.config.jax_compilation_cache_dir == chosen


def test_the_arguments_of_a_resumed_run(tmp_path: pathlib.Path):
    write_run(tmp_path, Args(data="a.csv", path=pathlib.Path("x"), set=("width=4",), run=tmp_path), models=["m"])
    assert read_run(tmp_path)["models"] == ["m"]

    def resume(**given):
        return resumed_arguments(Args(resume=True, **given), tmp_path, apart=("run", "resume"))

    whole = Args("demo", "a.csv", pathlib.Path("x"), ("width=4",), None, True)
    assert resume() == whole
    assert resume(data="a.csv", set=("width=4",)) == whole, "repeating an option is fine"
    with pytest.raises(ValueError, match="--resume goes on with the options that") as error:
        resume(set=("width=4", "head=2"), data="b.csv")
    assert str(error.value).splitlines()[1:] == [
        "  --data: started with a.csv, now b.csv",
        "  --set: started with width=4, now width=4 head=2",
    ]
    with pytest.raises(ValueError, match="not a run directory"):
        resumed_arguments(Args(), tmp_path / "none", apart=())


def test_the_newest_run(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"there is no run under .*; name one with --run"):
        newest_run(tmp_path)
    for age, name in enumerate(("b", "c", "a")):
        write_run(tmp_path / name, Args())
        os.utime(tmp_path / name / "run.json", (1e9 - age, 1e9 - age))
    (tmp_path / "z").mkdir()
    assert newest_run(tmp_path) == tmp_path / "b"


def test_a_directory_with_checkpoints_is_refused(tmp_path: pathlib.Path):
    refuse_run(tmp_path / "new")
    write_run(tmp_path, Args())
    refuse_run(tmp_path)  # started, but nothing was saved: an error in the data, say
    (tmp_path / "models" / "mlp" / "checkpoints" / "16").mkdir(parents=True)
    with pytest.raises(ValueError, match="already holds a run; go on with it by --resume, or choose another directory"):
        refuse_run(tmp_path)


def test_data_must_stay_the_same(tmp_path: pathlib.Path):
    path = tmp_path / "encoder.json"
    write_same(path, "one", resume=True)
    write_same(path, "one", resume=True)
    with pytest.raises(ValueError, match="The data differ from those that the run was started with"):
        write_same(path, "two", resume=True)
    assert path.read_text() == "one"
    write_same(path, "two", resume=False)
    assert path.read_text() == "two"
