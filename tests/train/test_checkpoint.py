"""Checkpoints: round trip of every kind of leaf, damage of every file, other runs, and parameters as npz."""

import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtjax.sharding import make_mesh
from mtjax.train.checkpoint import CheckpointError, Checkpoints, code_version, load_params, read_content, save_params


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


def spread(state: State, mesh: jax.sharding.Mesh) -> State:
    """The state on a mesh, its matrix and keys split where the mesh allows."""
    specs = {"params/w": jax.P("fsdp"), "keys": jax.P("data"), "opt_state/0/mu/w": jax.P(None, "tensor")}

    def place(path, leaf):
        spec = specs.get(jax.tree_util.keystr(path, simple=True, separator="/"), jax.P())
        return jax.device_put(leaf, jax.NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, state)


def test_another_mesh(tmp_path: pathlib.Path):
    """Saved from 8 devices; restored to other axes, to 2 devices and to 1, from arrays and from shapes."""
    saved = make_state(5).replace(params={"w": jnp.arange(24.0).reshape(2, 12), "half": jnp.ones(2, jnp.bfloat16)})
    saved = saved.replace(opt_state=optax.adam(1e-3).init(saved.params))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(5, spread(saved, make_mesh("data=2,fsdp=2,tensor=2")), {})
    checkpoints.close()
    for spec, count in (("tensor=4,data=2", 8), ("fsdp=2", 2), ("data=1", 1)):
        target = spread(saved, make_mesh(spec, jax.devices()[:count]))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
        for template in (target, shapes):
            restored = Checkpoints(tmp_path / "checkpoints").restore(template).state
            assert_equal(restored, saved)
            for leaf, asked in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
                assert leaf.sharding.is_equivalent_to(asked.sharding, leaf.ndim)


def test_all_kinds_of_leaves(tmp_path: pathlib.Path):
    tree = {
        "bool": jnp.array([True, False]),
        "int8": jnp.arange(-3, 3, dtype=jnp.int8),
        "complex": jnp.array([1 + 2j]),
        "float8": jnp.ones(3, jnp.float8_e4m3fn),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "key": jax.random.key(3),
        "other key": jax.random.key(3, impl="rbg"),
        "no keys": jax.random.split(jax.random.key(0), 2)[:0],
        "numpy": np.arange(5),
        "wide": np.linspace(0, 1, 3),
        "nothing": None,
        "list": [jnp.float32(1.5), ()],
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree, {})
    shapes = jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    for target in (tree, shapes):
        restored = checkpoints.restore(target).state
        assert_equal(restored, tree)
        assert isinstance(restored["numpy"], np.ndarray) and isinstance(restored["empty"], jax.Array)
    checkpoints.close()


def test_the_best_is_kept_beside_the_latest(tmp_path: pathlib.Path):
    scores = {1: 0.5, 2: float("nan"), 3: 0.9, 4: 0.7, 5: None, 6: 0.9, 7: 0.1, 8: 0.2}
    state, kept = {"w": jnp.zeros(3)}, []
    for step, score in scores.items():
        if step in (1, 5):  # another process goes on
            checkpoints = Checkpoints(tmp_path / "checkpoints", keep_best=True)
        checkpoints.save(step, {"w": state["w"] + step}, {"step": step}, score=score)
        if step in (4, 8):
            best = checkpoints.best_step()
            checkpoints.close()
            kept.append((best, sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())))
    assert kept == [(3, [3, 4]), (6, [6, 7, 8])], "of equals the latest"
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_best=True)
    assert checkpoints.restore(state).step == 8
    restored = checkpoints.restore(state, step=checkpoints.best_step())
    assert restored.step == 6 and restored.record == {"step": 6} and (restored.state["w"] == 6).all()
    assert checkpoints.restore(state, step=5) is None
    checkpoints.close()


def rewrite(folder: pathlib.Path, change: Callable[[dict], None]) -> None:
    """Changes what lies beside the arrays, with a right checksum."""
    path = folder / "record" / "metadata"
    content = json.loads(json.loads(path.read_text())["content"])
    change(content)
    text = json.dumps(content)
    path.write_text(json.dumps({"content": text, "checksum": zlib.crc32(text.encode())}))


def test_another_version_of_the_code_is_one_warning(run: pathlib.Path):
    code = read_content(run / "checkpoints" / "3")["code"]
    assert code == code_version() and code["versions"].keys() >= {"mtjax", "jax", "flax", "optax", "orbax-checkpoint"}

    def change(content):
        content["code"]["versions"]["jax"] = "0.0.1"
        content["code"]["commit"] = content["code"]["commit"] and "f" * 40

    rewrite(run / "checkpoints" / "3", change)
    with pytest.warns(
        UserWarning, match=r"Checkpoint 3 in .* other versions \(jax 0\.0\.1, now .*may differ"
    ) as caught:
        assert Checkpoints(run / "checkpoints").restore(make_state(0)).step == 3
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert ("mtjax at commit ffffffff, now" in str(caught[0].message)) == (code["commit"] is not None)


def test_another_format_is_an_error_and_no_damage(run: pathlib.Path):
    def older(content):
        for key in ("format", "checksums", "score", "code"):
            del content[key]
        content["checksum"] = 1

    rewrite(run / "checkpoints" / "3", older)
    with pytest.raises(
        ValueError, match=r"Checkpoint 3 in .* by an older version of mtjax \(format 1, this version reads"
    ):
        Checkpoints(run / "checkpoints").restore(make_state(0))
    rewrite(run / "checkpoints" / "3", lambda content: content.update(format=9))
    with pytest.raises(ValueError, match=r"by a newer version of mtjax \(format 9"):
        Checkpoints(run / "checkpoints").restore(make_state(0))
    assert not (run / "damaged_checkpoints").exists()


def test_a_folder_that_cannot_be_made(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"folder for checkpoints .*/file/run cannot be made \(Not a directory\)"):
        Checkpoints(tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match=r"/file cannot be made \(File exists\)"):
        Checkpoints(tmp_path / "file")


def test_no_space_and_no_permission_are_sentences_and_leave_the_last_checkpoint():
    """In another process, see refused.py for how."""
    script = pathlib.Path(__file__).with_name("refused.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, "orbax's pages of them"
    said = json.loads(done.stdout)
    directory = said["directory"]
    failed = f"could not be written: {directory} (File too large); the last good checkpoint is step"
    denied = f"Checkpoint 5 could not be written: {directory} (Permission denied); the last good checkpoint is step 4"
    assert said["full"] == {
        "save": None,
        "next save": f"Checkpoint 2 {failed} 1",
        "try again": None,
        "close after it": None,
        "close": f"Checkpoint 4 {failed} 3",
        "intact": 3,
        "then": 4,
        "left": ["3", "4"],
    }
    assert said["read-only"] == {"save": denied, "close": None, "intact": 4}


def test_parameters_as_npz(tmp_path: pathlib.Path):
    params = {"tower": {"dense_0": {"kernel": np.ones((2, 3), np.float32)}}, "bias": jnp.zeros(2)}
    save_params(tmp_path / "new" / "best.npz", params)
    loaded = load_params(tmp_path / "new" / "best.npz")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
