"""Scoring with vLLM: what is refused without it, and, where it is installed, the engine itself."""

import copy
import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import (
    TWO_PROCESSES,
    assert_same_weights,
    bert_config,
    llama_config,
    preference_rows,
    run_script,
    weights_of,
)
from datasets import Dataset
from peft import LoraConfig
from safetensors import safe_open
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    set_seed,
)

from trl_ssrm import NonFiniteScoreError, PseudoLabelingCallback, SSRMTrainer, scoring, vllm_scoring
from trl_ssrm.data.sequences import PairedSequences
from trl_ssrm.models.sharding import check_sharding
from trl_ssrm.scoring.layout import choose_layout
from trl_ssrm.scoring.score import score_pairs
from trl_ssrm.scoring.vllm_scoring import VLLMScorer


os.environ["VLLM_NO_USAGE_STATS"] = "1"

has_vllm = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not has_vllm, reason="vLLM is not installed")
# The models are tiny: a tenth of the memory is more than they need, and a runner has little that is free.
SHARE = 0.1
# Rewards are about 1 in size; the largest difference seen is 5e-7.
TOLERANCE = 1e-5


# ---- What is refused ----


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


@needs_vllm
def test_labels_of_someone_else_are_refused(llama, config, labeled, unlabeled):
    class ByLength(PseudoLabelingCallback):
        def score(self, trainer, pool, round):
            raise AssertionError

    datasets = {"train_dataset": labeled, "unlabeled_dataset": unlabeled}
    with pytest.raises(ValueError, match="labels the pool; leave `use_vllm` out"):
        SSRMTrainer(llama, config(use_vllm=True), callbacks=[ByLength()], **datasets)


def test_quantized_base_is_refused(llama, config, labeled, unlabeled):
    datasets = {"train_dataset": labeled, "unlabeled_dataset": unlabeled}
    in_4_bits = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "peft_config": LoraConfig()}
    with pytest.raises(ValueError, match="as it was before it was quantized"):
        SSRMTrainer(llama, config(use_vllm=True), **datasets, **in_4_bits)


def test_several_processes_are_refused(llama, tmp_path):
    with pytest.raises(AssertionError, match="scores the pool in one engine beside one process"):
        run_script("run_script.py", *TWO_PROCESSES, model=llama, output_dir=str(tmp_path / "run"), use_vllm=True)


@pytest.mark.parametrize("strategy", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_are_refused(strategy):
    launched = SimpleNamespace(
        distributed_type=DistributedType[strategy],
        is_fsdp2=True,
        deepspeed_plugin=SimpleNamespace(zero_stage=3),
    )
    with pytest.raises(ValueError, match="which are sharded here"):
        check_sharding(launched, freeze_backbone=False, use_vllm=True)


def test_weights_that_a_killed_run_has_left_are_deleted(llama, config, labeled, unlabeled):
    args = config(num_rounds=0)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled)
    trainer.train()
    left = trainer.run.root / f"{vllm_scoring.DIRECTORY_PREFIX}left"
    left.mkdir()
    (left / "model.safetensors").touch()
    trainer.train(resume_from_checkpoint=True)
    assert not left.exists() and trainer.run.weights_path(0).is_file()


# ---- The engine ----


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, tokenizer) -> str:
    """Directory of a tiny decoder whose heads have 32 numbers, the least that vLLM computes on a CPU."""
    return _saved_llama(LlamaForSequenceClassification, tokenizer, tmp_path_factory, num_labels=1)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory, tokenizer) -> str:
    """Directory of a tiny causal language model, for a pairwise model."""
    return _saved_llama(LlamaForCausalLM, tokenizer, tmp_path_factory)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer) -> str:
    """Directory of a tiny encoder."""
    directory = tmp_path_factory.mktemp("encoder")
    set_seed(0)
    config = bert_config(tokenizer, hidden_size=64, num_attention_heads=2)
    return _saved(BertForSequenceClassification(config), tokenizer, directory)


def _saved_llama(model_class, tokenizer, tmp_path_factory, **settings) -> str:
    set_seed(0)
    config = llama_config(tokenizer, num_attention_heads=2, num_key_value_heads=1, **settings)
    return _saved(model_class(config), tokenizer, tmp_path_factory.mktemp(model_class.__name__))


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


def load(directory: str):
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1)


