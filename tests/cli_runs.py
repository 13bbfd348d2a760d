"""Settings, data and runs that the tests of the command share."""

from pathlib import Path

from conftest import preference_rows
from datasets import Dataset

from trl_ssrm.cli.train import make_parser, train


# TRL turns bf16 and checkpointing on, which a CPU may not have, or which is slow on it.
SETTINGS = {
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "num_train_epochs": 1,
    "num_rounds": 1,
    "confidence_threshold": 0.5,
    "num_folds": 0,
    "round_init": "continue",
    "pseudo_label_type": "hard",
    "learning_rate": 3e-3,
}


def flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def write_data(directory: Path) -> Path:
    """The directory, with a file of each kind."""
    pool = [
        {"prompt": row["prompt"], "completion_a": row["chosen"], "completion_b": row["rejected"]}
        for row in preference_rows(40, seed=2)
    ]
    Dataset.from_list(preference_rows(16, seed=1)).to_csv(directory / "labels.csv")
    Dataset.from_list(pool).to_csv(directory / "pool.csv")
    Dataset.from_list(preference_rows(20, seed=3)).to_json(directory / "test.jsonl")
    Dataset.from_list(preference_rows(10, seed=4)).to_parquet(directory / "calibration.parquet")
    return directory


def settings_of_run(model: str, data: Path, output_dir: Path) -> dict:
    """Settings of `trl-ssrm train` with a file for each dataset."""
    return {
        "model_name_or_path": model,
        "dataset_name": data / "labels.csv",
        "unlabeled_dataset_name": data / "pool.csv",
        "eval_dataset_name": data / "test.jsonl",
        "output_dir": output_dir,
        **SETTINGS,
    }


def finish_run(model: str, data: Path, output_dir: Path) -> dict:
    """Settings of a finished run: 8 labels, 3 rows to calibrate, and a pool of the 5 other rows of the same file."""
    settings = {
        "model_name_or_path": model,
        "dataset_name": data / "labels.csv",
        "num_labeled": 8,
        "num_calibration": 3,
        "padding_token": "<|pad|>",
        "output_dir": output_dir,
        "disable_tqdm": True,
        **SETTINGS,
    }
    parsed, rest = make_parser().parse(flags(settings))
    assert not rest
    train(*parsed)
    return settings


def error_line(capsys) -> str:
    """The one line of the command on the standard error, without what libraries log."""
    lines = [line for line in capsys.readouterr().err.replace("\r", "").splitlines() if line.startswith("trl-ssrm")]
    (line,) = lines
    return line
