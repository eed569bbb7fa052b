import jax
import jax.numpy as jnp
import pytest

from mtjax.train.profiling import ProfileWindow, profile


@jax.jit
def work(x):
    return jnp.tanh(x) @ x


def traces(directory):
    return sorted(directory.glob("plugins/profile/*/perfetto_trace.json.gz"))


def test_a_profile_is_written_and_says_how_to_open_it(tmp_path, capsys):
    with profile(tmp_path):
        work(jnp.ones((4, 4))).block_until_ready()
    assert len(traces(tmp_path)) == 1
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))  # what xprof reads
    shown = capsys.readouterr().out
    assert f"xprof {tmp_path}" in shown and str(traces(tmp_path)[0]) in shown


def test_a_window_traces_some_dispatches_of_a_resumed_loop_once(tmp_path, capsys):
    ended = []
    with ProfileWindow(tmp_path, first=4, last=8) as window:
        for made in range(100, 124, 3):  # dispatches of three steps: the trace covers those after step 106
            window.step(made)
            ended += [made] if traces(tmp_path) else []
            work(jnp.ones((4, 4))).block_until_ready()
    assert ended[0] == 109
    assert len(traces(tmp_path)) == 1
    assert capsys.readouterr().out.count("Profile written") == 1


def test_a_trace_under_way_ends_with_the_loop(tmp_path):
    with pytest.raises(RuntimeError, match="of the loop"), ProfileWindow(tmp_path, first=0, last=100) as window:
        window.step(0)
        raise RuntimeError("of the loop")
    assert len(traces(tmp_path)) == 1


def test_a_run_that_is_too_short_says_so(tmp_path):
    message = "ended after 2 steps, the profile was to start after 16"
    with pytest.warns(UserWarning, match=message), ProfileWindow(tmp_path) as window:
        window.step(0)
        window.step(2)
    assert not traces(tmp_path)


def test_a_window_must_not_be_empty(tmp_path):
    with pytest.raises(ValueError, match="0 <= first < last, got first=8 and last=8"):
        ProfileWindow(tmp_path, 8, 8)
