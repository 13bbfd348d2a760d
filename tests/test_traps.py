"""Data that would be taken to mean something else: a file for each way, and what is said of it."""

import json
import logging

import pytest
from cli_runs import flags, settings_of_run, write_data
from conftest import as_messages, preference_rows
from datasets import Dataset
from pages import GUIDES

from trl_ssrm.cli.main import main


LABELS = preference_rows(12, seed=1)
PROMPTS = [row["prompt"] for row in LABELS]
# What is written to which file, and what is said.
TRAPS = {
    "question": (
        {
            "labels.csv": [
                {"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in LABELS
            ]
        },
        "rename the column that holds them (question) to `prompt`",
    ),
    "conversations": (
        {"labels.csv": [{name: json.dumps(value) for name, value in as_messages(row).items()} for row in LABELS]},
        "is a conversation that was written as text",
    ),
    "leaked pairs": (
        {"test.jsonl": [*LABELS[:2], *preference_rows(4, seed=3)]},
        "shares 2 of its 6 pairs with `train_dataset`, so its metrics are too good",
    ),
    "leaked prompts": (
        {"test.jsonl": [*({**row, "chosen": "other text"} for row in LABELS[:2]), *preference_rows(4, seed=3)]},
        "2 of the 6 prompts of `eval_dataset` are also in `train_dataset`",
    ),
    "equal completions": (
        {"labels.csv": [*LABELS, {**LABELS[0], "rejected": LABELS[0]["chosen"]}]},
        "Left out of `train_dataset`: 1 (identical completions)",
    ),
    "opposite labels": (
        {"labels.csv": [*LABELS, {**LABELS[0], "chosen": LABELS[0]["rejected"], "rejected": LABELS[0]["chosen"]}]},
        "1 pairs are in `train_dataset` twice, with opposite labels",
    ),
    "winner": (
        {"labels.csv": [{"prompt": prompt, "answer_a": "x", "answer_b": "y", "winner": 1} for prompt in PROMPTS]},
        "which may be the first or the second completion",
    ),
    "semicolons": (
        {"labels.csv": "prompt;chosen;rejected\na;b;c\n"},
        "its columns are separated by semicolons, where its name says commas",
    ),
    "column": (
        {
            "labels.csv": [
                {"prompt": row["prompt"], "chosen": row["chosen"], "rejectd": row["rejected"]} for row in LABELS
            ]
        },
        "Did you mean",
    ),
    "file": ({"lables.csv": LABELS, "labels.csv": None}, "Did you mean"),
    "thresholds": ({}, "both choose the threshold; set one of them"),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_trap_is_named(trap, llama, tmp_path, capsys, caplog):
    files, said = TRAPS[trap]
    data = write_data(tmp_path)
    for name, rows in files.items():
        path = data / name
        path.unlink(missing_ok=True)
        if isinstance(rows, str):
            path.write_text(rows)
        elif rows is not None:
            dataset = Dataset.from_list(list(rows))
            dataset.to_csv(path) if path.suffix == ".csv" else dataset.to_json(path)
    settings = settings_of_run(llama, data, tmp_path / "run")
    if trap == "thresholds":
        settings["target_precision"] = 0.9
    with caplog.at_level(logging.WARNING):
        main(["train", "--dry_run", *flags(settings)])
    assert said in capsys.readouterr().err + caplog.text
    # The page says the same.
    assert f'"{said}' in (GUIDES / "troubleshooting.md").read_text(encoding="utf-8")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_files_of_the_other_traps_are_read_without_a_word(llama, tmp_path, capsys, caplog):
    settings = settings_of_run(llama, write_data(tmp_path), tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        assert main(["train", "--dry_run", *flags(settings)]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert not any(said in caplog.text for _, said in TRAPS.values())