@needs_vllm
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_scores_are_those_of_the_model(request, tokenizer, tmp_path, kind):
    model, accelerator = load(request.getfixturevalue(kind)), Accelerator(cpu=True)
    # Longer than a block of the cache, which has 128 tokens on a CPU.
    pairs = paired(tokenizer, num_prompts=10, length=300)
    engine = engine_for(model, tokenizer, pairs, tmp_path / "run", accelerator)
    by = {"pad_token_id": tokenizer.pad_token_id, "accelerator": accelerator, "disable_tqdm": True}
    expected = score_pairs(model, pairs, layout=choose_layout(model), **by)
    random_state = torch.random.get_rng_state()
    found = score_pairs(model, pairs, layout="padded", engine=engine, **by)
    assert expected.std() > 1000 * TOLERANCE
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    # What the eight answers to a prompt start with is computed once by a decoder; an encoder reads a sequence as a whole.
    assert engine.cached_tokens == (10 * 7 * 256 if kind == "decoder" else 0)
    # Nothing is left of the engine.
    assert engine.process.returncode == 0 and list((tmp_path / "run").iterdir()) == []
    assert torch.equal(torch.random.get_rng_state(), random_state)


@needs_vllm
def test_sequence_ends_where_transformers_sees_its_end(decoder, tokenizer, tmp_path):
    model, accelerator, tokenizer = load(decoder), Accelerator(cpu=True), copy.deepcopy(tokenizer)
    tokenizer.pad_token = "<|end|>"
    model.config.pad_token_id = end = tokenizer.pad_token_id
    ids = [[end, 5, 6, 7], [5, 6, 7, end], [5, end, 6, 7, end, end], [end, end]]
    pairs = PairedSequences.from_tokenized(Dataset.from_dict({"chosen_ids": ids, "rejected_ids": ids[::-1]}))
    engine = engine_for(model, tokenizer, pairs, tmp_path, accelerator)
    by = {"pad_token_id": end, "accelerator": accelerator, "disable_tqdm": True}
    found = score_pairs(model, pairs, layout="padded", engine=engine, **by)
    np.testing.assert_allclose(found, score_pairs(model, pairs, layout="padded", **by), atol=TOLERANCE)


