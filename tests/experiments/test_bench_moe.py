"""The benchmark of mixtures of experts: both sides cost the same, the quick run ends, the table is right."""

import jax
import numpy as np
import pytest

MODULES = ("moe", "moe_cases", "moe_models", "moe_table", "operators_measure", "operators_table")


@pytest.fixture(scope="module")
def bench(import_beside):
    return import_beside(MODULES, "bench")


def test_one_expert_for_all_is_the_dense_network(bench):
    cases = bench.cases
    shape = cases.Shape("one", 8, 6, 5, 1, 1)
    x, _, ids, params = cases.layer(shape)
    alone = jax.tree.map(lambda leaf: leaf[0], params)
    y = jax.jit(cases.sparse(cases.BACKENDS["auto"]))(x, np.ones((8, 1), np.float32), ids, params)
    np.testing.assert_allclose(y, cases.dense(x, alone), atol=1e-5)
    wide = cases.network(shape._replace(top_k=3))[1]
    assert {name: leaf.shape for name, leaf in wide.items()}["kernel_in"] == (6, 15)


def test_quick_run_and_table(bench, monkeypatch):
    monkeypatch.setattr(bench.cases, "BACKENDS", {name: bench.cases.BACKENDS[name] for name in ("auto", "all_experts")})
    before = bench.RESULTS.stat().st_mtime_ns if bench.RESULTS.exists() else None
    content = bench.main(["--quick", "--sections", "dispatch", "parallel", "extract"])
    assert before == (bench.RESULTS.stat().st_mtime_ns if bench.RESULTS.exists() else None)
    rows = content["sections"]["dispatch"]["rows"]
    assert [row["dispatch"] for row in rows] == 2 * [bench.cases.DENSE, "auto", "all_experts"]
    assert all(row["dropped"] in (None, 0.0) and row["ms"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1
    (volume,) = content["sections"]["parallel"]["rows"]
    assert volume["all_to_alls"] == 2 and volume["equal"]
    whole, cut, half, every = content["sections"]["extract"]["rows"]
    assert half["bytes"] < cut["bytes"] < whole["bytes"] == every["bytes"] and whole["ratio"] == 1
    text = bench.table.render(content)
    assert "| auto |" in text and "## Expert parallelism" in text


def test_goals_compare_ratios_with_their_limits(bench):
    row = {"dispatch": "auto", "pass": "forward", "ratio": 1.5, "shape": "A", "threads": 2, "quiet": True}
    slow = row | {"pass": "forward and backward", "ratio": 5.0}
    first, second = bench.table.goals({"sections": {"dispatch": {"rows": [row, slow]}}})
    assert first.holds and not second.holds
    assert str(second).startswith("auto, forward and backward, shape A, 2 threads: 5.00 times the dense network (goal")
    assert str(second).endswith("does not hold")


@pytest.mark.slow
def test_whole_models_and_their_compile_time(bench):
    content = bench.main(["--quick", "--sections", "step", "compile"])
    rows = content["sections"]["step"]["rows"]
    dense, sparse = rows[:2]
    assert dense["macs"] < sparse["macs"] < 1.05 * dense["macs"], "the gates are extra"
    assert len(content["sections"]["compile"]["rows"]) == 4
    assert "## Compile time" in bench.table.render(content)
