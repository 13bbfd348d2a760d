"""The documentation is run: each block of code and each command."""

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import trl
from accelerate.commands.launch import launch_command_parser
from conftest import as_messages, llama_config, preference_rows
from datasets import Dataset
from packaging.version import Version
from pages import GUIDES, PAGES, README, RECIPES, ROOT, TUTORIAL, blocks, commands
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification, set_seed
from trl import TrlParser

from trl_ssrm import PairwiseJudge, SSRMTrainer
from trl_ssrm.cli.main import main
from trl_ssrm.cli.quickstart import make_parser as make_quickstart_parser
from trl_ssrm.cli.train import make_parser as make_train_parser
from trl_ssrm.cli.train import train


pytestmark = pytest.mark.slow


HAS_PPO = Version(trl.__version__) < Version("1.13")

# What a machine without a GPU needs, and what keeps a run short.
CPU = {"bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}
SHORT = {
    **CPU,
    "num_folds": 2,
    "confidence_threshold": 0.5,
    "learning_rate": 3e-3,
    "logging_steps": 50,
    "disable_tqdm": True,
}

# Replaces names that would be downloaded, and sizes that take hours; nothing else of a block is changed.
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-3B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
DATASETS = ("trl-lib/ultrafeedback_binarized", "trl-lib/ultrafeedback-prompt", "allenai/reward-bench")
IN_PYTHON = [
    ("32_000", "40"),
    ("2_000", "16"),
    ("SSRMConfig(", "made(SSRMConfig, SHORT, "),
    # Folds as by default: a teacher switches them off.
    ('pseudo_label_type="soft"', 'pseudo_label_type="soft", num_folds=None'),
    ("RewardConfig(", "made(RewardConfig, CPU, "),
    ("PPOConfig(", "PPOConfig(**CPU, "),
    ("GRPOTrainer(", "GRPOTrainer(args=trl.GRPOConfig('grpo', **CPU), "),
    ("RLOOTrainer(", "RLOOTrainer(args=trl.RLOOConfig('rloo', **CPU), "),
    ("DPOTrainer(", "DPOTrainer(args=trl.DPOConfig('dpo', **CPU), "),
    ("num_completions=4", "num_completions=4, max_new_tokens=8"),
    ("num_pairs=100", "num_pairs=4"),
    ("labels = load_labels(", "as_a_person('to_label.jsonl')\nlabels = load_labels("),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, tokenizer, bert) -> dict[str, str]:
    """Where a name of the hub is, on this machine."""
    root = tmp_path_factory.mktemp("hub")
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = llama_config(tokenizer, **sizes, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    found = {**dict.fromkeys(MODELS, str(root / "model")), "sentence-transformers/all-MiniLM-L6-v2": bert}
    prompts = [{"prompt": row["prompt"]} for row in map(as_messages, preference_rows(6, seed=7))]
    bench = [{**row, "subset": "donotanswer"} for row in preference_rows(4, seed=8)]
    for name, split, rows in (
        (DATASETS[0], "train", [as_messages(row) for row in preference_rows(40, seed=6)]),
        (DATASETS[1], "train", prompts),
        (DATASETS[2], "filtered", bench),
    ):
        folder = root / name / "data"
        folder.mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
        found[name] = str(root / name)
    return found


def with_places(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, llama) -> str:
    """Directory of a reward model that is sure of itself, as a trained one is."""
    directory = tmp_path_factory.mktemp("reward_model")
    model = LlamaForSequenceClassification.from_pretrained(llama)
    model.score.weight.data *= 100
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(llama).save_pretrained(directory)
    return str(directory)


def save_models(reward_model: str, *names: str) -> None:
    """Reward models that a page takes for granted."""
    for name in names:
        shutil.copytree(reward_model, name)


# ---- Python ----


def as_a_person(path: str) -> None:
    """Write labels into the file of `export_for_labeling`."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4 and all('"label": null' in line for line in lines)
    Path(path).write_text("\n".join(line.replace('"label": null', '"label": "a"') for line in lines))


def made(kind: type, settings: dict, **of_the_page):
    """A configuration with settings for a short run, of which the page has the last word."""
    return kind(**{**settings, **of_the_page})


def run(block: str, names: dict, places: dict[str, str], where: str) -> None:
    block = with_places(block, places)
    for old, new in IN_PYTHON:
        block = block.replace(old, new)
    exec(compile(block, where, "exec"), names)


@pytest.fixture
def names(tokenizer, tmp_path, monkeypatch) -> dict:
    """Names that the pages take for granted: data of the reader, and what this test puts in."""
    monkeypatch.chdir(tmp_path)
    labeled, unlabeled = (Dataset.from_list([*map(as_messages, preference_rows(n, seed=n))]) for n in (10, 12))
    tokens = Dataset.from_list([{"input_ids": tokenizer("Say it: ")["input_ids"]}] * 4)
    completions = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in labeled]
    return {
        "labeled": labeled,
        "unlabeled": unlabeled,
        "tokenized": tokens,
        "tokenized_held_out": tokens,
        "prompts": labeled.select_columns("prompt"),
        "completions": Dataset.from_list(completions),
        **{"trl": trl, "CPU": CPU, "SHORT": SHORT, "made": made, "as_a_person": as_a_person},
    }


def test_swap_runs_before_and_after(names, places):
    (swap,) = blocks(README, "diff")
    before = "\n".join(line[1:] for line in swap.splitlines() if not line.startswith("+"))
    after = "\n".join(line[1:] for line in swap.splitlines() if not line.startswith("-"))
    run(before, dict(names), places, "before the swap")
    run(after, names, places, "after the swap")
    assert isinstance(names["trainer"], SSRMTrainer) and len(names["trainer"].round_history) > 1
    assert Path("reward-model", "model.safetensors").is_file()


# What has to be there after the blocks of a page.
OUTCOMES: dict[str, Callable[[dict], bool]] = {
    "settings": lambda names: len(names["labels"]) == 4 and names["trainer"].round_history[0]["round"] == 0,
    "pairwise": lambda names: (
        Path("preference-model", "comparison.json").is_file()
        and names["args"].comparison == "my-comparison"
        and len(names["preferences"]) > 0
        and names["trainer"].args.output_dir == "taught-model"
    ),
    "serving": lambda names: (
        isinstance(names["reward"], float)
        and names["probability"]
        == pytest.approx(
            PairwiseJudge("preference-model").judge(["Say hello."], [("Hello!", "Go away!")])[0], abs=1e-5
        )
    ),
    "run_files": lambda names: all(
        Path("reward-model", f"model_of_round_{n}", "model.safetensors").is_file() for n in (0, 1)
    ),
    "evaluation": lambda names: Path("reward-model-v4", "config.json").is_file(),
    "alignment": lambda names: (
        {"completion", "reward"} <= set(names["best"].column_names)
        and names["trainer"].__class__.__name__ == ("PPOTrainer" if HAS_PPO else "DPOTrainer")
    ),
}


def test_every_page_with_python_is_run():
    assert {page.stem for page in PAGES if blocks(page, "python")} == {TUTORIAL.stem, *OUTCOMES}


@pytest.mark.parametrize("page", OUTCOMES)
def test_python_runs_from_top_to_bottom(page, names, places, reward_model, trained_judge):
    save_models(reward_model, "reward-model", "other-reward-model")
    if page == "serving":
        save_models(trained_judge, "preference-model")
    for number, block in enumerate(blocks(GUIDES / f"{page}.md", "python")):
        if "trl.experimental.ppo" in block and not HAS_PPO:
            with pytest.raises(ImportError):
                run(block, names, places, f"block {number} of {page}")
        else:
            run(block, names, places, f"block {number} of {page}")
    assert OUTCOMES[page](names)


def test_python_of_the_tutorial_makes_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(TUTORIAL, "python")
    exec(compile(block, "tutorial", "exec"), {})
    columns = {path.stem: path.read_text(encoding="utf-8").splitlines()[0] for path in tmp_path.glob("*.csv")}
    table = re.findall(r"^\| `(\w+)\.csv` \| `([\w,]+)` \|", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(table) == 3 and columns == dict(table)


def test_no_substitution_is_without_use():
    python = "\n".join(block for page in PAGES for language in ("python", "diff") for block in blocks(page, language))
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [old for old, _ in IN_PYTHON if old not in python]
    assert not [name for name in (*MODELS, *DATASETS) if name not in texts]
    # Each language is one that is run, or a picture.
    languages = {name for page in PAGES for name in re.findall(r"^```(\w*)$", page.read_text("utf-8"), re.MULTILINE)}
    assert languages == {"", "bash", "diff", "python"}


# ---- Shell ----

# Not ours, and not installed here.
ELSEWHERE = {"rewardbench", "source", "pip-audit"}
# What keeps a run short, behind what the page says; flags of the page that have to stay are not among them.
AT_THE_END = {"num_train_epochs": 1, "num_folds": 0, "confidence_threshold": 0.5, "disable_tqdm": True}


class Shell:
    """Runs commands as a shell would, the parts that take hours cut short; each program by its own parser."""

    def __init__(self, places: dict[str, str], add_to_path: Callable[[str], None]):
        self.places = places
        self.add_to_path = add_to_path
        self.ran: list[str] = []

    def __call__(self, line: str) -> None:
        words = shlex.split(with_places(line, self.places), comments=True)
        # What stands before a program is for its environment.
        words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
        if words and words[0] not in ELSEWHERE:
            self.ran.append(words[0])
            getattr(self, words[0].replace("-", "_"))(words[1:])

    def trl_ssrm(self, words: list[str]) -> None:
        command = words[0]
        if command == "quickstart":
            # A test of its own trains it.
            assert make_quickstart_parser().parse(["--bf16", "false", *words[1:]])[1] == []
        elif command == "train" and "--dry_run" not in words:
            settings = {**CPU, **AT_THE_END}
            added = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
            parsed, rest = make_train_parser().parse([*words[1:], *added])
            assert not rest
            train(*parsed)
        else:
            assert main([*words, *(["--bf16", "false"] if command == "train" else [])]) == 0

    def trl(self, words: list[str]) -> None:
        script = importlib.import_module(f"trl.scripts.{words[0]}")
        added = [
            "--bf16",
            "false",
            "--gradient_checkpointing",
            "false",
            "--report_to",
            "none",
            "--save_strategy",
            "no",
        ]
        parsed = script.make_parser().parse_args_and_config([*words[1:], *added], fail_with_unknown_args=True)
        if words[0] == "dpo":
            script.main(*parsed)
            assert Path(parsed[1].output_dir, "model.safetensors").is_file()

    def python(self, words: list[str]) -> None:
        if words[0] == "-m":
            source = (ROOT / words[1].replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
            assert {word for word in words if word.startswith("--")} <= set(
                re.findall(r'add_argument\(\s*"(--\w+)"', source)
            )
            return
        path = ROOT / words[0]
        # As Python does it for a script.
        self.add_to_path(str(path.parent))
        if path.stem == "ppo" and not HAS_PPO:
            with pytest.raises(SystemExit):
                runpy.run_path(str(path))
            return
        source, recipe = path.read_text(encoding="utf-8"), runpy.run_path(str(path))
        (types,) = re.findall(r"TrlParser\((\([^()]+\)|\w+)\)", source)
        added = ["--bf16", "false"] if "training_args" in source else []
        TrlParser(eval(types, recipe)).parse_args_and_config([*words[1:], *added])

    def python3(self, words: list[str]) -> None:
        assert words[:2] == ["-m", "venv"]

    def accelerate(self, words: list[str]) -> None:
        assert words[0] == "launch"
        launched = launch_command_parser().parse_args(words[1:])
        assert (ROOT / launched.config_file).is_file()
        self.python([launched.training_script, *launched.training_script_args])

    def make(self, words: list[str]) -> None:
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

    def pip(self, words: list[str]) -> None:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        named = {name for word in words for names in re.findall(r"\[(.+)\]", word) for name in names.split(",")}
        assert words[0] == "install" and named <= extras.keys()

    def pytest(self, words: list[str]) -> None:
        files = [ROOT / word for word in words if word.endswith(".py")]
        assert files and all(file.is_file() for file in files)
        if "-k" in words:
            (file,), part = files, words[words.index("-k") + 1]
            assert re.search(rf"^def test_\w*{part}", file.read_text(encoding="utf-8"), re.MULTILINE)

    def mkdir(self, words: list[str]) -> None:
        Path(words[0]).mkdir()

    def cp(self, words: list[str]) -> None:
        shutil.copyfile(*words)

    def sbatch(self, words: list[str]) -> None:
        assert (ROOT / words[0]).is_file()

    def bash(self, words: list[str]) -> None:
        subprocess.run(["bash", "-n", str(ROOT / words[0])], check=True)


@pytest.fixture
def shell(places, reward_model, tmp_path, monkeypatch) -> Shell:
    """A shell in a directory with the files of the pages, which are small here."""
    monkeypatch.chdir(tmp_path)
    save_models(reward_model, "other-reward-model")
    pool = Dataset.from_list(preference_rows(24, seed=2))
    pool = pool.rename_columns({"chosen": "completion_a", "rejected": "completion_b"})
    pool.to_csv("pool.csv")
    pool.to_json("completions.jsonl")
    for name, seed in (("labels.csv", 1), ("test.csv", 3)):
        rows = preference_rows(16, seed=seed)
        Dataset.from_list([{**row, "domain": "half" if i % 2 else "other"} for i, row in enumerate(rows)]).to_csv(name)
    Path("recipes").symlink_to(ROOT / "recipes")
    return Shell(places, monkeypatch.syspath_prepend)


# Programs in the shell blocks of each page.
PROGRAMS = {
    README: {"trl-ssrm", "trl", "python3", "pip"},
    RECIPES: {"python", "sbatch"},
    TUTORIAL: {"trl-ssrm", "trl", "python", "mkdir", "cp"},
    GUIDES / "alignment.md": {"trl"},
    GUIDES / "evaluation.md": {"trl-ssrm"},
    GUIDES / "pairwise.md": {"python"},
    GUIDES / "paper.md": {"accelerate", "python"},
    GUIDES / "processes.md": {"accelerate", "sbatch"},
    GUIDES / "reliability.md": {"python", "pytest", "pip"},
    GUIDES / "results.md": {"python"},
    GUIDES / "serving.md": {"pip", "python"},
    GUIDES / "settings.md": {"trl-ssrm"},
    GUIDES / "speed.md": {"python", "bash"},
}


def test_every_page_with_commands_is_run():
    assert {page for page in PAGES if commands(page)} == PROGRAMS.keys()


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_run(page, shell, reward_model):
    if page.parent == GUIDES:
        save_models(reward_model, "reward-model")
    for line in commands(page):
        shell(line)
    assert set(shell.ran) == PROGRAMS[page]


@pytest.mark.parametrize(
    "flag",
    [
        "trl-ssrm evaluate --no_such_flag 1",
        "trl dpo --no_such_flag 1",
        "make nothing",
        "pytest tests/test_hub.py -k no_such_test",
        "pytest tests/no_such_file.py",
        "python -m tests.faults.campaign --no_such_flag",
    ],
)
def test_commands_that_do_not_exist_are_noticed(flag, shell):
    with pytest.raises((AssertionError, ValueError)):
        shell(flag)


def test_slurm_script_starts_a_process_for_each_gpu_of_each_machine(tmp_path):
    told = {
        "scontrol": "echo node-1; echo node-2",
        # On each of two machines.
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'printf "%s\\n" "$*"',
    }
    for name, script in told.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2"}
    script = str(ROOT / "recipes" / "slurm.sh")
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=True)
    launched = [launch_command_parser().parse_args(line.split()[1:]) for line in done.stdout.splitlines()]
    assert [each.machine_rank for each in launched] == [0, 1]
    for each in launched:
        assert (each.num_machines, each.num_processes, each.main_process_ip) == (2, 16, "node-1")
        assert (ROOT / each.config_file).is_file() and (ROOT / each.training_script).is_file()
