"""Scoring with vLLM: what is refused without it, and, where it is installed, the engine itself."""

import importlib.util
import os

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import preference_rows, run_script
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    set_seed,
)

from trl_ssrm import NonFiniteScoreError, PseudoLabelingCallback, SSRMTrainer, scoring, vllm_scoring
from trl_ssrm.layout import choose_layout
from trl_ssrm.scoring import score_pairs
from trl_ssrm.sequences import PairedSequences
from trl_ssrm.vllm_scoring import VLLMScorer


os.environ["VLLM_NO_USAGE_STATS"] = "1"

has_vllm = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not has_vllm, reason="vLLM is not installed")
# The models are tiny: a tenth of the memory is more than they need, and a runner has little that is free.
SHARE = 0.1
# Rewards are about 1 in size; the largest difference seen is 5e-7.
TOLERANCE = 1e-5


# ---- What is refused ----


@pytest.fixture
def with_any_vllm(monkeypatch):
    """For refusals that come after the one of a missing vLLM."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "vllm" or find(name))


@pytest.mark.skipif(has_vllm, reason="vLLM is installed")
def test_missing_vllm_is_refused(llama, config, labeled, unlabeled):
    with pytest.raises(ImportError, match="`use_vllm` needs vLLM, which is not installed"):
        SSRMTrainer(llama, config(use_vllm=True), train_dataset=labeled, unlabeled_dataset=unlabeled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_vllm": True, "freeze_backbone": True}, "`use_vllm` runs the whole model"),
        ({"vllm_gpu_memory_utilization": 0.0}, r"`vllm_gpu_memory_utilization` must be in \(0, 1\]"),
        ({"vllm_gpu_memory_utilization": 1.1}, r"`vllm_gpu_memory_utilization` must be in \(0, 1\]"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_labels_of_someone_else_are_refused(llama, config, labeled, unlabeled, with_any_vllm):
    class ByLength(PseudoLabelingCallback):
        def score(self, trainer, pool, round):
            raise AssertionError

    with pytest.raises(ValueError, match="labels the pool; leave `use_vllm` out"):
        SSRMTrainer(
            llama,
            config(use_vllm=True),
            train_dataset=labeled,
            unlabeled_dataset=unlabeled,
            callbacks=[ByLength()],
        )


def test_quantized_base_is_refused(llama, config, labeled, unlabeled, with_any_vllm):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    with pytest.raises(ValueError, match="as it was before it was quantized"):
        SSRMTrainer(
            llama,
            config(use_vllm=True),
            train_dataset=labeled,
            unlabeled_dataset=unlabeled,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
            peft_config=LoraConfig(),
        )


# ---- The engine ----


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, tokenizer) -> str:
    """Directory of a tiny decoder whose heads have 32 numbers, the least that vLLM computes on a CPU."""
    directory = tmp_path_factory.mktemp("decoder")
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _saved(LlamaForSequenceClassification(config), tokenizer, directory)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer) -> str:
    """Directory of a tiny encoder."""
    directory = tmp_path_factory.mktemp("encoder")
    set_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _saved(BertForSequenceClassification(config), tokenizer, directory)


def _saved(model, tokenizer, directory) -> str:
    # As far apart as the rewards of a trained model.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def paired(tokenizer, num_prompts: int, length: int = 0) -> PairedSequences:
    """Pairs of answers to prompts of some characters."""
    rows = preference_rows(4 * num_prompts)
    for number, row in enumerate(rows):
        row["prompt"] = f"{number // 4} {'a long story ' * (length // 13)}"
    ids = {
        f"{name}_ids": tokenizer([row["prompt"] + row[name] for row in rows])["input_ids"]
        for name in ("chosen", "rejected")
    }
    return PairedSequences.from_tokenized(Dataset.from_dict(ids))


def engine_for(model, tokenizer, pairs, directory, accelerator) -> VLLMScorer:
    longest = int(pairs.lengths.max())
    return VLLMScorer(model, tokenizer, accelerator, directory, longest, gpu_memory_utilization=SHARE)


@needs_vllm
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_scores_are_those_of_the_model(request, tokenizer, tmp_path, kind):
    model = AutoModelForSequenceClassification.from_pretrained(request.getfixturevalue(kind), num_labels=1)
    accelerator = Accelerator(cpu=True)
    # Longer than a block of the cache, which has 128 tokens on a CPU.
    pairs = paired(tokenizer, num_prompts=10, length=300)
    engine = engine_for(model, tokenizer, pairs, tmp_path / "run", accelerator)
    by = {"pad_token_id": tokenizer.pad_token_id, "accelerator": accelerator, "disable_tqdm": True}
    expected = score_pairs(model, pairs, layout=choose_layout(model), **by)
    state = torch.random.get_rng_state()
    found = score_pairs(model, pairs, layout="padded", engine=engine, **by)
    assert np.abs(expected).max() > 0.1 and expected.std() > 100 * TOLERANCE
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    print("largest difference", np.abs(found - expected).max())
    # What several answers start with is computed once by a decoder; an encoder reads all of a sequence at once.
    shared = 10 * 7 * 256
    assert engine.cached_tokens == (shared if kind == "decoder" else 0)
    # Nothing is left of the engine.
    assert engine.process.returncode == 0 and list((tmp_path / "run").iterdir()) == []
    assert torch.equal(torch.random.get_rng_state(), state)
