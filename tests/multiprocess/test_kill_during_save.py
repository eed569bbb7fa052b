"""The drill of kills during saves, in its short form; thirty kills are slow."""

import importlib.util
import pathlib
import random
import time

import pytest

DRILL = pathlib.Path(__file__).parents[2] / "experiments" / "drills" / "kill_during_save.py"


@pytest.mark.parametrize("times", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_good_checkpoint_survives_every_kill(times: int, tmp_path: pathlib.Path):
    """At random moments, other ones in every run; at most the save that was under way is lost."""
    spec = importlib.util.spec_from_file_location("kill_during_save", DRILL)
    drill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drill)
    seed = random.Random(time.time_ns()).randrange(2**32)
    figures = drill.kill_during_save(times, seed, tmp_path)
    assert figures["kills"] == figures["good"] == times, figures
    assert figures["most_saves_lost"] <= 1 and figures["most_steps_lost"] <= 2, figures
    assert figures["last_step"] >= times, figures
    assert figures["while_writing"] >= (1 if times > 10 else 0), figures  # of three kills, none may
    assert not (tmp_path / "damaged_checkpoints").exists()
