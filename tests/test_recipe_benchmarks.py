import json
import math
import re
import sys

import pytest
from conftest import as_messages, preference_rows
from datasets import Dataset
from recipe_runs import RECIPES, run_as_script, run_recipe


pytestmark = pytest.mark.slow


def test_benchmark_makes_its_table_and_does_not_measure_twice(llama, tmp_path):
    rows = [as_messages(row) for row in preference_rows(64, seed=5)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "pairs.parquet"))
    settings = {
        "dataset_path": tmp_path / "pairs.parquet",
        "model_name_or_path": llama,
        "output_dir": tmp_path / "run",
        "num_seeds": 2,
        "label_fraction": 0.25,
        "num_train_epochs": 1,
        "num_rounds": 1,
        "confidence_threshold": 0.5,
        "learning_rate": 3e-3,
        "num_frozen_layers": 1,
        "eos_token": "<|eos|>",
    }
    first = run_recipe("benchmark/few_labels", **settings)
    lines = [line.split(" | ")[0] for line in first[first.index("| Trained on") :].splitlines()]
    assert lines[2:5] == ["| labeled only", "| SSRM, round 1", "| all labels"]
    assert " ± " in first
    again = run_recipe("benchmark/few_labels", **settings)
    assert first[first.index("| Trained on") :] == again[again.index("| Trained on") :]
    assert "seed 0, ssrm" in first and "seed 0, ssrm" not in again


def test_benchmark_of_quality_makes_its_table_and_its_plot(bert, tmp_path):
    rows = [as_messages(row) for row in preference_rows(96, seed=5)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "pairs.parquet"))
    settings = {
        "dataset_paths": [tmp_path / "pairs.parquet"],
        "model_name_or_path": bert,
        "output_dir": tmp_path / "run",
        "num_seeds": 2,
        "label_fractions": [0.25],
        "arms": ["paper", "calibrated", "paper, true labels", "default"],
        "steps": [2, 4],
        "num_rounds": 1,
        "eos_token": "<|eos|>",
    }
    first = run_recipe("benchmark/quality", **settings)
    table = first[first.index("| Arm") :].splitlines()
    names = ["labels", "labels, all steps", "paper", "calibrated", "paper, true labels", "default", "all labels"]
    assert [line.split(" | ")[0] for line in table[2:9]] == [f"| {name}" for name in names]
    # Against themselves the labels gain nothing, and all labels close the whole gap, if there is one.
    assert table[2].split(" | ")[2:4] in (["0.000 ± 0.000", "0.00"], ["0.000 ± 0.000", "–"])
    assert table[8].split(" | ")[3] in ("1.00", "–")
    assert (tmp_path / "run" / "quality-0.250.png").read_bytes().startswith(b"\x89PNG")
    again = run_recipe("benchmark/quality", **settings)
    assert again[again.index("| Arm") :].splitlines() == table and "{'dataset'" not in again


def test_benchmark_of_quality_trains_the_whole_model(bert, tmp_path):
    rows = [as_messages(row) for row in preference_rows(200, seed=5)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "pairs.parquet"))
    settings = {
        "dataset_paths": [tmp_path / "pairs.parquet"],
        "config": RECIPES / "benchmark" / "quality_whole.yaml",
        "model_name_or_path": bert,
        "output_dir": tmp_path / "run",
        "num_seeds": 1,
        "max_prompts": 96,
        "label_fractions": [0.25],
        "arms": ["paper"],
        "steps": [4],
        "learning_rate": 3e-3,
        "num_rounds": 1,
        "eos_token": "<|eos|>",
    }
    output = run_recipe("benchmark/quality", **settings)
    assert "| paper |" in output
    results = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [entry["arm"] for entry in results] == ["labels", "labels, all steps", "paper", "all labels"]
    # A head alone, on the features of a model with random weights, would not learn these texts.
    losses = {entry["arm"]: entry["metrics"]["test"]["log_loss"] for entry in results}
    assert losses["all labels"] < losses["labels"] < math.log(2)
    assert not list((tmp_path / "run").glob("features-*"))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells the kinds of memory.")
def test_benchmark_of_memory_tells_each_stage_and_leaves_nothing(tmp_path):
    command = [str(RECIPES / "benchmark" / "memory.py"), "--num_pairs", "60", "--max_steps", "1"]
    output = run_as_script(*command, "--num_completions", "3", "--work_dir", str(tmp_path))
    memory = {name: float(value) for name, value in re.findall(r"^\| ([a-z 01]+) \| (\d+) \|$", output, re.M)[:10]}
    assert list(memory)[0] == "start" and list(memory)[-2:] == ["rest", "whole run"]
    assert min(memory.values()) > 100 and max(memory.values()) == memory["whole run"]
    assert 0 < int(re.search(r"Pairs kept: (\d+)", output)[1]) <= 60
    assert list(tmp_path.iterdir()) == []


def test_benchmark_of_speed_measures_each_way_and_the_training(llama, tmp_path):
    rows = [as_messages(row) for row in preference_rows(12, seed=5)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "pairs.parquet"))
    command = [str(RECIPES / "benchmark" / "speed.py"), "--dataset_path", str(tmp_path / "pairs.parquet")]
    command += ["--models", "decoder", "--model_name_or_path", llama]
    command += ["--pools", "pairs", "--num_pairs", "6", "--num_train_pairs", "4"]
    output = run_as_script(*command, "--num_repeats", "1", "--output_file", str(tmp_path / "figures.jsonl"))
    assert re.search(r"SSRMTrainer [\d.]+ s, [\d.]+ times as fast", output)
    (record,) = map(json.loads, (tmp_path / "figures.jsonl").read_text().splitlines())
    assert (record["model"], record["pool"], record["scoring"]["pairs"]) == ("decoder", "pairs", 6)
    assert record["scoring"]["difference"] < 1e-3
    ways = ("ours", "one at a time", "predict", "pipeline", "floor")
    assert min(record["scoring"][way] for way in ways) > 0 and min(record["training"].values()) > 0
