import importlib
import json
import math
import re
import sys

import pytest
import torch
from conftest import as_messages, preference_rows
from datasets import Dataset
from recipe_runs import RECIPES, run_as_script, run_recipe
from transformers import AutoModelForSequenceClassification

from trl_ssrm import SSRMConfig


pytestmark = [pytest.mark.slow, pytest.mark.any_trl]


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


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_frozen_layers_give_the_rewards_of_the_whole_model(monkeypatch, request, tokenizer, kind):
    monkeypatch.syspath_prepend(str(RECIPES / "benchmark"))
    path = request.getfixturevalue(kind)
    frozen = importlib.import_module("quality").FrozenLayers(path, 1, tokenizer.pad_token_id)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    batch = tokenizer(["one text", "and a longer one"], padding=True, padding_side="right", return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        expected = model(**batch).logits
        frozen.freeze(model)
        # The second time, from what was kept.
        for _ in range(2):
            assert torch.allclose(model(**batch).logits, expected, atol=1e-3)
    assert len(frozen.hidden_of) == 2


@pytest.mark.parametrize("num_frozen_layers", [0, 1])
def test_benchmark_of_quality_makes_its_table_and_its_plot(bert, tmp_path, num_frozen_layers):
    rows = [as_messages(row) for row in preference_rows(200, seed=5)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "pairs.parquet"))
    settings = {
        "tasks": [tmp_path / "pairs.parquet"],
        "config": RECIPES / "benchmark" / "quality.yaml",
        "model_name_or_path": bert,
        "output_dir": tmp_path / "run",
        "seeds": [0, 1],
        "label_fractions": [0.25],
        "max_pairs": 96,
        "max_prompt_tokens": 64,
        "steps": [2, 4],
        "all_labels_epochs": [3],
        "learning_rate": 3e-3,
        "num_frozen_layers": num_frozen_layers,
        "bf16": False,
        "eos_token": "<|eos|>",
    }
    first = run_recipe("benchmark/quality", **settings)
    table = first[first.index("| Arm") :].splitlines()
    names = ["labels", "labels, all steps", "paper", "default", "all labels"]
    assert [line.split(" | ")[0] for line in table[2:7]] == [f"| {name}" for name in names]
    # Against themselves the labels gain nothing.
    assert table[2].split(" | ")[3] == "0.000 ± 0.000"
    assert "Share of the gap closed over all tasks, 0.250 of the labels, default: " in first
    assert (tmp_path / "run" / "quality-0.250.png").read_bytes().startswith(b"\x89PNG")
    results = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    of_seed = {entry["arm"]: entry for entry in results if entry.get("seed") == 0}
    assert of_seed["all labels"]["log_loss"] < of_seed["labels"]["log_loss"] < math.log(2) + 0.05
    steps = {arm: entry["cost"]["steps"] for arm, entry in of_seed.items()}
    assert steps["labels, all steps"] == steps["default"] > steps["labels"]
    # The labels are read once by round 0; the default reads the pool too.
    assert of_seed["default"]["cost"]["trained"] > of_seed["labels"]["cost"]["trained"] > 0
    assert of_seed["default"]["cost"]["scored"] > 0 == of_seed["labels"]["cost"]["scored"]
    again = run_recipe("benchmark/quality", **settings)
    assert again[again.index("| Arm") :].splitlines() == table and "{'task'" not in again


def test_arm_of_the_paper_has_its_settings(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "benchmark"))
    paper, arm = SSRMConfig.paper(output_dir="unused", bf16=False), importlib.import_module("quality").ARMS["paper"]
    assert {name: getattr(paper, name) for name in arm} == arm


def test_result_that_was_cut_off_by_a_kill_is_measured_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPES / "benchmark"))
    kept = importlib.import_module("quality").Results
    path = tmp_path / "results.jsonl"
    kept(path).keep({"seed": 0})
    with path.open("a") as file:
        file.write('{"seed": 1, "log')
    results = kept(path)
    assert results.entries == [{"seed": 0}]
    results.keep({"seed": 1})
    assert kept(path).entries == [{"seed": 0}, {"seed": 1}]


def test_tasks_that_come_with_python_choose_each_text_once(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "benchmark"))
    load_task = importlib.import_module("tasks").load_task
    for name in ("documentation", "parameters"):
        groups = load_task(name)
        chosen = [row["chosen"] for rows in groups.values() for row in rows]
        assert len(chosen) == len(set(chosen)) > 1_000
        assert all(row["rejected"] != row["chosen"] for rows in groups.values() for row in rows)
    row = next(row for row in groups["DataFrame.dropna"] if " thresh " in row["prompt"])
    assert "non-NA values" in row["chosen"]


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