@needs_vllm
def test_scores_of_the_model_are_not_taken_for_those_of_vllm(decoder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SHARD_TOKENS", 256)
    model, accelerator = load(decoder), Accelerator(cpu=True)
    pairs, directory = paired(tokenizer, num_prompts=8), tmp_path / "scores"
    by = {"pad_token_id": tokenizer.pad_token_id, "accelerator": accelerator, "disable_tqdm": True}
    by |= {"layout": "padded", "directory": directory, "key": "k"}
    before = score_pairs(model, pairs, **by)
    with torch.no_grad():
        model.score.weight.mul_(2)
    first, again = (engine_for(model, tokenizer, pairs, tmp_path / "run", accelerator) for _ in range(2))
    found = score_pairs(model, pairs, engine=first, **by)
    np.testing.assert_allclose(found, 2 * before, atol=2 * TOLERANCE)
    # Those of vLLM are taken: no engine is started.
    assert len(list(directory.iterdir())) > 3
    assert np.array_equal(score_pairs(model, pairs, engine=again, **by), found)
    assert not hasattr(again, "process")


@needs_vllm
def test_nan_reward_is_named(decoder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SHARD_TOKENS", 1024)
    model, accelerator = load(decoder), Accelerator(cpu=True)
    poison = tokenizer.convert_tokens_to_ids("<|tools|>")
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    rows = [{**row, "prompt": "a long story " * 20} for row in preference_rows(10)]
    rows[3]["chosen"] += "<|tools|>"
    ids = {
        f"{name}_ids": tokenizer([row["prompt"] + row[name] for row in rows])["input_ids"]
        for name in ("chosen", "rejected")
    }
    pairs = PairedSequences.from_tokenized(Dataset.from_dict(ids))
    engine = engine_for(model, tokenizer, pairs, tmp_path, accelerator)
    with pytest.raises(NonFiniteScoreError) as raised:
        score_pairs(
            model, pairs, tokenizer.pad_token_id, accelerator, layout="padded", engine=engine, disable_tqdm=True
        )
    assert raised.value.rows == [3]


@needs_vllm
def test_other_rewards_than_those_of_the_model_are_refused(decoder, tokenizer, tmp_path):
    model, accelerator = load(decoder).eval(), Accelerator(cpu=True)
    engine = engine_for(model, tokenizer, paired(tokenizer, num_prompts=1), tmp_path, accelerator)
    with pytest.raises(ValueError, match="vLLM gives other rewards than the model"), engine:
        with torch.no_grad():
            model.score.weight.mul_(1.1)
        engine.score([np.array([5, 6, 7]), np.array([8, 9])])
    assert engine.process.returncode is not None


# ---- Runs ----


def run(model, args, labeled, unlabeled, held_out, **settings):
    trainer = SSRMTrainer(
        model, args, train_dataset=labeled, unlabeled_dataset=unlabeled, calibration_dataset=held_out, **settings
    )
    trainer.train()
    return trainer


def scored_by(directory) -> set[str]:
    """The layouts in the keys of stored scores."""
    found = set()
    for path in directory.glob("shard-*"):
        with safe_open(path, framework="pt") as file:
            found.add(file.metadata()["key"].split()[-2])
    return found


@needs_vllm
@pytest.mark.parametrize("kind", ["full", "lora", "folds", "pairwise"])
def test_run_keeps_the_same_pairs(decoder, language_model, config, labeled, unlabeled, held_out, tmp_path, kind):
    lora = LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]) if kind == "lora" else None
    # All of the weights learn this pool in a round, and the labels would not change in another.
    settings = {"num_rounds": 2 if lora else 1, "num_folds": 2 if kind == "folds" else 0}
    if kind == "pairwise":
        settings |= {"preference_model": "pairwise", "max_length": 256, "confidence_threshold": 0.5}
    plain, by_vllm = (
        run(
            language_model if kind == "pairwise" else decoder,
            config(
                output_dir=str(tmp_path / str(use_vllm)),
                use_vllm=use_vllm,
                vllm_gpu_memory_utilization=SHARE,
                learning_rate=1e-2 if lora else 3e-3,
                **settings,
            ),
            *(labeled, unlabeled, held_out),
            peft_config=lora,
        )
        for use_vllm in (False, True)
    )
    assert len(plain.round_history) == settings["num_rounds"] + 1
    for round in range(1, settings["num_rounds"] + 1):
        one, other = (trainer.run.read_pseudo_labels(round)[0].to_dict() for trainer in (plain, by_vllm))
        assert 0 < len(one["pair"]) and one["pair"] == other["pair"]
        assert one["first_is_chosen"] == other["first_is_chosen"]
        np.testing.assert_allclose(one["confidence"], other["confidence"], atol=TOLERANCE)
        places = [by_vllm.run.round_dir(round) / "scores"]
        places += [
            by_vllm.run.round_dir(round - 1) / f"fold_{fold}" / "scores" for fold in range(2) if kind == "folds"
        ]
        assert all(scored_by(place) == {"vllm"} for place in places)
    # Training has seen nothing of it.
    assert_same_weights(weights_of(plain.model), weights_of(by_vllm.model))
    assert not list(by_vllm.run.root.glob(f"{vllm_scoring.DIRECTORY_PREFIX}*"))


@needs_vllm
def test_run_that_was_killed_in_scoring_is_resumed(decoder, tmp_path):
    settings = {"model": decoder, "use_vllm": True, "vllm_gpu_memory_utilization": SHARE}
    undisturbed = run_script("run_script.py", output_dir=str(tmp_path / "undisturbed"), **settings)
    settings["output_dir"] = str(tmp_path / "killed")
    assert run_script("run_script.py", kill_in_scoring_for=2, **settings) is None
    resumed = run_script("run_script.py", resume=True, **settings)
    for name in ("kept", "weights"):
        assert resumed[name] == undisturbed[name]
    np.testing.assert_allclose(np.concatenate(resumed["confidence"]), np.concatenate(undisturbed["confidence"]))
    # The first shard of the second round was not scored again.
    scored = [number for round, number in resumed["scored"] if round == 2]
    assert scored and 0 not in scored


@needs_vllm
def test_what_vllm_can_not_run_is_refused_before_round_0(decoder, config, labeled, unlabeled, tmp_path):
    # transformers does not mind sequences that are longer than this; vLLM does.
    model = load(decoder)
    model.config.max_position_embeddings = 8
    args = config(use_vllm=True, vllm_gpu_memory_utilization=SHARE)
    trainer = SSRMTrainer(
        model,
        args,
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        processing_class=AutoTokenizer.from_pretrained(decoder),
    )
    with pytest.raises(RuntimeError, match="vLLM can't score with this model .*max_model_len"):
        trainer.train()
    assert trainer.state.global_step == 0 and not trainer.run.weights_path(0).exists()
    assert not list(trainer.run.root.glob(f"{vllm_scoring.DIRECTORY_PREFIX}*"))
