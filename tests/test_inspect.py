"""python -m mtjax.inspect: every part of a run, runs with several models, damage, old formats, and what is no run."""

import gc
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mtjax import inspect
from mtjax.sharding import make_mesh
from mtjax.train.checkpoint import Checkpoints


def make_state(step: int, mesh: jax.sharding.Mesh) -> dict:
    def place(leaf, *spec):
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))

    return {
        "params": {"dense": {"kernel": place(jax.random.normal(jax.random.key(step), (256, 64)), "fsdp")}},
        "opt_state": (
            {"mu": place(jnp.zeros((8, 4), jnp.bfloat16), None, "tensor"), "count": place(jnp.int32(step))},
            (),
        ),
        "rng": place(jax.random.split(jax.random.key(0), 2)),
        "none": place(jnp.zeros((0, 2))),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A run with two models: one with checkpoints 10 (the best), 30 and 40, one with metrics only."""
    run = tmp_path_factory.mktemp("inspect") / "run"
    mesh = make_mesh("fsdp=4,tensor=2")
    first, second = run / "models" / "first", run / "models" / "second"
    checkpoints = Checkpoints(first / "checkpoints", keep_best=True)
    for step, score in ((10, 0.75), (20, 0.5), (30, 0.25), (40, None)):
        record = {"run": {"seeds": [0, 1], "train": {"batch_size": 32}}, "log": {}}
        checkpoints.save(step, make_state(step, mesh), record, score=score)
    checkpoints.close()
    second.mkdir()
    lines = [
        {
            "step": step,
            "epoch": step / 20,
            "metrics": {"price": {"rmse": [1.0, 2.0 + step]}, "sold": {"auc": [None, None]}},
        }
        for step in (20, 40)
    ]
    for folder in (first, second):
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "ep')
    (run / "run.json").write_text(json.dumps({"arguments": {"preset": "demo", "set": []}, "config": {"width": 4}}))
    return run


@pytest.fixture
def run(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(saved, tmp_path / "run")


def printed(capsys, *arguments) -> tuple[int, str, str]:
    status = inspect.main([str(argument) for argument in arguments])
    return (status, *capsys.readouterr())


def test_json_holds_all_of_it(saved: pathlib.Path, capsys):
    status, out, _ = printed(capsys, saved, "--json")
    found = json.loads(out)
    assert status == 0 and found["run"] == str(saved)
    assert found["started_with"] == {"arguments": {"preset": "demo", "set": []}, "config": {"width": 4}}
    first, second = found["models"]
    assert (first["name"], second["name"]) == ("models/first", "models/second")
    assert second["checkpoints"] == second["arrays"] == [] and second["evaluations"] == 2
    assert first["last"]["step"] == 40 and first["description"]["train"] == {"batch_size": 32}
    assert first["code"]["versions"]["jax"] == jax.__version__
    assert [(c["step"], c["score"], c["problem"]) for c in first["checkpoints"]] == [
        (10, 0.75, None),
        (30, 0.25, None),
        (40, None, None),
    ]
    folder = saved / "models" / "first" / "checkpoints" / "40"
    assert first["checkpoints"][-1]["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    arrays = {array.pop("path"): tuple(array.values()) for array in first["arrays"]}
    assert arrays == {
        "none": ([0, 2], "float32", 0, arrays["none"][-1]),
        "opt_state/0/count": ([], "int32", 4, "replicated on fsdp=4 tensor=2"),
        "opt_state/0/mu": ([8, 4], "bfloat16", 64, "None, tensor on fsdp=4 tensor=2"),
        "params/dense/kernel": ([256, 64], "float32", 65536, "fsdp on fsdp=4 tensor=2"),
        "rng": ([2], "key<fry>", 16, arrays["rng"][-1]),
    }


def test_what_a_person_reads(saved: pathlib.Path, capsys):
    status, out, _ = printed(capsys, saved, "--params")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert status == 0
    for line in (
        "arguments.preset demo",
        "config.width 4",
        "models/first: evaluation 2 (step 40, epoch 2, mean over 2 runs)",
        "price rmse 21.5",
        "sold auc n/a",
        "params/dense/kernel [256, 64] float32 65.5 kB fsdp on fsdp=4 tensor=2",
        "params 1 16384 65.5 kB 1 of 1 split",
        "opt_state 2 33 68 B 1 of 2 split",
        "rng 1 2 16 B whole",
    ):
        assert line in lines, out
    assert any(line.startswith("10 ") and line.endswith("0.75 good (record and index)") for line in lines)
    assert any(line.startswith("models/first: saved by ") and f"jax {jax.__version__}" in line for line in lines)
    without = printed(capsys, saved)[1]
    assert "params/dense/kernel" not in without and "params" in without


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # coroutines that orbax drops
def test_damage(run: pathlib.Path, capsys):
    """Of a record, of an index, and of numbers: the last is seen by --check only."""
    checkpoints = run / "models" / "first" / "checkpoints"
    record = checkpoints / "10" / "record" / "metadata"
    record.write_text(record.read_text().replace("batch_size", "batch_sizE"))
    (checkpoints / "40" / "state" / "_METADATA").unlink()
    for path in (checkpoints / "30" / "state").glob("**/d/*"):
        data = bytearray(path.read_bytes())
        if len(data) > 4096:  # numbers; the others hold the index
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    (run / "models" / "first" / "damaged_checkpoints" / "20.1").mkdir(parents=True)

    problems = {c["step"]: c["problem"] for c in inspect.inspect_run(run)["models"][0]["checkpoints"]}
    assert problems[10] == "its record does not match its checksum" and problems[30] is None and problems[40]
    checked = {c["step"]: c["problem"] for c in inspect.inspect_run(run, check=True)["models"][0]["checkpoints"]}
    assert checked[30] == "1 of its arrays do not match their checksums, the first is params/dense/kernel"
    out = printed(capsys, run, "--check")[1]
    assert "damaged: its record does not match its checksum" in out and out.count("damaged: ") == 3
    assert "damaged and put aside: 20.1" in out
    gc.collect()


def test_check_of_a_good_run(saved: pathlib.Path, capsys):
    out = printed(capsys, saved, "--check")[1]
    assert out.count(" good\n") == 3 and "damaged" not in out


def test_an_older_format(run: pathlib.Path, capsys):
    import zlib

    for path in run.glob("models/first/checkpoints/*/record/metadata"):
        content = json.loads(json.loads(path.read_text())["content"])
        text = json.dumps({"record": content["record"], "layout": content["layout"], "checksum": 1})
        path.write_text(json.dumps({"content": text, "checksum": zlib.crc32(text.encode())}))
    status, out, _ = printed(capsys, run, "--params")
    assert status == 0 and out.count("of another version of mtjax (format 1, this one restores 2)") == 3
    assert "params/dense/kernel" in out


def test_a_run_of_the_library(tmp_path: pathlib.Path, capsys):
    """What `fit(directory=...)` leaves: no run.json, the configuration is that of the checkpoint."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, {"params": {"w": jnp.ones(2)}}, {"run": {"train": {"batch_size": 32}}})
    checkpoints.close()
    status, out, _ = printed(capsys, tmp_path, "--params")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert status == 0 and "train.batch_size 32" in lines and "params/w [2] float32 8 B one device" in lines


def test_what_is_no_run(saved: pathlib.Path, tmp_path: pathlib.Path, capsys):
    assert printed(capsys, tmp_path / "no")[::2] == (
        2,
        f"error: {tmp_path / 'no'} is no directory; give the directory of a run, such as runs/20261126-101500\n",
    )
    status, _, error = printed(capsys, tmp_path)
    assert status == 2 and error.startswith(f"error: {tmp_path} is no run: it has no run.json, and no checkpoints")
    status, _, error = printed(capsys, saved.parent)
    assert status == 2 and error.endswith("It holds runs: run; give one of them\n")
    (tmp_path / "run.json").write_text("{}")
    assert "no metrics or checkpoints yet" in printed(capsys, tmp_path)[1]


def test_help():
    command = [sys.executable, "-m", "mtjax.inspect", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "What a run directory holds" in done.stdout and "--params" in done.stdout
