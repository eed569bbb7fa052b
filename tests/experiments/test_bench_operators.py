"""The benchmark of operator learning: both sides compute the same, the table is right, the quick run ends."""

import importlib
import json

import jax
import numpy as np
import pytest

MODULES = tuple(f"operators{part}" for part in ("", "_data", "_gpu", "_measure", "_steps", "_table", "_torch"))


@pytest.fixture(scope="module")
def bench(import_beside):
    return import_beside(MODULES, "bench")


@pytest.fixture(scope="module")
def torch_side(bench):
    """The PyTorch side; skips where there is none."""
    pytest.importorskip("torch")
    return importlib.import_module("operators_torch")


@pytest.fixture(scope="module")
def tiny(bench):
    """A network of unequal widths, its parameters and data, and loss and gradient as the library has them."""
    size = bench.Size("Tiny", (6, 5, 9), (2, 7, 4, 9), ("gelu", "leaky_relu"), 3, 12)
    params, batch = size.params(), size.batch()
    return size, params, batch, jax.jit(bench.written(size.model()))(params, batch)


def assert_same(found, expected):
    """Loss and gradient agree to rounding, and no gradient is zero."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert jax.tree.structure(found[1]) == jax.tree.structure(expected[1])
    for mine, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(mine, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("chunk", [None, 4])
def test_fused_products_are_the_same_function(bench, tiny, chunk):
    size, params, batch, expected = tiny
    assert_same(jax.jit(bench.fused(size.model()))(params, bench.chunked(batch, chunk)), expected)


def test_chunks_must_fit(bench, tiny):
    with pytest.raises(ValueError, match="must divide the number of points, 12"):
        bench.chunked(tiny[2], 5)


def test_steps_are_adam_and_scanned_steps_are_single_steps(bench, tiny):
    size, params, batch, (loss, gradient) = tiny
    steps = importlib.import_module("operators_steps")
    single, scanned = (
        steps.timed_training("", bench.written(size.model()), params, batch, steps=count, scan=scan)
        for count, scan in ((1, False), (2, True))
    )
    assert (single.work, scanned.work) == (1, 2)
    (moved, _), first_loss = single.run()
    np.testing.assert_allclose(first_loss, loss, rtol=1e-5)
    for start, end, slope in zip(*map(jax.tree.leaves, (params, moved, gradient)), strict=True):
        clear = np.abs(slope) > 1e-5  # Adam's first step is the learning rate against the gradient's sign
        np.testing.assert_allclose(
            (np.asarray(end) - start)[clear], -steps.LEARNING_RATE * np.sign(slope)[clear], rtol=0.02
        )
    (again, _), _ = single.run()
    (together, _), _ = scanned.run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, together)


def test_frozen_trunk_trains_the_branch_only(bench, tiny):
    size, params, batch, (loss, gradient) = tiny
    frozen, data = bench.frozen_trunk(size.model(), params, batch)
    found, of_branch = jax.jit(frozen)(params, data)
    assert set(data) == {"inputs", "values", "basis"}
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    assert_same((found, of_branch["branch"]), (loss, gradient["branch"]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_branch["trunk"]))


def as_tree(modules, bias, like):
    """Gradients of PyTorch's layers in the form of ours."""
    tree = {"bias": bias.grad.numpy().reshape(1)}
    for net, layers in modules.items():
        names = [f"dense_{layer}" for layer in range(len(layers) - 1)] + ["out"]
        tree[net] = {
            name: {"kernel": layer.weight.grad.numpy().T, "bias": layer.bias.grad.numpy()}
            for name, layer in zip(names, layers, strict=True)
        }
    return jax.tree.map(lambda _, leaf: leaf, like, tree)


