"""The benchmark for a GPU in its reduced form, on a CPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from conftest import as_messages, preference_rows
from datasets import Dataset
from packaging.version import Version
from recipe_runs import RECIPES


pytestmark = [pytest.mark.slow, pytest.mark.any_trl]


def run_part(part: int, model: str, directory: Path) -> tuple[dict, str]:
    """Figures and table after a part, in a process of its own as a user starts it."""
    path = directory / "pairs.parquet"
    if not path.is_file():
        Dataset.from_list([as_messages(row) for row in preference_rows(96, seed=5)]).to_parquet(str(path))
    paths = [str(RECIPES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **{**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        **{"MODEL": model, "PAIRS": str(path), "OUTPUT": str(directory / "gpu"), "SMALL": "1"},
        **{"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    }
    command = ["bash", str(RECIPES / "benchmark" / "gpu.sh"), str(part)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((directory / "gpu" / "gpu.json").read_text(encoding="utf-8"))
    return record, (directory / "gpu" / "gpu.md").read_text(encoding="utf-8")


def errors_of(record: dict) -> dict[str, str]:
    return {name: entry["error"] for name, entry in record["steps"].items() if "error" in entry}


def test_rewards_speed_and_throughput_are_measured(llama, tmp_path):
    record, table = run_part(1, llama, tmp_path)
    assert (
        not errors_of(record)
        and record["device"] == "CPU"
        and {"torch", "transformers", "trl"} <= set(record["versions"])
    )
    steps = {name: entry["figures"] for name, entry in record["steps"].items()}
    ways = steps["rewards"]["ways"]
    assert steps["rewards"]["pairs"] == 8 and ways["float32, batches"]["largest"] < 1e-5
    # Bfloat16 rounds, and no pair is far from float32.
    others = [way for name, way in ways.items() if not name.startswith("float32")]
    assert len(others) == 4 and all(1e-6 < way["largest"] < 0.1 and way["alike"] > 0.5 for way in others)
    assert "needs a GPU" in steps["rewards, flash attention"]["left_out"]
    rates = steps["throughput"]["ways"]
    assert [name.split(",")[0] for name in rates] == ["scoring"] * 2 + ["training"] * 2
    for name, way in rates.items():
        flops = (2 if name.startswith("scoring") else 6) * steps["throughput"]["weights"] * way["tokens_per_second"]
        assert way["flops"] == pytest.approx(flops) and way["memory"] is None and "share_of_peak" not in way
    assert steps["speed"][0]["scoring"]["pairs"] == 6
    assert table.startswith("| Step | What | Measured |\n") and "the peak of this device is not in the table" in table
    for name in steps:
        assert f"\n| {name} | " in table


@pytest.mark.skipif(Version(trl.__version__) < Version("1.13"), reason="takes a minute, and runs on the newest TRL")
def test_quality_and_rounds_are_measured_and_a_second_call_goes_on(llama, tmp_path):
    record, table = run_part(2, llama, tmp_path)
    assert not errors_of(record)
    assert len(record["steps"]["quality, pairs"]["figures"]) == 3 + 2
    assert "| default, " in table and "(against the labels alone)" in table
    ways = record["steps"]["rounds, float32"]["figures"]["ways"]
    # Nothing is sharded on a CPU, so nothing differs.
    assert ways["fsdp2"]["is_within"] and ways["fsdp2"]["kept"] == ways["fsdp2"]["kept_alike"] > 0
    assert ways["fsdp2"]["largest_reward_difference"] < ways["fsdp2"]["tolerance"]
    seconds = {name: entry["seconds"] for name, entry in record["steps"].items()}
    again, _ = run_part(2, llama, tmp_path)
    assert {name: entry["seconds"] for name, entry in again["steps"].items()} == seconds


def test_a_step_that_fails_is_told_and_the_others_go_on(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPES / "benchmark"))
    gpu = importlib.import_module("gpu")
    figures = json.dumps({"pairs": 3, "spread": 1.5, "ways": {}})
    codes = {
        "speed": "raise ValueError('no | pair')",
        "quality, slow": "import subprocess; subprocess.run(['sleep', '60'])",
        "rewards": f"open('good.json', 'w').write({figures!r})",
    }
    monkeypatch.chdir(tmp_path)
    paths = {"rewards": Path("good.json")}
    lanes = [[gpu.Step(name, ["-c", code], paths.get(name, Path("none.json")))] for name, code in codes.items()]
    lanes[1].append(gpu.Step("quality, later", ["-c", "open('later', 'w')"], Path("none.json")))
    record = {"device": "NVIDIA H100 80GB HBM3", "versions": {}, "steps": {}}
    gpu.run_lanes(lanes, tmp_path, gpu.time.time() + 3, lambda step, entry: record["steps"].update({step.name: entry}))
    assert record["steps"]["speed"]["error"] == "ValueError: no | pair"
    assert record["steps"]["quality, slow"]["error"].startswith("stopped at the time limit")
    assert record["steps"]["quality, slow"]["seconds"] < 20
    # What there was no time for is told too.
    assert record["steps"]["quality, later"]["error"].startswith("not begun within the time limit")
    assert not Path("later").exists()
    table = gpu.table(record)
    assert "| speed | **failed** | ValueError: no / pair |" in table
    assert "| rewards | pairs; standard deviation of the rewards in float32 | 3; 1.50 |" in table


def test_errors_are_those_of_the_script_and_not_of_its_launcher(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "benchmark"))
    error_line = importlib.import_module("gpu").error_line
    launcher = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\nssrm.py FAILED\n"
    assert error_line(f"[rank0]: RuntimeError: out of luck\nTraceback:\n{launcher}", 1) == "RuntimeError: out of luck"
    assert (
        error_line("ssrm.py: error: lower it.\nsubprocess.CalledProcessError: Command\n", 1)
        == "ssrm.py: error: lower it."
    )
    assert error_line("ValueError: earlier\n", -9) == "ended by signal 9"
    assert error_line("", 3) == "exit status 3"


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L400", None),
        ("CPU", None),
    ],
)
def test_the_peak_is_that_of_the_device_or_left_out(monkeypatch, device, peak):
    monkeypatch.syspath_prepend(str(RECIPES / "benchmark"))
    gpu = importlib.import_module("gpu")
    assert gpu.peak_of(device) == peak
    way = gpu.with_shares({"ways": {"scoring": {"flops": 98.95e12}}}, device)["ways"]["scoring"]
    assert way.get("share_of_peak") == (pytest.approx(98.95e12 / peak) if peak else None)
