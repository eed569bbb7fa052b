"""Checkpoints: round trip of every kind of leaf, damage of every file, other runs, and parameters as npz."""

import gc
import pathlib
import shutil
import warnings

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax.train.checkpoint import Checkpoints, load_params, save_params


@flax.struct.dataclass
class State:
    params: dict
    opt_state: tuple
    keys: jax.Array
    step: jax.Array


def make_state(step: int) -> State:
    params = {"w": jnp.arange(6.0).reshape(2, 3) + step, "half": jnp.ones((2,), jnp.bfloat16) * step}
    opt_state = optax.adam(1e-3).init(params)
    return State(params, opt_state, jax.random.split(jax.random.key(step), 2), jnp.int32(step))


def assert_equal(a: State, b: State) -> None:
    def same(x, y):
        assert x.dtype == y.dtype
        data = [jax.random.key_data(v) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (x, y)]
        np.testing.assert_array_equal(*map(np.asarray, data))

    jax.tree.map(same, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A directory with checkpoints 2 and 3 (1 was the oldest of three)."""
    run = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(run / "checkpoints")
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {"step": step, "history": [0.1, float("nan")], "name": "ä"})
    checkpoints.close()
    return run


@pytest.fixture
def run(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(saved, tmp_path / "run")


def test_round_trip(run: pathlib.Path):
    checkpoints = Checkpoints(run / "checkpoints")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "3"]
    assert checkpoints.latest_step() == 3
    step, state, record = checkpoints.restore(make_state(0))
    assert step == 3 and record["step"] == 3 and record["name"] == "ä"
    assert record["history"][0] == 0.1 and np.isnan(record["history"][1])
    assert_equal(state, make_state(3))
    checkpoints.close()


def test_donated_arrays_are_saved_as_they_were(tmp_path: pathlib.Path):
    """Saving goes on in the background while the next steps overwrite the arrays in place."""

    def bump(state):
        return jax.tree.map(lambda leaf: leaf + 1.0, state)

    advance = jax.jit(bump, donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    state = {"w": jnp.zeros((512, 512))}
    for step in range(1, 7):
        state = advance(state)
        checkpoints.save(step, state, {})
    for _ in range(50):
        state = advance(state)
    checkpoints.close()
    step, restored, _ = Checkpoints(tmp_path).restore(state)
    assert step == 6 and (np.asarray(restored["w"]) == 6).all()


def test_an_existing_step_is_not_overwritten(run: pathlib.Path):
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(3, make_state(9), {"step": 9})
    assert checkpoints.restore(make_state(0)).record["step"] == 3
    checkpoints.close()


def test_nothing_to_restore(tmp_path: pathlib.Path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.latest_step() is None and checkpoints.restore(make_state(0)) is None
    checkpoints.close()
    with pytest.raises(ValueError, match="max_to_keep must be >= 2"):
        Checkpoints(tmp_path, max_to_keep=1)


def damage(path: pathlib.Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif data:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.fixture
def collect():
    """Orbax leaves unfinished coroutines behind where a file is damaged; they complain when they are collected."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("collect")
@pytest.mark.parametrize("how", ["delete", "truncate", "flip"])
def test_damage_of_any_file_never_gives_wrong_numbers(saved: pathlib.Path, tmp_path: pathlib.Path, how: str):
    """Each file of the newest checkpoint in turn: it is read right, or named, moved away and the one before is read."""
    newest = saved / "checkpoints" / "3"
    files = [path.relative_to(saved) for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    fell_back = 0
    for number, file in enumerate(sorted(files)):
        run = shutil.copytree(saved, tmp_path / str(number))
        damage(run / file, how)
        checkpoints = Checkpoints(run / "checkpoints")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step, state, record = checkpoints.restore(make_state(0))
        # Ours only: the coroutines that orbax drops may be collected, and complain, at any moment.
        caught = [warning for warning in caught if issubclass(warning.category, UserWarning)]
        assert_equal(state, make_state(step))
        assert record["step"] == step
        if step == 2:
            fell_back += 1
            (warning,) = caught
            assert "Checkpoint 3 in" in str(warning.message) and "trying step 2" in str(warning.message)
            assert (run / "damaged_checkpoints" / "3.1").is_dir() and checkpoints.latest_step() == 2
            # The same step can be written again.
            checkpoints.save(3, make_state(3), {"step": 3})
            assert checkpoints.restore(make_state(0)).step == 3
        else:
            assert step == 3 and not caught
        checkpoints.close()
    assert fell_back >= 3, "at least the record, the index and the data matter"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("collect")
def test_all_damaged(run: pathlib.Path):
    for path in run.rglob("*"):
        if path.is_file():
            damage(path, "truncate")
    checkpoints = Checkpoints(run / "checkpoints")
    with pytest.warns(UserWarning) as caught:
        assert checkpoints.restore(make_state(0)) is None
    messages = [str(warning.message) for warning in caught]
    assert "Checkpoint 3" in messages[0] and "trying step 2" in messages[0]
    assert "Checkpoint 2" in messages[1] and "there is none before it: starting from the beginning" in messages[1]
    assert sorted(path.name for path in (run / "damaged_checkpoints").iterdir()) == ["2.1", "3.1"]
    checkpoints.close()


def test_what_a_killed_process_was_writing_is_ignored(run: pathlib.Path):
    """Orbax writes under a temporary name; such a folder is no checkpoint and is cleaned up."""
    partial = run / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "3" / "record", partial / "record")
    checkpoints = Checkpoints(run / "checkpoints")
    assert checkpoints.latest_step() == 3 and checkpoints.restore(make_state(0)).step == 3
    checkpoints.close()
    assert not partial.exists()


def test_another_run_is_an_error_and_no_damage(run: pathlib.Path):
    checkpoints = Checkpoints(run / "checkpoints")

    def check(record):
        raise ValueError(f"not the run of {record['name']}")

    with pytest.raises(ValueError, match="not the run of ä"):
        checkpoints.restore(make_state(0), check=check)
    other = make_state(0).replace(params={"w": jnp.zeros((2, 4)), "extra": jnp.zeros(1)})
    with pytest.raises(ValueError, match="its arrays differ") as error:
        checkpoints.restore(other)
    assert str(error.value).splitlines()[1:] == [
        "  params/extra: saved no, now float32[1]",
        "  params/half: saved bfloat16[2], now no",
        "  params/w: saved float32[2, 3], now float32[2, 4]",
    ]
    assert checkpoints.restore(make_state(0)).step == 3 and not (run / "damaged_checkpoints").exists()
    checkpoints.close()


def test_parameters_as_npz(tmp_path: pathlib.Path):
    params = {"tower": {"dense_0": {"kernel": np.ones((2, 3), np.float32)}}, "bias": jnp.zeros(2)}
    save_params(tmp_path / "new" / "best.npz", params)
    loaded = load_params(tmp_path / "new" / "best.npz")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