@pytest.mark.parametrize("fused", [False, True])
def test_bare_pytorch_is_the_same_network(torch_side, tiny, fused):
    torch = torch_side.torch
    size, params, batch, expected = tiny
    net = torch_side.Bare(size, params, fused=fused)
    inputs, points, values = (torch.from_numpy(batch[name]) for name in ("inputs", "points", "values"))
    loss = torch.nn.functional.mse_loss(net(inputs, points), values)
    loss.backward()
    gradient = as_tree({"branch": net.branch, "trunk": net.trunk}, net.bias, expected[1])
    assert_same((loss.item(), gradient), expected)


@pytest.mark.parametrize("linear_output", [True, False])
def test_deepxde_is_the_same_network(bench, torch_side, tiny, linear_output):
    if torch_side.deepxde is None:
        pytest.skip(torch_side.WHY)
    size, params, batch, expected = tiny
    if not linear_output:
        expected = jax.jit(bench.written(size.model(active_output=True)))(params, batch)
    model = torch_side.deepxde_model(size, params, batch, linear_output=linear_output)
    x, y = model.data.train_next_batch(None)
    losses = model.outputs_losses_train(x, y, None)[1]
    losses.sum().backward()
    modules = {"branch": model.net.branch.linears, "trunk": model.net.trunk.linears}
    assert_same((losses.item(), as_tree(modules, model.net.b[0], expected[1])), expected)


def test_sparse_lu_solves_the_same_systems(bench):
    pytest.importorskip("scipy")
    from mtjax.data.pde import darcy

    grid, fields = bench.data.discretize(bench.data.named("disk"), 9), bench.data.darcy_fields(2, 9)
    ours = darcy.solve(fields, grid, chunk=2).values
    np.testing.assert_allclose(bench.data.sparse_lu(fields, grid), ours, atol=2e-6 * ours.max())


def test_one_by_one_solves_the_same_instances(bench):
    pytest.importorskip("scipy")
    fisher = bench.data.fisher
    config = fisher.FisherConfig()
    data = fisher.generate(config, train_per_form=1, validation_per_form=0, test_per_form=0)["train"]
    for row in range(3):
        theirs = bench.data.one_by_one(config, data, row)
        difference = np.linalg.norm(theirs - data["values"][row]) / np.linalg.norm(theirs)
        assert difference < 1e-4, config.forms[row].name


def test_multiply_adds_of_the_published_sizes(bench):
    """By hand, in thousands: Fisher's products as written, and the trunk's share that the fused form avoids."""
    size = bench.FISHER
    branch = 200 * (2 * 68 * 128 + 3 * 128 * 128 + 3 * 128 * 300)
    trunk = 1280 * (2 * 2 * 128 + 3 * 2 * 128 * 128 + 3 * 128 * 300)
    assert bench.multiply_adds(size, fused=False) == branch + trunk + 3 * 200 * 1280 * 300
    last = 3 * (200 * 128 * 300 + 1280 * 128 * 300)
    core = 3 * (129 * 300 * 128 + 200 * 129 * 128)
    assert bench.multiply_adds(size, fused=True) == branch + trunk - last + core + 3 * 200 * 1280 * 128


def test_in_turns_takes_medians_of_a_unit_of_work(bench, monkeypatch):
    measure = importlib.import_module("operators_measure")
    clock = {"now": 0.0, "runs": []}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(measure.time, "process_time", lambda: 2 * clock["now"])
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(measure, "busy_seconds", lambda: 2 * clock["now"])

    def run(name, seconds):
        clock["runs"].append(name)
        clock["now"] += next(seconds)

    first, second = iter([9.0, 0.4, 0.2, 0.6]), iter([9.0, 1.0, 1.0, 1.0])
    functions = [measure.Timed("a", lambda: run("a", first), 10), measure.Timed("b", lambda: run("b", second), 1, 0.5)]
    result = measure.in_turns(functions, turns=3)
    assert clock["runs"] == ["a", "b"] * 4
    assert result["a"]["ms"] == 40.0 and result["a"]["range"] == [20.0, 60.0] and result["a"]["cpu_ms"] == 80.0
    assert result["b"]["ms"] == 1000.0 and result["b"]["compile_s"] == 0.5 and result["a"]["compile_s"] is None


