"""Scale on paper: rows are those of compiled steps, times follow from bytes, the document is made of the rows."""

import dataclasses
import json

import jax
import pytest

MODULES = ("scaling", "scaling_cases", "scaling_model", "scaling_table", "operators_table")


@pytest.fixture(scope="module")
def bench(import_beside):
    return import_beside(MODULES, "bench")


@pytest.fixture(scope="module")
def row(bench):
    """MultiTab on the 8 devices of the tests, in its smallest form."""
    case = bench.cases.multitab(bench.cases.SMOKE, jax.device_count(), "losses only")
    row = bench.row_of(case)
    return row | {"formula": bench.formula(case, row, bench.cases.SMOKE), "predicted": bench.predicted(row)}


def test_rows_of_a_compiled_step(bench, row):
    assert row["devices"] == 8 and row["batch_size"] == 8 * bench.cases.SMOKE.rows
    assert row["argument_bytes"] == row["state_bytes"] + row["batch_bytes"]
    assert row["jacobian_bytes"] == 8 * row["params_bytes"] and row["num_tasks"] == 8
    reduced = sum(one["bytes"] for one in row["collectives"])
    assert row["formula"] == {"all-reduce": row["params_bytes"]}
    assert row["params_bytes"] <= reduced <= row["params_bytes"] + 64  # and the losses
    assert {one["group"] for one in row["collectives"]} == {8}
    json.dumps(row)


def test_predictions_are_ordered(row):
    for prediction in row["predicted"].values():
        for name in ("compute", "memory", "network", "step"):
            best, worst = prediction[name]
            assert 0 < best <= worst
        assert 0 < prediction["efficiency"][1] <= prediction["efficiency"][0] <= 1


def exchange(bench, kind, group, pods, size=1e9):
    inside = {pod: min(pod, group) for pod in bench.PODS} if pods is None else pods
    return bench.model.Exchange(kind, size, group, inside)


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"])
def test_time_of_a_collective(bench, kind):
    model = bench.model
    seconds = model.exchange_seconds
    for hardware in model.ALL:
        for best in (True, False):
            one = exchange(bench, kind, 8, None)
            assert seconds(one._replace(size=2e9), hardware, best=best) > seconds(one, hardware, best=best)
            assert seconds(one, hardware, best=True) <= seconds(one, hardware, best=best)
            alone = one._replace(group=1, inside=dict.fromkeys(bench.PODS, 1))
            assert kind == "collective-permute" or seconds(alone, hardware, best=best) == 0


def test_leaving_the_node_costs_more(bench):
    model = bench.model
    inside, across = (exchange(bench, "all-reduce", 8, {8: m, 256: 8, 8960: 8}) for m in (8, 1))
    times = [model.exchange_seconds(one, model.H100, best=True) for one in (inside, across)]
    assert times[1] == pytest.approx(times[0] * model.H100.link / model.H100.out, rel=0.01)
    # A group that fills its nodes brings each part through all the ways out.
    whole = exchange(bench, "all-reduce", 64, {8: 8, 256: 64, 8960: 64}, size=1e11)
    expected = 2 * 7 / 8 * 1e11 / model.H100.link + 2 * 7 / 8 * 1e11 / 8 / model.H100.out
    assert model.exchange_seconds(whole, model.H100, best=True) == pytest.approx(expected, rel=0.01)


def test_the_smaller_of_reduction_forms(bench):
    """An all-reduce is a reduce-scatter and an all-gather."""
    model = bench.model
    reduce, gather = (exchange(bench, kind, 8, None) for kind in ("all-reduce", "all-gather"))
    scatter = exchange(bench, "reduce-scatter", 8, None, size=1e9 / 8)
    for hardware in model.ALL:
        times = [model.exchange_seconds(one, hardware, best=False) for one in (reduce, scatter, gather)]
        assert times[0] == pytest.approx(times[1] + times[2], rel=0.01)


