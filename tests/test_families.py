"""Models of as many families as transformers has with a sequence classifier that a tiny configuration can build."""

import pytest
import torch
from conftest import preference_rows
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForSequenceClassification, set_seed

from trl_ssrm import SSRMRewardFunction, SSRMTrainer, load_reward_model


pytestmark = pytest.mark.any_trl

# Each family calls its sizes by other names, and ignores those of the others.
SIZES = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
    **{
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "d_ff": 64,
    },
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_layers": 2, "num_heads": 4, "d_kv": 8},
    **{
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_layers": 2,
        "n_heads": 4,
        "emb_dim": 32,
        "dim": 32,
        "hidden_dim": 64,
    },
    **{"d_inner": 64, "dff": 64, "ffn_dim": 64, "word_embed_proj_dim": 32, "embedding_size": 32},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256, "n_positions": 256},
    # Rewards that differ by about 1 before training.
    **{"initializer_range": 0.3, "init_std": 0.3},
}
DECODERS = (
    "arcee bloom diffllama doge exaone4 falcon gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gptj "
    "helium llama ministral mistral mixtral modernbert-decoder mpt nemotron olmo2 opt persimmon phi phi3 qwen2 qwen3 "
    "qwen3_moe seed_oss smollm3 stablelm starcoder2"
)
ENCODERS = (
    "albert bert big_bird camembert data2vec-text deberta deberta-v2 distilbert electra ernie esm eurobert ibert longformer "
    "megatron-bert modernbert mpnet rembert roberta roberta-prelayernorm roformer squeezebert xlm xlm-roberta xlm-roberta-xl"
)
WITH_BOTH = "bart mbart mt5 t5"
FAMILIES = f"{DECODERS} {ENCODERS} {WITH_BOTH}".split()
# MobileBERT mixes neighbors too. After the end it reads zeros, as its own padding token is, but no other token.
SEE_PADDING = ("canine", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "xlnet")
OWN_SIZES = {
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "gptj": {"rotary_dim": 4},
    "t5": {"decoder_start_token_id": 0},
    "mt5": {"decoder_start_token_id": 0},
    "longformer": {"attention_window": 8},
    "canine": {"num_hash_buckets": 64},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
# Where `all-linear` includes a part of the head.
TARGETS = {"distilbert": ["q_lin", "v_lin"]}
# Sizes that a family computes.
WITHOUT = {"falcon": ("head_dim",), "funnel": ("num_hidden_layers",), "xlnet": ("max_position_embeddings",)}
TEXTS = ("Say 1: kind", "Say 3: x", "Say 2: rude, and then a much longer text", "Say it soon")


@pytest.fixture
def start(tokenizer, tmp_path):
    """Makes directories of models whose configuration pads with another token than the tokenizer does."""

    def make(family: str) -> str:
        sizes = {name: size for name, size in SIZES.items() if name not in WITHOUT.get(family, ())}
        # The tokenizer's own vocabulary, and more, since some families give the last ones a meaning.
        tokens = {"vocab_size": len(tokenizer) + 2, "pad_token_id": 1, "bos_token_id": 2}
        config = AutoConfig.for_model(
            family,
            **sizes | tokens | {"eos_token_id": tokenizer.eos_token_id, "num_labels": 1} | OWN_SIZES.get(family, {}),
        )
        set_seed(0)
        directory = str(tmp_path / "start")
        AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return make


def token_ids(tokenizer) -> list[torch.Tensor]:
    return [torch.tensor(tokenizer(f"{text}{tokenizer.eos_token}")["input_ids"]) for text in TEXTS]


def rewards(model, tokenizer, together: bool = False) -> torch.Tensor:
    """Rewards of the texts, each alone, or all in one batch."""
    sequences, pad_token_id = token_ids(tokenizer), tokenizer.pad_token_id
    model.eval()
    with torch.no_grad():
        if not together:
            return torch.stack([model(input_ids=ids[None]).logits.squeeze() for ids in sequences])
        padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
        return model(input_ids=padded, attention_mask=(padded != pad_token_id).long()).logits.squeeze()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        pytest.param(family, adapter, id=f"{family}-{'lora' if adapter else 'full'}")
        for family in FAMILIES
        for adapter in (False, True)
        # PEFT knows no layer of I-BERT.
        if (family, adapter) != ("ibert", True)
    ],
)
def test_rewards_are_the_same_alone_in_a_batch_and_reloaded(
    start, config, labeled, unlabeled, family, adapter, tmp_path
):
    trainer = SSRMTrainer(
        start(family),
        config(num_rounds=0, max_steps=2, use_cpu=True),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        peft_config=LoraConfig(task_type="SEQ_CLS", r=2, target_modules=TARGETS.get(family, "all-linear"))
        if adapter
        else None,
    )
    before = rewards(trainer.model, trainer.processing_class)
    trainer.train()
    alone = rewards(trainer.model, trainer.processing_class)
    size = float(alone.abs().max())
    # Trained, and not the same for all texts.
    assert not torch.allclose(alone, before, rtol=0, atol=1e-3 * size)
    assert float(alone.std()) > 1e-3 * size
    together = rewards(trainer.model, trainer.processing_class, together=True)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * max(1, size))
    saved = str(tmp_path / "saved")
    trainer.save_model(saved)
    reloaded = load_reward_model(saved) if adapter else AutoModelForSequenceClassification.from_pretrained(saved)
    torch.testing.assert_close(rewards(reloaded, trainer.processing_class), alone, rtol=0, atol=1e-5 * max(1, size))
    own = SSRMRewardFunction(saved).score([""] * len(TEXTS), list(TEXTS))
    torch.testing.assert_close(torch.tensor(own).float(), alone, rtol=0, atol=1e-5 * max(1, size))


@pytest.mark.parametrize("family", SEE_PADDING)
def test_family_that_sees_padding_is_not_trained_in_padded_batches(start, config, labeled, unlabeled, family):
    with pytest.raises(ValueError, match="gives a sequence another reward beside a longer one than alone"):
        SSRMTrainer(start(family), config(), train_dataset=labeled, unlabeled_dataset=unlabeled)


@pytest.mark.parametrize("family", SEE_PADDING)
def test_rewards_of_a_family_that_sees_padding_are_those_of_each_text_alone(start, family, tokenizer, caplog):
    directory = start(family)
    function = SSRMRewardFunction(directory)
    assert "so only sequences of one length are scored together" in caplog.text
    found = torch.tensor(function.score([""] * len(TEXTS), list(TEXTS))).float()
    alone = rewards(AutoModelForSequenceClassification.from_pretrained(directory), tokenizer)
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_model_that_pads_with_another_token_keeps_counting_positions_from_its_own(start, config, tmp_path):
    rows = Dataset.from_list(preference_rows(8, seed=1))
    trainer = SSRMTrainer(start("roberta"), config(max_steps=1, num_rounds=0), train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    tokenizer = trainer.processing_class
    assert (reloaded.config.pad_token_id, tokenizer.pad_token_id) == (1, trainer.data_collator.pad_token_id)
    torch.testing.assert_close(rewards(reloaded, tokenizer), rewards(trainer.model, tokenizer), rtol=0, atol=1e-6)