def test_disturbed_turns_are_left_out(bench, monkeypatch):
    measure = importlib.import_module("operators_measure")
    others = iter([0.0, 0.5, 0.0, 0.0, 0.1, 0.0])  # cores that others use in each of the turns
    clock = {"now": 0.0, "busy": 0.0}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(measure.time, "process_time", lambda: clock["now"])
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(measure, "busy_seconds", lambda: clock["busy"])
    monkeypatch.setattr(measure, "spare_cores", lambda: 0)

    def run():
        taken = next(others)
        clock["now"] += 1 + taken
        clock["busy"] += (1 + taken) * (1 + taken)

    result = measure.in_turns([measure.Timed("a", run)], turns=4)["a"]  # the first run is not counted
    assert result["quiet"] and result["turns"] == 4
    assert result["ms"] == 1000.0 and result["range"] == [1000.0, 1100.0]
    assert next(others, None) is None
    for noisy in ([0.5] * 7, [0.0, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0]):  # two quiet turns are too few
        others = iter(noisy)
        result = measure.in_turns([measure.Timed("a", run)], turns=3)["a"]
        assert not result["quiet"] and result["turns"] == 6


def test_busy_seconds_count_this_process(bench):
    measure = importlib.import_module("operators_measure")
    before, began = measure.busy_seconds(), measure.time.process_time()
    if not before:
        pytest.skip("no /proc/stat")
    while measure.time.process_time() < began + 0.2:
        pass
    assert measure.busy_seconds() - before >= 0.15


# The table.

WHERE = {"device": "1 x CPU", "load": 1.0, "dirty": False, "commit": "0123456789ab", "versions": {"jax": "0.10.1"}}


def timing(ms, cpu_ms):
    return {"ms": ms, "range": [ms, ms], "cpu_ms": cpu_ms, "cpu_range": [cpu_ms / 2, cpu_ms], "turns": 3} | {
        "quiet": True,
        "compile_s": None,
        "threads": 2,
    }


def content():
    def step(side, variant, ms, cpu_ms, active=False):
        cell = {"size": "Fisher", "functions": 200, "points": 1280, "side": side, "variant": variant}
        return cell | {"active_output": active, "per_s": 1e3 / ms, "gflops": 80.0} | timing(ms, cpu_ms)

    train = [
        step("mtjax", "library, scan", 4.0, 8.0),
        step("mtjax", "active output, as written, scan", 9.0, 16.0, active=True),
        step("mtjax", "trunk frozen", 1.0, 2.0),
        step("PyTorch", "as written", 10.0, 16.0),
        step("DeepXDE", "linear output", 20.0, 20.0),
        step("DeepXDE", "active output", 27.0, 24.0, active=True),
    ]
    problem = {"problem": "Darcy 64 x 64", "unit": "solutions", "counted": 8}
    data = [
        problem | {"side": "mtjax", "per_s": 500.0} | timing(2.0, 3.0),
        problem | {"side": "SciPy", "per_s": 50.0, "deviation": 1e-6} | timing(20.0, 20.0),
    ]
    layout = {"layout": "one function", "functions": 1, "values": 65536}
    inference = [layout | {"per_s": 900000, "per_cpu_s": 500000} | timing(70.0, 120.0)]
    gpu = [
        {
            "size": "Fisher",
            "functions": 3200,
            "points": 1280,
            "side": "mtjax",
            "form": "by hand",
            "precision": "float32",
        }
        | {"tflops": 20.0, "matmul_tflops": 50.0, "of_matmul": 0.4, "copy_gb_per_s": 3000.0, "gb_per_s": 900.0}
        | {"of_copy": 0.3, "of_bound": 0.6}
        | timing(1.0, 1.0)
    ]
    rows = {"train": train, "data": data, "inference": inference, "gpu": gpu}
    return {"sections": {name: {"where": WHERE, "wall_s": 1.0, "rows": part} for name, part in rows.items()}}


