"""
TRL's own tests of `RewardTrainer`, run on `SSRMTrainer`.

    git clone --branch v1.16.0 https://github.com/huggingface/trl
    python tests/trl_suite.py trl

Needs the environment of `make test`. The tests are copied from the given checkout to a temporary directory and the two names swapped there. They load tiny
models and data from the hub by name; here, stand-ins of the same architectures and formats lie under these names in the
working directory, where transformers and datasets look first. Left out is the test of a model that comes with code of
its own. On a machine without a GPU, `use_cpu=True` is added to the settings, since TRL's default of bfloat16 is refused
there, and the two tests without any settings are left out.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import conftest
import torch
from datasets import Dataset
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)


TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content or '' }}{{ (message.tool_calls or '') | tojson }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the tests take from their neighbours, without what those ask for beyond it.
TESTING_UTILS = """
from pathlib import Path

import pytest


class TrlTestCase:
    @pytest.fixture(autouse=True)
    def use_tmp_dir(self, tmp_path):
        self.tmp_dir = str(tmp_path)

    @pytest.fixture
    def lazy_shared_datadir(self):
        return Path(__file__).parent / "data"


def require_peft(test):
    return test
"""


def write_models() -> None:
    tokenizer = conftest.make_tokenizer(pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    attention = {"num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 4}
    for name, model_class, config, has_template in (
        ("tiny-Qwen2ForCausalLM-2.5", Qwen2ForCausalLM, Qwen2Config(**TINY, **attention), True),
        ("tiny-LlamaForCausalLM-3.2", LlamaForCausalLM, LlamaConfig(**TINY, **attention), True),
        ("tiny-Qwen3MoeForCausalLM", Qwen3MoeForCausalLM, Qwen3MoeConfig(**TINY, **attention, **experts), True),
        (
            "tiny-Qwen2ForSequenceClassification-2.5",
            Qwen2ForSequenceClassification,
            Qwen2Config(**TINY, **attention, num_labels=1),
            True,
        ),
        ("tiny-GPTNeoXForCausalLM", GPTNeoXForCausalLM, GPTNeoXConfig(**TINY, vocab_size=len(tokenizer)), False),
    ):
        set_seed(0)
        directory = Path("trl-internal-testing") / name
        model_class(config).save_pretrained(directory)
        tokenizer.chat_template = TEMPLATE if has_template else None
        tokenizer.save_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<think>"]})
    tokenizer.save_pretrained(Path("Qwen") / "Qwen3-4B")


def write_datasets() -> None:
    def implicit(row: dict) -> dict:
        return {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}

    tools = '[{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]'
    forms = {
        "standard_preference": lambda row: row,
        "conversational_preference": conftest.as_messages,
        "standard_implicit_prompt_preference": implicit,
        "conversational_implicit_prompt_preference": lambda row: implicit(conftest.as_messages(row)),
    }
    for dataset, configs in (
        ("zen", forms),
        ("toolcall", {"preference": lambda row: {**conftest.as_messages(row), "tools": tools}}),
    ):
        lines = ["---", "configs:"]
        for config, form in configs.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            for split, num_rows in (("train", 17), ("test", 2)):
                path = Path("trl-internal-testing") / dataset / config / f"{split}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                rows = conftest.preference_rows(num_rows, seed=num_rows)
                Dataset.from_list([form(row) for row in rows]).to_parquet(str(path))
                lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
        (Path("trl-internal-testing") / dataset / "README.md").write_text("\n".join([*lines, "---", ""]))


def main(checkout: str) -> int:
    source, here = Path(checkout).resolve() / "tests", Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        write_models()
        write_datasets()
        shutil.copytree(source / "data", "tests/data")
        Path("tests/__init__.py").touch()
        Path("tests/testing_utils.py").write_text(TESTING_UTILS)
        text = (source / "test_reward_trainer.py").read_text()
        text = text.replace(
            "from trl import RewardConfig, RewardTrainer", "from trl_ssrm import SSRMConfig, SSRMTrainer"
        )
        text = re.sub(r"\bRewardTrainer\(", "SSRMTrainer(", re.sub(r"\bRewardConfig\(", "SSRMConfig(", text))
        left_out = "trust_remote_code"
        if not torch.cuda.is_available():
            left_out += " or tag_added"
            text = re.sub(r"\bSSRMConfig\(", "SSRMConfig(use_cpu=True, ", text)
        Path("tests/test_reward_trainer.py").write_text(text)
        environment = {**os.environ, "PYTHONPATH": str(here.parent)}
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_reward_trainer.py", "-k", f"not ({left_out})"]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
