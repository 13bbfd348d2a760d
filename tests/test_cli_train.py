import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import error_line, finish_run, flags, settings_of_run, write_data
from conftest import preference_rows
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

import trl_ssrm.cli.train
from trl_ssrm import SSRMRewardFunction
from trl_ssrm.cli.main import main
from trl_ssrm.cli.train import TrainArguments, _main, _status, load_pairs, train
from trl_ssrm.cli.train import make_parser as make_train_parser
from trl_ssrm.io.sources import load_data


pytestmark = pytest.mark.slow


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_settings(data, llama, tmp_path) -> dict:
    return settings_of_run(llama, data, tmp_path / "run")


def start(*argv: str, **kwargs) -> subprocess.Popen:
    """The command in a process of its own, at the head of a process group."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "trl_ssrm.cli.main", *argv]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


# ---- Data and model ----


def test_rows_are_split_without_overlap(data):
    arguments = TrainArguments(dataset_name=str(data / "labels.csv"), num_labeled=5, num_calibration=3)
    parts = load_pairs(arguments, seed=0)
    assert {name: len(rows) for name, rows in parts.items()} == {
        "train_dataset": 5,
        "unlabeled_dataset": 8,
        "calibration_dataset": 3,
    }
    prompts = [prompt for rows in parts.values() for prompt in rows["prompt"]]
    assert sorted(prompts) == sorted(row["prompt"] for row in preference_rows(16, seed=1))
    assert load_pairs(arguments, seed=1)["train_dataset"]["prompt"] != parts["train_dataset"]["prompt"]


def test_rows_of_one_prompt_stay_together(tmp_path, caplog):
    rows = [{**row, "prompt": f"p{number // 4}"} for number, row in enumerate(preference_rows(16, seed=1))]
    Dataset.from_list(rows).to_csv(str(tmp_path / "labels.csv"))
    parts = load_pairs(
        TrainArguments(dataset_name=str(tmp_path / "labels.csv"), num_labeled=5, num_calibration=3), seed=0
    )
    assert {name: len(part) for name, part in parts.items()} == {
        "train_dataset": 8,
        "calibration_dataset": 4,
        "unlabeled_dataset": 4,
    }
    assert "8 in `train_dataset`, 4 in `calibration_dataset`" in caplog.text
    assert len({prompt for part in parts.values() for prompt in set(part["prompt"])}) == 4
    with pytest.raises(ValueError, match="for `num_calibration` are all that .*labels.csv has; lower it"):
        load_pairs(TrainArguments(dataset_name=str(tmp_path / "labels.csv"), num_calibration=13), seed=0)


def test_each_dataset_is_read_from_its_own_file(data):
    names = ("labels.csv", "pool.csv", "test.jsonl", "calibration.parquet")
    kinds = ("dataset_name", "unlabeled_dataset_name", "eval_dataset_name", "calibration_dataset_name")
    arguments = {kind: str(data / name) for kind, name in zip(kinds, names, strict=True)}
    sizes = {name: len(rows) for name, rows in load_pairs(TrainArguments(**arguments), seed=0).items()}
    assert sizes == {"train_dataset": 16, "unlabeled_dataset": 40, "eval_dataset": 20, "calibration_dataset": 10}


def test_configuration_and_splits_are_those_that_were_asked_for(monkeypatch):
    sizes = {"train": 4, "test": 5, "few": 6, "dev": 7}

    def load_splits(name: str, config: str | None) -> dict[str, Dataset]:
        assert (name, config) == ("org/pairs", "easy")
        return {split: Dataset.from_list(preference_rows(size)) for split, size in sizes.items()}

    monkeypatch.setattr(trl_ssrm.cli.train, "load_splits", load_splits)
    given = TrainArguments(dataset_name="org/pairs", dataset_config="easy", num_labeled=2)
    loaded = load_pairs(given, seed=0)
    assert (len(loaded["unlabeled_dataset"]), len(loaded["eval_dataset"])) == (2, 5)
    given.dataset_train_split, given.dataset_test_split = "few", "dev"
    loaded = load_pairs(given, seed=0)
    assert (len(loaded["unlabeled_dataset"]), len(loaded["eval_dataset"])) == (4, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"unlabeled_dataset_name": None},
            "All 16 rows of .*labels.csv are used with their labels, so none is left for the pool",
        ),
        ({"num_labeled": 17}, "`num_labeled` is 17 and `num_calibration` 0, but .*labels.csv has 16 rows"),
        ({"num_calibration": 16}, "has 16 rows; lower these numbers so that at least one labeled row"),
        ({"num_calibration": 2, "calibration_dataset_name": "x.csv"}, "both calibrate; pass one of them"),
        ({"dataset_name": "none.csv"}, "There is no file or folder none.csv"),
        ({"dataset_name": "{data}", "dataset_train_split": "dev"}, "has no split 'dev'; it has"),
        ({"padding_token": "<nix>"}, "`padding_token` '<nix>' is not in the vocabulary"),
        ({"dataset_name": "{data}/pool.csv"}, "`train_dataset` .*`chosen`"),
        ({"model_name_or_path": "{data}"}, ""),
        ({"model_name_or_path": "./none"}, "none"),
        ({"teacher_model_name_or_path": "./no_teacher"}, "no_teacher"),
    ],
)
def test_data_and_model_that_can_not_be_used(settings, message, run_settings, data, capsys):
    settings = {**run_settings, **settings}
    settings = {name: str(value).format(data=data) for name, value in settings.items() if value is not None}
    assert main(["train", "--dry_run", *flags(settings)]) == 2
    assert re.search(f"^trl-ssrm train: error: .*{message}", error_line(capsys))


def test_process_that_trains_tells_its_error_in_one_line(run_settings, capsys, monkeypatch):
    argv = flags({**run_settings, "dataset_name": "none.csv"})
    monkeypatch.setattr(sys, "argv", ["train", *argv])
    assert _main() == 2
    assert error_line(capsys).startswith("trl-ssrm train: error: There is no file or folder none.csv")
    monkeypatch.setattr(sys, "argv", ["train", *argv, "--debug"])
    with pytest.raises(ValueError, match=r"none\.csv"):
        _main()


# ---- Training ----


def test_one_process_trains_without_a_launcher(run_settings, capsys):
    assert main(["train", *flags({**run_settings, "disable_tqdm": True})]) == 0
    # Only what this process prints is captured.
    printed = capsys.readouterr().out
    assert printed.endswith(f"Model: {run_settings['output_dir']}, saved with the temperature 1.000\n")
    # Three lines a round.
    lines = [line for line in printed.splitlines() if line.startswith(("Round 0: ", "For round 1: kept"))]
    assert len(lines) == 3 and lines[0] == "Round 0: training on 16 labeled pairs" and lines[2].startswith("For")
    AutoModelForSequenceClassification.from_pretrained(run_settings["output_dir"], num_labels=1)


def test_teacher_labels_the_pool(llama, bert, run_settings, data, tmp_path):
    teacher = str(finish_run(llama, data, tmp_path / "teacher")["output_dir"])
    settings = {**run_settings, "model_name_or_path": bert, "eos_token": "<|eos|>"}
    assert main(["train", *flags({**settings, "teacher_model_name_or_path": teacher})]) == 0
    rewards, pool = SSRMRewardFunction(teacher), load_data(str(data / "pool.csv"))
    pairs = [(row["prompt"], row["completion_a"], row["completion_b"]) for row in pool]
    preferred = {max((a, b), key=lambda answer: rewards([prompt], [answer])[0]) for prompt, a, b in pairs}
    kept = Dataset.from_parquet(str(tmp_path / "run" / "_rounds" / "round_1" / "pseudo_labels.parquet"))
    assert len(kept) == len(pool) and set(kept["chosen"]) == preferred
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"({data / 'pool.csv'}), which {teacher} has labeled." in card


@pytest.mark.any_trl
@pytest.mark.parametrize("launcher", [[], ["--num_processes", "1"]])
def test_interrupted_training_is_resumed(launcher, run_settings, data, tmp_path, capsys):
    settings = {**run_settings, "calibration_dataset_name": data / "calibration.parquet"}
    settings |= {"disable_tqdm": True, "round_num_train_epochs": 200}
    (tmp_path / "train.yaml").write_text(json.dumps({name: str(value) for name, value in settings.items()}))
    arguments = ["--config", str(tmp_path / "train.yaml"), "--seed", "3"]
    process = start("train", *arguments, *launcher)
    # Round 0 is over, and the pool is labeled for the next one.
    assert any(" pairs of the pool" in line for line in process.stdout), process.communicate()[1][-3000:]
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors[-3000:]
    line = "trl-ssrm train: interrupted. Run the same command again to resume."
    # A bar that is interrupted while it is made may add a line of its own at the exit of Python.
    assert line in errors.replace("\r", "").splitlines() and "KeyboardInterrupt" not in errors
    # The same command, without the seconds that a new process takes.
    parsed, _ = make_train_parser().parse(arguments)
    train(*parsed)
    printed = capsys.readouterr().out
    assert f"Resuming the run in {tmp_path / 'run'} after round 0." in printed and "Round 1: accuracy" in printed
    assert f"Model: {tmp_path / 'run'}, saved with the temperature " in printed
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1)


@pytest.mark.any_trl
def test_several_processes_tell_an_error_once(run_settings):
    settings = {
        **run_settings,
        "dataset_name": "none.csv",
        "num_processes": 2,
        "num_machines": 1,
        "main_process_port": 0,
    }
    process = start("train", "--multi_gpu", *flags(settings))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors[-3000:]
    told = [line for line in errors.replace("\r", "").splitlines() if "none.csv" in line or "error" in line.lower()]
    assert told == ["trl-ssrm train: error: There is no file or folder none.csv; check the path."], errors
    assert "Traceback" not in errors


def test_end_of_a_launched_process_is_an_exit_status_or_an_exception():
    assert _status(1) == 2
    for code in (130, -signal.SIGINT):
        with pytest.raises(KeyboardInterrupt):
            _status(code)
    with pytest.raises(
        ValueError, match=r"ended by SIGKILL \(the machine may be out of memory\); run the same command"
    ):
        _status(-signal.SIGKILL)
    with pytest.raises(ValueError, match="ended by SIGTERM; run the same command again to resume"):
        _status(-signal.SIGTERM)
