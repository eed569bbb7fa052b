"""mtjax.distributed in a process alone; with others: tests/multiprocess."""

import contextlib
import io

import jax
import pytest

from mtjax import distributed


def test_alone_everything_is_trivial(capsys):
    assert distributed.is_main()
    assert (distributed.process_id(), distributed.process_count()) == (0, 1)
    assert distributed.agree(True) is True
    assert distributed.agree(False) is False
    distributed.barrier("nobody else")
    distributed.leave_at_exit(5)  # or the tests would end with it
    with distributed.only_main_prints():
        print("shown")
    assert capsys.readouterr().out == "shown\n"
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "h:1"}, "give all three.*Missing: num_processes, process_id"),
        ({"num_processes": 2, "process_id": 0}, "Missing: coordinator"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process_id must be from 0 to 1.*got 2"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": -1}, "process_id must be from 0 to 1.*got -1"),
        ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "num_processes must be at least 1, got 0"),
        ({"coordinator": "h", "num_processes": 2, "process_id": 0}, "coordinator must be 'host:port'.*got 'h'"),
        ({"coordinator": "h:x", "num_processes": 2, "process_id": 0}, "coordinator must be 'host:port'.*got 'h:x'"),
        ({"coordinator": "h:70000", "num_processes": 2, "process_id": 0}, "port from 1 to 65535"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(**arguments)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MTJAX_PROCESS_ID": "0"}, "Missing: MTJAX_COORDINATOR, MTJAX_NUM_PROCESSES"),
        (
            {"MTJAX_COORDINATOR": "h:1", "MTJAX_NUM_PROCESSES": "two", "MTJAX_PROCESS_ID": "0"},
            "MTJAX_NUM_PROCESSES must be a whole number, got 'two'",
        ),
        (
            {"MTJAX_COORDINATOR": "h:1", "MTJAX_NUM_PROCESSES": "2", "MTJAX_PROCESS_ID": "2"},
            "MTJAX_PROCESS_ID must be from 0 to 1, below MTJAX_NUM_PROCESSES=2, got 2",
        ),
    ],
)
def test_impossible_environment(variables, message, monkeypatch):
    for name in ("MTJAX_COORDINATOR", "MTJAX_NUM_PROCESSES", "MTJAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.initialize()


def test_marks_stand_before_every_line_however_it_is_written():
    stream = io.StringIO()
    marked = distributed._MarkedLines(stream, "[1] ")
    with contextlib.redirect_stderr(marked):
        for text in ("one\ntw", "o\n", "", "\n", "last"):
            marked.write(text)
    marked.finish()
    marked.finish()
    assert stream.getvalue() == "[1] one\n[1] two\n[1] \n[1] last\n"
