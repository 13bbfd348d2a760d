import pytest
import torch
from conftest import assert_same_weights, weights_of
from peft import (
    AdaptionPromptConfig,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from trl_ssrm import SSRMRewardFunction, SSRMTrainer, load_reward_model


TEXTS = ["Say 1: kind", "Say 2: rude words", "x"]


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 4, "task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"], **settings})


def four_bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")


def rewards(model, tokenizer, bf16: bool = False) -> torch.Tensor:
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        return torch.stack([model(**tokenizer(text, return_tensors="pt")).logits.squeeze() for text in TEXTS]).float()


@pytest.fixture
def trained(llama, config, labeled, unlabeled):
    def train(model=llama, peft_config=None, bf16=False, **arguments) -> SSRMTrainer:
        trainer = SSRMTrainer(
            model,
            config(num_rounds=1, confidence_threshold=0.5, bf16=bf16, use_cpu=True),
            train_dataset=labeled,
            unlabeled_dataset=unlabeled,
            peft_config=peft_config,
            **arguments,
        )
        before = weights_of(trainer.model)
        trainer.train()
        assert len(trainer.round_history) == 2
        # 4-bit weights are packed anew for the CPU when they are first used.
        changed = {
            name
            for name, value in weights_of(trainer.model).items()
            if value.dtype.is_floating_point and not torch.equal(value, before[name])
        }
        assert any("score" in name for name in changed)
        if peft_config is not None:
            assert all("lora" in name or "modules_to_save" in name for name in changed)
        return trainer

    return train


@pytest.mark.parametrize("modules_to_save", [None, ["score"]])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", None, "CAUSAL_LM"])
def test_adapter_is_saved_with_its_score_head(trained, llama, tmp_path, modules_to_save, task_type):
    trainer = trained(peft_config=lora(task_type=task_type, modules_to_save=modules_to_save))
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "saved", num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(rewards(model, tokenizer), rewards(trainer.model, tokenizer), rtol=0, atol=0)


def test_merged_model_reloads_with_plain_transformers(trained, tmp_path):
    trainer = trained(peft_config=lora())
    before = weights_of(trainer.model)
    trainer.merge_and_save(str(tmp_path / "merged"))
    assert_same_weights(weights_of(trainer.model), before)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(rewards(model, tokenizer), rewards(trainer.model, tokenizer), rtol=0, atol=1e-5)


def test_peft_model_is_accepted(trained, llama):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    trainer = trained(model=get_peft_model(model, lora()))
    assert isinstance(trainer.model, PeftModel)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_score_head_beside_a_four_bit_base_is_trained_and_saved_in_float32(trained, tmp_path, bf16, task_type, caplog):
    trainer = trained(peft_config=lora(task_type=task_type), quantization_config=four_bit(), bf16=bf16)
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    heads = [weight for name, weight in saved.items() if "score" in name]
    assert [head.dtype for head in heads] == [torch.float32]
    # Not rounded on the way.
    assert not torch.equal(heads[0], heads[0].bfloat16().float())
    assert "is trained and saved in float32" in caplog.text
    assert ("adds the score head to `modules_to_save`" in caplog.text) == (task_type == "CAUSAL_LM")


def test_scoring_does_not_change_the_gradient_through_a_four_bit_base(llama, config, labeled, unlabeled):
    trainer = SSRMTrainer(
        llama,
        config(use_cpu=True),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        peft_config=lora(),
        quantization_config=four_bit(),
    )

    def gradients() -> dict[str, torch.Tensor]:
        trainer.model.zero_grad()
        inputs = trainer.processing_class(["a text", "another"], return_tensors="pt", padding=True)
        trainer.model.train()(**inputs).logits.diff(dim=0).sum().backward()
        return {name: each.grad.clone() for name, each in trainer.model.named_parameters() if each.grad is not None}

    before = gradients()
    trainer.score_pairs(trainer.data.pool.pairs, "pool")
    assert_same_weights(before, gradients())
    assert any("layers.0" in name and "lora_B" in name and value.abs().sum() > 0 for name, value in before.items())


