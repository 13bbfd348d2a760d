"""Files of unknown origin run no code, and say nothing about files that are not theirs."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import preference_rows
from datasets import Dataset
from transformers import AutoTokenizer
from trl import TrlParser

import trl_ssrm
from faults.outcomes import refusal_of
from trl_ssrm import (
    Comparison,
    PairwiseJudge,
    SSRMConfig,
    SSRMRewardFunction,
    SSRMTrainer,
    evaluate,
    generate_completions,
    label_preferences,
    load_reward_model,
)
from trl_ssrm.rounds.run_directory import RunDirectory


PACKAGE = Path(trl_ssrm.__file__).parent


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_trap_springs(tmp_path):
    """So that the other tests can fail."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()
    torch.save(Trap(tmp_path / "again"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "again").exists()


# ---- Checkpoints ----


@pytest.fixture
def with_code(llama, policy, tmp_path):
    """A checkpoint that brings code of its own for its configuration, its model and its tokenizer."""

    def make(kind: str) -> tuple[str, Path]:
        directory, sprung = tmp_path / kind, tmp_path / "sprung"
        shutil.copytree(policy if kind == "policy" else llama, directory)
        code = f"import pathlib\npathlib.Path({str(sprung)!r}).touch()\n"
        (directory / "own.py").write_text(code + "class Own: ...\n")
        names = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForCausalLM")
        config = json.loads((directory / "config.json").read_text())
        # A type that transformers has no code for.
        config |= {"model_type": "own", "auto_map": dict.fromkeys(names, "own.Own")}
        (directory / "config.json").write_text(json.dumps(config))
        tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
        tokenizer |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        return str(directory), sprung

    return make


ROWS = Dataset.from_list(preference_rows(3))
PROMPTS = Dataset.from_dict({"prompt": ["a"]})


@pytest.mark.parametrize("kind", ["llama", "policy"])
@pytest.mark.parametrize(
    "use",
    [
        lambda model, out: load_reward_model(model),
        lambda model, out: SSRMRewardFunction(model),
        lambda model, out: PairwiseJudge(model),
        lambda model, out: evaluate(model, ROWS),
        lambda model, out: label_preferences(model, ROWS, out),
        lambda model, out: generate_completions(model, PROMPTS, out),
        lambda model, out: SSRMTrainer(
            model,
            SSRMConfig(out, report_to="none", bf16=False),
            train_dataset=ROWS,
            unlabeled_dataset=Dataset.from_list(preference_rows(3, seed=2)),
        ),
        lambda model, out: SSRMTrainer(
            model, SSRMConfig(out, report_to="none", bf16=False, preference_model="pairwise"), train_dataset=ROWS
        ),
    ],
    ids=["load", "reward", "judge", "evaluate", "label", "generate", "train", "pairwise"],
)
def test_code_of_a_checkpoint_is_not_run(with_code, tmp_path, monkeypatch, kind, use):
    # Nobody is asked either, who could say yes by mistake.
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asks whether to run the code"))
    directory, sprung = with_code(kind)
    with pytest.raises(ValueError, match="trust_remote_code"):
        use(directory, str(tmp_path / "out"))
    assert not sprung.exists()


def test_code_of_a_checkpoint_is_run_for_those_who_say_so(with_code):
    """So that the test above can fail."""
    directory, sprung = with_code("llama")
    with pytest.raises(Exception):  # noqa: B017 - what it is made to do is no model
        load_reward_model(directory, trust_remote_code=True)
    assert sprung.exists()


def test_pickled_weights_run_no_code(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"score.weight": Trap(tmp_path / "sprung")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(Exception):  # noqa: B017 - transformers says what it likes
        load_reward_model(str(tmp_path / "model"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "training_args.bin"]
)
def test_checkpoint_of_a_round_runs_no_code(llama, config, labeled, unlabeled, tmp_path, name):
    def trainer() -> SSRMTrainer:
        settings = config(num_rounds=0, save_strategy="steps", save_steps=2, num_train_epochs=1)
        return SSRMTrainer(llama, settings, train_dataset=labeled, unlabeled_dataset=unlabeled)

    first = trainer()
    # As after a kill: a run that is over has no checkpoints.
    first.run.prune_at_end = lambda needed: None
    first.train()
    directory = first.run.round_dir(0)
    for file in ("round.json", "trainer_state.json", "weights.safetensors"):
        (directory / file).unlink()
    # The last one has no step left to be trained, for which nobody reads the state of the generators.
    shutil.rmtree(first.run.last_checkpoint(0))
    checkpoint = Path(first.run.last_checkpoint(0))
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    torch.save(Trap(tmp_path / "sprung"), checkpoint / name)
    # Who can write the one file can write the checksums too.
    first.run.end_checkpoint(checkpoint)
    again = trainer()
    if name == "training_args.bin":
        # Nobody reads it.
        again.train(resume_from_checkpoint=True)
        assert len(again.round_history) == 1
    else:
        with pytest.raises(pickle.UnpicklingError):
            again.train(resume_from_checkpoint=True)
    assert not (tmp_path / "sprung").exists()


def test_package_itself_reads_no_pickles_and_runs_no_text():
    """What could run code, in the sources."""
    modules = {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle", "runpy"}
    calls = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "os.system", "yaml.load", "Environment"}
    settings = {("weights_only", False), ("trust_remote_code", True), ("allow_pickle", True)}
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import | ast.ImportFrom):
                own = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names = [name for name in (*own, *(each.name for each in node.names)) if name.split(".")[0] in modules]
            elif isinstance(node, ast.Call):
                names = [name for name in [ast.unparse(node.func)] if name in calls]
                names += [
                    each.arg
                    for each in node.keywords
                    if isinstance(each.value, ast.Constant) and (each.arg, each.value.value) in settings
                ]
            found += [(path.name, name) for name in names]
    # The report's own template, in which everything is escaped.
    assert found == [("report.py", "Environment")]


# ---- Templates ----


ESCAPES = [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch SPRUNG') }}",
    "{{ self._TemplateReference__context }}{{ lipsum.__globals__['os'].popen('touch SPRUNG').read() }}",
    "{% set x = messages.append(1) %}{{ labels.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_comparison_of_a_checkpoint_runs_no_code(policy, tmp_path, template):
    shutil.copytree(policy, tmp_path / "model")
    template = template.replace("SPRUNG", str(tmp_path / "sprung"))
    (tmp_path / "model" / "comparison.json").write_text(json.dumps({"template": template, "labels": ["a", "b"]}))
    try:
        judge = PairwiseJudge(str(tmp_path / "model"))
    except (ValueError, TypeError) as error:
        assert "can't be rendered" in refusal_of(error)
    else:
        text = judge.comparison.render([{"role": "user", "content": "p"}], "one", "other")
        assert "class" not in text and "root:" not in text and "module" not in text
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("template", ESCAPES)
def test_chat_template_of_a_checkpoint_runs_no_code(llama, tmp_path, template):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = template.replace("SPRUNG", str(tmp_path / "sprung"))
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": "p"}], tokenize=False)
    except Exception:
        text = ""
    assert "class" not in text and "root:" not in text
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "stored",
    [
        "[]",
        "{",
        "null",
        '{"template": 5}',
        '{"labels": "AB"}',
        '{"labels": ["a"]}',
        '{"max_length": "x"}',
        '{"other": 1}',
    ],
)
def test_damaged_comparison_is_refused(policy, tmp_path, stored):
    shutil.copytree(policy, tmp_path / "model")
    (tmp_path / "model" / "comparison.json").write_text(stored)
    with pytest.raises(ValueError, match="is not a comparison") as raised:
        Comparison.from_pretrained(str(tmp_path / "model"))
    refusal_of(raised.value)


# ---- Configurations ----


def test_configuration_in_yaml_runs_no_code(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"output_dir: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{tmp_path}/sprung]]\n"
    )
    parser = TrlParser((SSRMConfig,))
    with pytest.raises(Exception, match="could not determine a constructor"):
        parser.parse_args_and_config(["--config", str(path)])
    assert not (tmp_path / "sprung").exists()


# ---- Paths in files ----


def test_path_in_a_file_of_a_run_does_not_leave_the_directory(llama, config, labeled, unlabeled, held_out, tmp_path):
    def trainer() -> SSRMTrainer:
        settings = config(num_rounds=0, keep_best_round=True)
        return SSRMTrainer(
            llama, settings, train_dataset=labeled, unlabeled_dataset=unlabeled, calibration_dataset=held_out
        )

    trainer().train()
    run = RunDirectory(str(tmp_path / "run"))
    outside = tmp_path / "round_outside"
    outside.mkdir()
    shutil.copy(run.weights_path(0), outside / "weights.safetensors")
    facts = json.loads((run.round_dir(0) / "round.json").read_text())
    facts["facts"]["round"] = f"0/../../../{outside.name}"
    (run.round_dir(0) / "round.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="round.json") as raised:
        trainer().train(resume_from_checkpoint=True)
    refusal_of(raised.value)
    assert (outside / "weights.safetensors").exists()