def test_a_step_is_bound_by_what_is_longest(bench):
    model = bench.model
    work = {"flops": 1e12, "accessed": 1e9, "exchanges": [], "peak_bytes": 1e10, "hardware": model.V5E}
    alone = model.predict(**work)
    assert alone.limit == "compute" and alone.step == alone.compute and alone.efficiency == (1, 1) and alone.fits
    assert model.predict(**work | {"accessed": 1e12}).limit == "memory"
    slow = model.predict(**work | {"exchanges": [exchange(bench, "all-reduce", 256, None, size=1e11)]})
    assert slow.limit == "network" and slow.efficiency[1] < slow.efficiency[0] < 0.05
    assert slow.step == (slow.network[0], pytest.approx(alone.step[1] + slow.network[1]))
    assert not model.predict(**work | {"peak_bytes": 2e10}).fits


def test_collectives_are_merged_without_losing_bytes(bench, row):
    found = bench.exchanges(row)
    assert sum(one.times * one.size for one in found) == sum(one["bytes"] for one in row["collectives"])
    assert all(set(one.inside) == set(bench.PODS) for one in found)


def test_document_and_figures(bench, row, tmp_path):
    doubled = row | {"devices": 16, "route": "Gramian first"}
    tasks = [row | {"num_tasks": k, "route": r, "flops": row["flops"] * k} for r in bench.cases.ROUTES for k in (1, 2)]
    content = {
        "hardware": [dataclasses.asdict(hardware) for hardware in bench.model.ALL],
        "sections": {
            "weak": {"rows": [row, doubled]},
            "tasks": {"rows": tasks},
            "check": {"rows": [row | {"held_bytes": row["argument_bytes"], "ratio": 1.0}]},
            "compilers": {"rows": [row | {"compiler": c, "dtype": "float32"} for c in ("cpu", "TPU v5 lite")]},
            "measure": {"rows": [row | {"device": "H100", "step_s": 0.01, "predicted_s": [0.005, 0.02]}]},
        },
    }
    bench.table.write(content, tmp_path / "SCALING.md")
    text = (tmp_path / "SCALING.md").read_text()
    assert "| TPU v5 lite | float32 |" in text and "(1.00)" in text
    assert "### MultiTab: " in text and "| TPU v5e | 197 |" in text and "10.00 | 5 – 20 |" in text
    assert "| 2 | data=8 | Jacobian |" in text and "| arguments |" in text and "1.0000" in text
    assert len(list((tmp_path / "results" / "figures").glob("*.png"))) == 2


def test_paper_sizes_have_the_published_numbers(bench):
    """Shapes only: nothing is compiled."""
    cases = bench.cases
    made = {
        "MoE ViT": cases.moe_vit(cases.DEMO, 4096, "losses only"),
        "MultiTab": cases.multitab(cases.DEMO, 4096, "Gramian first"),
        "K tasks": cases.many_tasks(cases.DEMO, 64, "Jacobian", 16, fsdp=8),
    }
    assert [case.mesh for case in made.values()] == ["data=512,expert=8", "data=4096", "data=8,fsdp=8"]
    params = jax.eval_shape(made["MoE ViT"].problem.init_params, jax.random.key(0))
    experts = params["trunk"]["block_1"]["experts"]
    assert experts["kernel_in"].shape == (16, 384, 384)
    assert made["MultiTab"].problem.train["numeric"].shape == (4096 * 2048, 17)
    assert len(made["K tasks"].problem.loss_names) == 16


@pytest.mark.slow
def test_smoke_run(bench):
    before = bench.RESULTS.stat().st_mtime_ns if bench.RESULTS.exists() else None
    content = bench.main(["--preset", "smoke"])
    assert before == (bench.RESULTS.stat().st_mtime_ns if bench.RESULTS.exists() else None)
    content["sections"].pop("compilers", None)  # where there is libtpu
    assert {name: len(section["rows"]) for name, section in content["sections"].items()} == {
        "weak": 4,
        "tasks": 8,
        "check": 3,
    }
    assert [row["ratio"] for row in content["sections"]["check"]["rows"]] == [1, 1, 1]
    assert bench.table.render(content).startswith("# Scale on paper")
