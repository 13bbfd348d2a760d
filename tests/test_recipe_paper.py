"""The experiment of the paper, with tiny models of both of its architectures."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time

import pytest
from conftest import letter_rows, llama_config
from datasets import Dataset
from recipe_runs import RECIPES, run_as_script
from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM, LlamaForCausalLM, set_seed

from trl_ssrm import Comparison


pytestmark = pytest.mark.slow

SCRIPT = str(RECIPES / "paper" / "paper.py")


def compared(row: dict, number: int) -> dict:
    """A pair as the published data has it: a comparison in one text, and the letter of the better response."""
    texts = [row[name][0]["content"] for name in ("chosen", "rejected")]
    is_first = number % 2 == 0
    question = Comparison().render(row["prompt"], *(texts if is_first else reversed(texts)))
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "A" if is_first else "B"}]
    return {"messages": messages}


@pytest.fixture(scope="module")
def model(tmp_path_factory, policy):
    """Makes directories of tiny models of an architecture, whose tokenizer has all the characters of a comparison."""

    def make(kind: str) -> str:
        directory = tmp_path_factory.mktemp(kind)
        tokenizer = AutoTokenizer.from_pretrained(policy)
        tokenizer.add_tokens(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ[]<>\n"))
        set_seed(0)
        config = llama_config(tokenizer, num_key_value_heads=4, bos_token_id=None)
        if kind == "gemma":
            sizes = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
            sizes |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(tokenizer)}
            GemmaForCausalLM(GemmaConfig(**sizes, pad_token_id=tokenizer.pad_token_id)).save_pretrained(directory)
        else:
            LlamaForCausalLM(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return str(directory)

    return make


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("paper-data")
    rows = letter_rows(80, seed=0)
    broken = {
        "messages": [{"role": "user", "content": "[CONTEXT] no responses"}, {"role": "assistant", "content": "A"}]
    }
    Dataset.from_list([*map(compared, rows, range(80)), broken]).to_json(str(directory / "pairs.jsonl"))
    bench = [
        {name: row[name][0]["content"] for name in row} | {"subset": "donotanswer"} for row in letter_rows(6, seed=1)
    ]
    Dataset.from_list(bench).to_json(str(directory / "bench.jsonl"))
    return {name: str(directory / f"{name}.jsonl") for name in ("pairs", "bench")}


def command(kind: str, model: str, data: dict[str, str], output_dir, *more: str) -> list[str]:
    config = RECIPES / "paper" / {"gemma": "gemma_2b.yaml", "llama": "llama3_8b.yaml"}[kind]
    settings = {
        **{"config": config, "model_name_or_path": model, "dataset_name": data["pairs"], "output_dir": output_dir},
        **{"rewardbench_name": data["bench"], "rewardbench_split": "train", "num_held_out": 8, "num_rounds": 2},
        **{
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-3,
            "warmup_steps": 0,
        },
        **{"confidence_threshold": 0.5, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False},
        **{"use_cpu": True, "disable_tqdm": True, "num_policy_prompts": 8, "num_eval_prompts": 4, "max_new_tokens": 4},
        **{"num_completions": 2},
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [SCRIPT, *flags, "--label_fractions", "0.25", "1", *more]


def test_comparisons_of_the_published_data_are_taken_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES / "paper"))
    as_pair = runpy.run_path(SCRIPT)["as_pair"]
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
    ]
    for letter, texts in (("A", ("one", "two")), ("B", ("two", "one"))):
        messages = [
            {"role": "user", "content": Comparison().render(prompt, *texts)},
            {"role": "assistant", "content": letter},
        ]
        of = {"chosen": "one", "rejected": "two"}
        assert as_pair({"messages": messages}) == {
            "prompt": prompt,
            **{name: [{"role": "assistant", "content": text}] for name, text in of.items()},
        }
    question = messages[0]["content"]
    for broken in (
        question.replace("two", "two [RESPONSE B] three"),
        question.replace("<turn> user", "<turn> someone"),
    ):
        messages[0]["content"] = broken
        assert as_pair({"messages": messages})["prompt"] is None
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert as_pair(pair) == pair
    assert as_pair({**pair, "rejected": " "}) == as_pair({**pair, "prompt": ""}) == dict.fromkeys(pair)


def test_checkpoint_that_was_not_written_to_its_end_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(RECIPES / "paper"))
    checkpoint = runpy.run_path(SCRIPT)["Paper"].checkpoint
    assert checkpoint(tmp_path) is None
    for steps in (9, 10, 11):
        (tmp_path / f"checkpoint-{steps}").mkdir()
    for steps in (9, 10):
        (tmp_path / f"checkpoint-{steps}" / "trainer_state.json").touch()
    assert checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_experiment_ends_with_a_table_and_four_figures(kind, model, data, llama, tmp_path):
    base = model(kind)
    words = command(kind, base, data, tmp_path, "--judge_name_or_path", llama)
    first = run_as_script(*words)
    assert "81 pairs, 1 not told apart, 0 longer than 2048 tokens, 80 used" in first
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    assert [(row[0], row[2]) for row in rows] == [("| 1/4", "0"), ("| 1/4", "1"), ("| 1/4", "2"), ("| all", "0")]
    assert [row[1] for row in rows] == ["18", "18", "18", "72"]
    # Every round has its RewardBench; the labels alone, the last round and all labels have their policy.
    assert all(0 <= float(row[7]) <= 1 for row in rows)
    assert ["±" in row[8] for row in rows] == [True, False, True, True]
    names = ("rewardbench", "reliability", "confidence", "win_rates")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)
    # Started again, it has nothing left to do, and a step of several processes is refused in one sentence.
    results = (tmp_path / "results.jsonl").read_text()
    run_as_script(*words)
    assert (tmp_path / "results.jsonl").read_text() == results
    assert {json.loads(line)["what"] for line in results.splitlines()} == {"rewardbench", "win rate"}
    # A few rows of one subset are not the whole benchmark, and what two judges say is not compared.
    assert "Accuracy on parts of RewardBench" in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit, match=f"has a win rate by {llama}, which can't be compared"):
        run_as_script(*words, "--judge_name_or_path", "another")


@pytest.mark.any_trl
def test_killed_experiment_goes_on(model, data, tmp_path):
    words = command("llama", model("llama"), data, tmp_path / "killed", "--steps", "train")
    environment = {**os.environ, "PYTHONPATH": str(RECIPES.parent)}
    process = subprocess.Popen(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 200
    share = tmp_path / "killed" / "labels_0.2500"
    while not (share / "_rounds" / "round_0" / "round.json").is_file():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (share / "facts.json").exists()
    output = run_as_script(*words)
    assert "Resuming the run" in output
    whole = command("llama", words[4], data, tmp_path / "whole", "--steps", "train")
    run_as_script(*whole)
    facts = [
        json.loads((tmp_path / name / "labels_0.2500" / "facts.json").read_text()) for name in ("killed", "whole")
    ]
    # Killed right after the measure of round 0, the run has the models of all rounds all the same.
    assert all((share / f"model_of_round_{round}" / "model.safetensors").is_file() for round in range(3))
    metrics = [[each["eval_log_loss"] for each in one["rounds"]] for one in facts]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 3


def test_wrong_steps_are_refused(model, data, tmp_path):
    with pytest.raises(
        SystemExit, match="paper.py: error: `steps` has everything; choose from train, policies, measure"
    ):
        run_as_script(*command("llama", model("llama"), data, tmp_path, "--steps", "everything"))
    with pytest.raises(SystemExit, match="Nothing is trained in .* yet; begin with `--steps train`"):
        run_as_script(*command("llama", model("llama"), data, tmp_path, "--steps", "figures"))
