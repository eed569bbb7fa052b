"""Every study runs in several processes as it does in one: from the data to its figures."""

import json
import pathlib

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
STUDIES = {
    "vision/m3vit": "data=2,expert=2",
    "vision/modular": "data=2,expert=2",
    "vision/taskexpert": "data=4",
    "operators/darcy": "data=4",
    "operators/fisher": "data=2,fsdp=2",
    "operators/heat3d": "data=4",
    "operators/physics": "data=4",
    "tabular/multitab": "data=2,fsdp=2",
}


def test_every_study_is_here():
    folders = {study.split("/")[0] for study in STUDIES}
    scripts = [path for folder in folders for path in (EXPERIMENTS / folder).glob("*.py")]
    started = [path for path in scripts if "sys.exit(main())" in path.read_text()]
    assert {str(path.relative_to(EXPERIMENTS).with_suffix("")) for path in started} == set(STUDIES)


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_a_study_in_two_processes(launch, tmp_path, study):
    options = ["--preset", "smoke", "--run", tmp_path / "run", "--distributed", "--mesh", STUDIES[study]]
    done = launch([EXPERIMENTS / f"{study}.py", *options], devices=2, timeout=900, env={"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rows"]
    assert list((tmp_path / "run").glob("**/*.png"))