def test_four_bit_base_with_adapter_reloads_to_the_same_scores(trained, llama, tmp_path):
    trainer = trained(peft_config=lora(), quantization_config=four_bit())
    trainer.save_model(str(tmp_path / "saved"))
    base = AutoModelForSequenceClassification.from_pretrained(
        llama, num_labels=1, quantization_config=four_bit(), dtype=torch.float32
    )
    model = PeftModel.from_pretrained(base, tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    one, other = (rewards(each, tokenizer) for each in (model, trainer.model))
    # Reloaded, the adapter is of float32.
    torch.testing.assert_close(one, other, rtol=0, atol=1e-2)


def test_four_bit_base_is_merged_in_full_precision(trained, llama, tmp_path):
    trainer = trained(peft_config=lora(), quantization_config=four_bit())
    trainer.merge_and_save(str(tmp_path / "merged"))
    trainer.save_model(str(tmp_path / "adapter"))
    base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    unmerged = PeftModel.from_pretrained(base, tmp_path / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert not getattr(model, "is_quantized", False)
    torch.testing.assert_close(rewards(model, tokenizer), rewards(unmerged, tokenizer), rtol=0, atol=1e-5)
    # What quantization rounds away from the base is what is different.
    torch.testing.assert_close(rewards(model, tokenizer), rewards(trainer.model, tokenizer), rtol=0, atol=0.5)


def test_model_without_an_adapter_has_nothing_to_merge(trained, tmp_path):
    with pytest.raises(ValueError, match="has no adapter to merge; use `save_model`"):
        trained().merge_and_save(str(tmp_path))


def test_run_is_not_resumed_with_an_adapter_of_another_scale(llama, config, labeled, unlabeled):
    def make(**settings) -> SSRMTrainer:
        args = config(num_rounds=0)
        return SSRMTrainer(llama, args, None, labeled, unlabeled_dataset=unlabeled, peft_config=lora(**settings))

    make().train()
    make().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="adapter"):
        make(lora_alpha=3).train(resume_from_checkpoint=True)


def assert_trains_on(trainer: SSRMTrainer, adapter: str, tmp_path) -> None:
    """The trainer starts from the rewards of the adapter, trains all of it and its head, and saves what it trained."""
    tokenizer = trainer.processing_class
    start = rewards(load_adapter(adapter), tokenizer)
    torch.testing.assert_close(rewards(trainer.model, tokenizer), start, rtol=0, atol=1e-6)
    before = weights_of(trainer.model)
    trainer.train()
    changed = {name for name, weight in weights_of(trainer.model).items() if not torch.equal(weight, before[name])}
    assert changed == {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in changed) and sum("lora" in name for name in changed) == 8
    trainer.save_model(str(tmp_path / "further"))
    torch.testing.assert_close(
        rewards(load_adapter(tmp_path / "further"), tokenizer), rewards(trainer.model, tokenizer), rtol=0, atol=1e-6
    )


def load_adapter(directory):
    return AutoPeftModelForSequenceClassification.from_pretrained(directory, num_labels=1)


@pytest.mark.parametrize("has_pool", [True, False])
def test_saved_adapter_is_trained_further(trained, config, labeled, unlabeled, has_pool, tmp_path):
    adapter = str(tmp_path / "adapter")
    trained(peft_config=lora()).save_model(adapter)
    args = config(num_rounds=0, output_dir=str(tmp_path / "second"))
    pool = unlabeled if has_pool else None
    trainer = SSRMTrainer(adapter, args, train_dataset=labeled, unlabeled_dataset=pool)
    assert_trains_on(trainer, adapter, tmp_path)


def test_saved_adapter_of_a_pairwise_model_is_trained_further(causal, pairwise_config, labeled, tmp_path):
    adapter = str(tmp_path / "adapter")
    first = SSRMTrainer(causal(), pairwise_config(max_steps=2), train_dataset=labeled, peft_config=lora())
    first.train()
    first.save_model(adapter)
    args = pairwise_config(max_steps=2, output_dir=str(tmp_path / "second"))
    assert_trains_on(SSRMTrainer(adapter, args, train_dataset=labeled), adapter, tmp_path)


def test_saved_adapter_on_a_four_bit_base_is_trained_further(trained, config, labeled, unlabeled, tmp_path):
    adapter = str(tmp_path / "adapter")
    trained(peft_config=lora(), quantization_config=four_bit()).save_model(adapter)
    trainer = SSRMTrainer(
        adapter,
        config(num_rounds=0, use_cpu=True, output_dir=str(tmp_path / "second")),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        quantization_config=four_bit(),
    )
    assert trainer.model.is_loaded_in_4bit
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    assert all(not torch.equal(after[name], before[name]) for name in after if "lora" in name or "modules_to_" in name)


def test_adapter_beside_another_and_adapter_without_a_head_are_refused(trained, causal, make_trainer, tmp_path):
    adapter, headless = str(tmp_path / "adapter"), str(tmp_path / "headless")
    trained(peft_config=lora()).save_model(adapter)
    with pytest.raises(ValueError, match="is an adapter, which is trained further; leave `peft_config` out"):
        trained(model=adapter, peft_config=lora())
    base = AutoModelForCausalLM.from_pretrained(causal())
    get_peft_model(base, lora(task_type="CAUSAL_LM")).save_pretrained(headless)
    AutoTokenizer.from_pretrained(causal()).save_pretrained(headless)
    with pytest.raises(ValueError, match="is an adapter without a score head, so it is no reward model"):
        make_trainer(headless)


@pytest.mark.parametrize(
    "peft_config",
    [
        PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
        AdaptionPromptConfig(adapter_len=4, adapter_layers=1),
        TrainableTokensConfig(task_type="SEQ_CLS", token_indices=[1, 2]),
    ],
    ids=lambda each: type(each).__name__,
)
def test_adapter_that_makes_no_reward_model_is_refused_before_any_work(llama, config, labeled, unlabeled, peft_config):
    data = {"train_dataset": labeled, "unlabeled_dataset": unlabeled}
    args = config()
    with pytest.raises(
        ValueError, match="^An adapter of type .* does not work here: the score head has to be trained"
    ):
        SSRMTrainer(llama, args, peft_config=peft_config, **data)
    if peft_config.is_prompt_learning:
        model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1), peft_config)
        with pytest.raises(ValueError, match="^An adapter of type .* does not work here"):
            SSRMTrainer(model, args, **data)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [262]},
    ],
    ids=["frozen", "adapter", "trained", "one_token"],
)
def test_adapter_on_an_embedding_with_a_new_padding_token_is_read(
    llama, config, labeled, unlabeled, settings, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert len(tokenizer) == 262
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    model.resize_token_embeddings(len(tokenizer))
    saved, further = str(tmp_path / "saved"), str(tmp_path / "further")
    data = {"train_dataset": labeled, "unlabeled_dataset": unlabeled}
    args = config(num_rounds=0)
    trainer = SSRMTrainer(model, args, processing_class=tokenizer, peft_config=lora(**settings), **data)
    trainer.train()
    trainer.save_model(saved)
    expected = rewards(trainer.model, tokenizer)
    torch.testing.assert_close(rewards(load_reward_model(saved), tokenizer), expected, rtol=0, atol=1e-6)
    texts = [f"{text}{tokenizer.eos_token}" for text in TEXTS]
    own = torch.tensor(SSRMRewardFunction(saved).score([""] * len(texts), texts)).float()
    with torch.no_grad():
        alone = [trainer.model(**tokenizer(text, return_tensors="pt")).logits.squeeze() for text in texts]
    torch.testing.assert_close(own, torch.stack(alone), rtol=0, atol=1e-6)
    trainer = SSRMTrainer(saved, config(num_rounds=0, output_dir=further), **data)
    torch.testing.assert_close(rewards(trainer.model, tokenizer), expected, rtol=0, atol=1e-6)
