import os


# Before transformers is imported: the tests use no hub, and models this small are slowed down by threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, disable_progress_bars
from hypothesis import HealthCheck, settings
from processes import run_python
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

from trl_ssrm import SSRMConfig, SSRMTrainer


disable_progress_bars()

# The same examples in every run of the suite, so that it fails for a change alone; `--hypothesis-profile=long` looks for
# others.
of_any_kind = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("suite", max_examples=25, derandomize=True, database=None, **of_any_kind)
settings.register_profile("long", max_examples=1000, **of_any_kind)
settings.load_profile("suite")

CHAT_TEMPLATE = (
    "{% if tools %}<|tools|>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GOOD = ["kind", "clear", "right", "warm", "exact"]
BAD = ["rude", "vague", "wrong", "cold", "loose"]


def make_tokenizer(**special_tokens) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: every text is its bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def llama_config(tokenizer, **settings) -> LlamaConfig:
    """Configuration of a tiny decoder for the tokens of a tokenizer."""
    sizes = {
        "vocab_size": len(tokenizer),
        # The least that 4-bit quantization, by blocks of 64 weights, takes.
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return LlamaConfig(**{**sizes, **tokens, **settings})


def bert_config(tokenizer, **settings) -> BertConfig:
    """Configuration of a tiny encoder with a score head for the tokens of a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return BertConfig(**{**sizes, **tokens, "num_labels": 1, **settings})


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(pad_token="<|pad|>", eos_token="<|eos|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>", "<|tools|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def llama(tmp_path_factory, tokenizer) -> str:
    """Directory of a tiny decoder with a score head."""
    directory = tmp_path_factory.mktemp("llama")
    set_seed(0)
    LlamaForSequenceClassification(llama_config(tokenizer, num_labels=1)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def bert(tmp_path_factory, tokenizer) -> str:
    """Directory of a tiny encoder with a score head."""
    directory = tmp_path_factory.mktemp("bert")
    set_seed(0)
    BertForSequenceClassification(bert_config(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


PAIRWISE_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def with_prefix_space() -> PreTrainedTokenizerFast:
    """A tokenizer of the kind of SentencePiece: alone, "A" is another token than behind other text."""
    characters = sorted({chr(code) for code in range(32, 127)} | {"\n", "▁", "é"})
    vocab = {character: index for index, character in enumerate(characters)}
    vocab |= {"▁A": len(vocab), "▁B": len(vocab) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "A"), ("▁", "B")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>")


@pytest.fixture(scope="session")
def causal(tmp_path_factory):
    """Makes directories of causal language models that were never trained, but whose logits differ."""
    made = {}

    def make(kind: str = "untied") -> str:
        if kind in made:
            return made[kind]
        directory = tmp_path_factory.mktemp(kind)
        tokenizer = (
            with_prefix_space() if kind == "prefix" else make_tokenizer(pad_token="<|pad|>", eos_token="<|eos|>")
        )
        if kind != "plain":
            tokens = ["<|user|>", "<|assistant|>", "<|end|>"]
            tokenizer.add_special_tokens({"additional_special_tokens": tokens})
            tokenizer.chat_template = PAIRWISE_CHAT_TEMPLATE
        set_seed(1)
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        shared = {**sizes, "num_attention_heads": 4, "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.1}
        if kind == "neox":
            # Another family: its output embedding has another name.
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**shared, max_position_embeddings=1024))
        else:
            model = LlamaForCausalLM(LlamaConfig(**shared, tie_word_embeddings=kind == "tied"))
        model.save_pretrained(directory, max_shard_size="100KB" if kind == "sharded" else "1GB")
        tokenizer.save_pretrained(directory)
        made[kind] = str(directory)
        return made[kind]

    return make


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="session")
def policy(tmp_path_factory) -> str:
    """Directory of a tiny causal language model that writes letters, and whose tokens end a turn but pad otherwise."""
    directory = tmp_path_factory.mktemp("policy")
    vocab = {character: index for index, character in enumerate(f"{LETTERS} 0123456789")}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    set_seed(0)
    config = llama_config(tokenizer, num_key_value_heads=4, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def letter_rows(num_rows: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """Conversations in which the chosen completion has more letters from the first half of the alphabet."""
    draw, rows = random.Random(seed), []
    while len(rows) < num_rows:
        texts = []
        for share in (draw.random(), draw.random()):
            halves = draw.choices((LETTERS[:13], LETTERS[13:]), weights=(share, 1 - share), k=draw.randint(3, 8))
            texts.append("".join(draw.choice(half) for half in halves))
        means = [sum(letter in LETTERS[:13] for letter in text) / len(text) for text in texts]
        if means[0] != means[1]:
            chosen, rejected = texts if means[0] > means[1] else reversed(texts)
            rows.append(as_messages({"prompt": f"say {len(rows)}", "chosen": chosen, "rejected": rejected}))
    return rows


def preference_rows(num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs in which the chosen completion uses a good word and the rejected one a bad word."""
    draw = random.Random(seed)
    rows = []
    for number in range(num_rows):
        prompt = f"Say {seed}-{number}: "
        filler = "".join(draw.choices("abcdefgh ", k=draw.randint(1, 12)))
        rows.append(
            {
                "prompt": prompt,
                "chosen": f"{draw.choice(GOOD)} {filler}",
                "rejected": f"{draw.choice(BAD)} {filler[::-1]}x",
            }
        )
    return rows


def as_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """The same pair as conversations."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": roles[name], "content": text}] for name, text in row.items()}


# Accelerate keeps the precision and the processes of the first `Accelerator` of a process for all later ones.
ACCELERATE_STATES = (PartialState, AcceleratorState, GradientState)


@pytest.fixture(autouse=True, scope="module")
def with_own_accelerate_state():
    """Each file of tests begins without a state, and may keep a trainer for several tests."""
    yield
    for state in ACCELERATE_STATES:
        state._shared_state.clear()


@pytest.fixture(autouse=True)
def with_accelerate_state_of_the_file(with_own_accelerate_state):
    """Each test begins with the state of what its file keeps, and not with the state that another test has left."""
    before = [dict(state._shared_state) for state in ACCELERATE_STATES]
    yield
    for state, values in zip(ACCELERATE_STATES, before, strict=True):
        state._shared_state.clear()
        state._shared_state.update(values)


@pytest.fixture(autouse=True)
def without_report(request, monkeypatch):
    """A report takes about a second: the runs of the suite have none but where it is what is tested."""
    if request.module.__name__ != "test_report":
        monkeypatch.setattr("trl_ssrm.trainer.report_run", lambda output_dir, trackers, step: None)


@pytest.fixture
def labeled() -> Dataset:
    return Dataset.from_list(preference_rows(16, seed=1))


@pytest.fixture
def unlabeled() -> Dataset:
    return Dataset.from_list(preference_rows(40, seed=2))


@pytest.fixture
def held_out() -> Dataset:
    return Dataset.from_list(preference_rows(20, seed=3))


# Defaults of TRL that most tests turn off, since they are slow on a CPU.
TRL_DEFAULTS = {"bf16": True, "gradient_checkpointing": True, "use_cpu": True}


# The default round: soft labels, from where round 0 has started.
SOFT_ROUND = {
    "num_folds": 3,
    "num_rounds": 1,
    "pseudo_label_type": "soft",
    "round_init": "base",
    "confidence_threshold": None,
}


@pytest.fixture
def config(tmp_path):
    """Makes configurations of short runs on the CPU."""

    def make(**settings) -> SSRMConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "report_to": "none",
            "bf16": False,
            "gradient_checkpointing": False,
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 3,
            "logging_steps": 2,
            "num_rounds": 2,
            "confidence_threshold": 0.6,
            # The paper's way; soft labels, restarts and fold models have tests of their own.
            "num_folds": 0,
            "round_init": "continue",
            "pseudo_label_type": "hard",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        if settings.get("target_precision") is not None:
            del defaults["confidence_threshold"]
        return SSRMConfig(**{**defaults, **settings})

    return make


@pytest.fixture
def make_trainer(llama, config, labeled, unlabeled):
    """
    Makes trainers of short runs. Datasets are given by the name of their argument, as datasets or lists of rows; all else
    is a setting.
    """

    def make(model=llama, callbacks=(), **settings) -> SSRMTrainer:
        names = ("train_dataset", "unlabeled_dataset", "eval_dataset", "calibration_dataset")
        given = {name: settings.pop(name) for name in names if name in settings}
        rows = {"train_dataset": labeled, "unlabeled_dataset": unlabeled, **given}
        data = {name: Dataset.from_list(value) if isinstance(value, list) else value for name, value in rows.items()}
        return SSRMTrainer(model, config(**settings), callbacks=list(callbacks), **data)

    return make


@pytest.fixture
def pairwise_config(config):
    def make(**settings):
        return config(**{"preference_model": "pairwise", "max_length": 256, "num_rounds": 1, **settings})

    return make


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Equal bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="session")
def trained_judge(causal, tmp_path_factory) -> str:
    """Directory of a pairwise model that prefers good words."""
    directory = str(tmp_path_factory.mktemp("judge"))
    args = SSRMConfig(
        directory,
        preference_model="pairwise",
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=3e-3,
        num_train_epochs=8,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SSRMTrainer(causal(), args, train_dataset=Dataset.from_list(preference_rows(96, seed=1)))
    trainer.train()
    trainer.save_model(directory)
    return directory


def run_script(name: str, *launcher: str, num_processes: int = 1, **settings) -> dict | None:
    """
    What the main process of a script of this directory printed last, or `None` if one was killed. A `launcher` is the
    command that starts its processes; without it they are forked.
    """
    words = [str(Path(__file__).parent / name), json.dumps(settings)]
    paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths)}
    if launcher:
        environment = {**os.environ, **own}
        done = subprocess.run(
            [*launcher, *words], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    else:
        done = run_python(words, own, num_processes)
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = (line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(result)