def test_ratios_pair_the_same_functions(bench):
    pairs = bench.table.ratios(bench.table.rows_of(content(), "train"))
    found = {(pair["variant"], pair["other"]): (pair["cpu"], pair["wall"]) for pair in pairs}
    assert found == {
        ("library, scan", "PyTorch, as written"): (2.0, 2.5),
        ("library, scan", "DeepXDE, linear output"): (2.5, 5.0),
        ("active output, as written, scan", "DeepXDE, active output"): (1.5, 3.0),
    }
    assert pairs[0]["cpu_range"] == [1.0, 4.0]  # 8 / 8 and 16 / 4


def test_several_threads_on_a_busy_machine_are_not_judged(bench):
    busy = content()
    for row in bench.table.rows_of(busy, "train"):
        row["quiet"] = False
    assert all(pair["disturbed"] for pair in bench.table.ratios(bench.table.rows_of(busy, "train")))
    assert not any("Training" in goal.goal for goal in bench.table.goals(busy))
    assert "2.50x*" in bench.table.render([busy])
    for row in bench.table.rows_of(busy, "train"):
        row["threads"] = 1  # whose CPU time is its own
    assert [goal.least for goal in bench.table.goals(busy) if "Training" in goal.goal] == [3]


def test_goals(bench):
    goals = {goal.goal: goal for goal in bench.table.goals(content())}
    assert len(goals) == 4
    assert not goals["Training step, CPU time of DeepXDE over ours"].holds
    assert goals["Training step, wall time of DeepXDE over ours"].holds
    assert goals["Generation, solutions per second"].holds
    inference = goals["Inference, query points per second"]
    assert not inference.holds
    assert bench.table.verdict(inference).endswith("900,000 (goal 1,000,000; one function, 2 threads): does not hold")


def test_table_has_every_section_and_whole_rows(bench):
    text = bench.table.render([content()])
    titles = ("## Goals", "## Training step: Fisher, 200 x 1,280 points, 2 threads", "## Generating data")
    for title in (*titles, "## Inference, the demo network", "## Training step on the GPU"):
        assert title in text
    assert "| DeepXDE, linear output / mtjax, library, scan | 2.50x |" in text and "10.0x" in text and "40%" in text
    width = 0
    for line in text.splitlines():
        width = line.count(" | ") if line.startswith("| ") and not width else width if line.startswith("| ") else 0
        assert not line.startswith("| ") or (line.count(" | ") == width and line.endswith(" |")), line


def test_committed_results_render(bench):
    for path in bench.RESULTS.values():
        if path.exists():
            stored = json.loads(path.read_text())
            assert stored["benchmark"] == "operators"
            assert bench.table.render([stored]).count("\n") > 10


@pytest.mark.slow
def test_quick_run(bench):
    files = [*bench.RESULTS.values(), bench.TABLE]
    before = [path.read_bytes() if path.exists() else None for path in files]
    found = bench.main(["--quick", "--only", *bench.SECTIONS])
    assert [path.read_bytes() if path.exists() else None for path in files] == before, "a quick run writes no file"
    assert list(found["sections"]) == list(bench.SECTIONS)
    for name, section in found["sections"].items():
        assert section["rows"] and {"device", "versions", "commit", "load"} <= set(section["where"]), name
        for row in section["rows"]:
            assert 0 < row["range"][0] <= row["ms"] <= row["range"][1] and row["threads"] >= 1, row
    assert json.loads(json.dumps(found)) == found, "all of it has a JSON form"
    assert "nan" not in bench.table.render([found])


@pytest.mark.slow
def test_numbers_of_threads_are_measured_by_processes_of_their_own(bench):
    found = bench.main(["--quick", "--only", "inference", "--threads", "1", "1", "--turns", "1"])
    rows = found["sections"]["inference"]["rows"]
    assert [row["layout"] for row in rows] == 2 * [row["layout"] for row in rows[: len(rows) // 2]]
    assert {row["threads"] for row in rows} == {1}
