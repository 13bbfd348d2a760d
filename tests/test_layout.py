import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    Gemma3TextConfig,
    Gemma3TextForSequenceClassification,
    GemmaConfig,
    GemmaForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    set_seed,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_ssrm.models.backbone import freeze_backbone
from trl_ssrm.models.classifier import num_positions
from trl_ssrm.scoring import shared_attention
from trl_ssrm.scoring.batches import BatchBudget, Scorer
from trl_ssrm.scoring.layout import choose_layout, laid_out
from trl_ssrm.scoring.rows import LONGEST_SHARED_ROW, common_prefix, paired_rows, shared_rows
from trl_ssrm.scoring.score import score_sequences


FAMILIES = {
    "llama": (LlamaForSequenceClassification, LlamaConfig),
    "qwen3": (Qwen3ForSequenceClassification, Qwen3Config),
    "gemma": (GemmaForSequenceClassification, GemmaConfig),
    "gemma2": (Gemma2ForSequenceClassification, Gemma2Config),
    "gemma3": (Gemma3TextForSequenceClassification, Gemma3TextConfig),
    "mistral": (MistralForSequenceClassification, MistralConfig),
}
PAD = 0


def make_model(family="llama", attention="sdpa", **settings):
    set_seed(0)
    model_class, config_class = FAMILIES[family]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = config_class(vocab_size=200, num_labels=1, pad_token_id=PAD, num_key_value_heads=2, **sizes, **settings)
    if family in ("qwen3", "gemma", "gemma2", "gemma3"):
        config.head_dim = 16
    config._attn_implementation = attention
    return model_class(config).eval()


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    """Several completions of several prompts, one of the prompts empty, one completion the start of another."""
    draw, made = np.random.default_rng(0), []
    for length in (0, 3, 20, 60):
        prompt = draw.integers(1, 200, size=length).tolist()
        made += [prompt + draw.integers(1, 200, size=draw.integers(1, 20)).tolist() for _ in range(4)]
    return [*made, made[-1][:-1], made[-2] + [7, 7]]


def as_arrays(sequences) -> list[np.ndarray]:
    return [np.array(ids) for ids in sequences]


def one_by_one(model, sequences) -> np.ndarray:
    with torch.inference_mode():
        return np.array([model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_every_layout_gives_the_rewards_of_one_sequence_at_a_time(family, attention, sequences):
    model = make_model(family, attention)
    assert choose_layout(model) == "shared"
    expected = one_by_one(model, sequences)
    # Packed is what flash attention reads, but other kernels understand it.
    for name in ("padded", "shared", "packed"):
        found = score_sequences(model, sequences, PAD, name, batch_tokens=256)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


# Of the sequences some are shorter and some longer than the smaller window; layers of one kind, and of two.
@pytest.mark.parametrize("window", [16, 4096])
@pytest.mark.parametrize(
    ("family", "attention"),
    [("mistral", "sdpa"), ("mistral", "eager"), ("gemma2", "eager"), ("gemma3", "sdpa"), ("gemma3", "eager")],
)
def test_windows_of_attention_are_those_of_one_sequence_at_a_time(family, attention, window, sequences):
    kinds = {} if family == "mistral" else {"layer_types": ["sliding_attention", "full_attention"]}
    model = make_model(family, attention, sliding_window=window, **kinds)
    assert choose_layout(model) == "shared"
    expected = one_by_one(model, sequences)
    for name in ("padded", "shared", "packed"):
        found = score_sequences(model, sequences, PAD, name, batch_tokens=256)
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)
    if window == 16:
        # It hides something.
        without = score_sequences(
            make_model(family, attention, sliding_window=4096, **kinds), sequences, PAD, "padded"
        )
        assert np.abs(without - expected).max() > 1e-3


def test_adapter_is_laid_out_too(sequences):
    model = get_peft_model(make_model(), LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    assert choose_layout(model) == "shared"
    np.testing.assert_allclose(
        score_sequences(model, sequences, PAD, "shared"), one_by_one(model, sequences), atol=1e-5
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mixed_precision_is_laid_out_too(attention, sequences):
    # A launcher puts autocast around the model, which then computes in bfloat16 though its parameters are float32.
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(
        make_model(attention=attention, initializer_range=0.2)
    )
    assert model.dtype == torch.float32 and choose_layout(model) == "shared"
    padded, shared = (
        Scorer(model, PAD, None, BatchBudget(256, model.device), name).score(as_arrays(sequences))
        for name in ("padded", "shared")
    )
    np.testing.assert_allclose(shared, padded, atol=2e-2 * np.abs(padded).max())


def test_tokens_behind_the_last_one_that_counts_change_nothing(sequences):
    # Where the padding token also ends a text, transformers reads the score before it.
    model = make_model()
    ended = [[*ids, PAD, PAD] for ids in sequences]
    np.testing.assert_allclose(score_sequences(model, ended, PAD, "shared"), one_by_one(model, ended), atol=1e-5)


def test_shared_prompts_are_computed_once(sequences):
    model, seen = make_model(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    score_sequences(model, sequences, PAD, "shared", batch_tokens=1 << 20)
    num_tokens = sum(map(len, sequences))
    rows = shared_rows(as_arrays(sequences))
    computed = sum(row.length for row in rows)
    assert computed <= sum(seen) <= computed + 64 * len(seen)
    assert computed < 0.7 * num_tokens


def test_attention_has_a_mask_for_the_tokens_alone_that_do_not_see_all_before_them(sequences, monkeypatch):
    model, masks, real = make_model(), [], shared_attention.sdpa_attention_forward

    def look(module, query, key, value, attention_mask, **kwargs):
        masks.append(None if attention_mask is None else tuple(attention_mask.shape))
        return real(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(shared_attention, "sdpa_attention_forward", look)
    long = as_arrays([ids for ids in sequences if len(ids) > 60])
    score_sequences(model, long, PAD, "shared", batch_tokens=1 << 20)
    (row,) = shared_rows(long)
    longest = max(map(len, long))
    assert masks == [None, (1, 1, row.length - longest, row.length)] * model.config.num_hidden_layers
    assert model.config._attn_implementation == "sdpa"


def test_forward_pass_that_fails_leaves_the_attention_as_it_was(sequences):
    model = make_model()
    model.score.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_sequences(model, sequences, PAD, "shared")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("window", [None, 16, 4096])
@pytest.mark.parametrize("checkpointing", [None, "transformers", "launcher"])
def test_gradients_are_those_of_padded_pairs(sequences, checkpointing, window):
    pairs = [ids for ids in sequences if len(ids) > 40]
    pairs = pairs[: len(pairs) // 2 * 2]
    length = max(map(len, pairs))
    input_ids = torch.tensor([ids + [PAD] * (length - len(ids)) for ids in pairs])
    inputs = {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}
    gradients, num_tokens = {}, {}
    for name in ("padded", "shared", "packed"):
        model = (make_model() if window is None else make_model("mistral", sliding_window=window)).train()
        if checkpointing == "transformers":
            model.gradient_checkpointing_enable()
        elif checkpointing == "launcher":
            # As accelerate does it for FSDP.
            apply_activation_checkpointing(
                model, check_fn=lambda module: isinstance(module, GradientCheckpointingLayer)
            )
        model.get_input_embeddings().register_forward_pre_hook(
            lambda module, args, name=name: num_tokens.update({name: args[0].numel()})
        )
        with laid_out(model, name, paired_rows):
            logits = model(**inputs, use_cache=False).logits
        assert logits.shape == (len(pairs), 1)
        chosen, rejected = logits.squeeze(-1).chunk(2)
        torch.nn.functional.logsigmoid(chosen - rejected).mean().backward()
        gradients[name] = {weight: parameter.grad for weight, parameter in model.named_parameters()}
    assert num_tokens["shared"] < 0.7 * num_tokens["padded"]
    for other in ("shared", "packed"):
        for name, gradient in gradients[other].items():
            torch.testing.assert_close(gradient, gradients["padded"][name], atol=1e-6, rtol=1e-4)


def test_positions_are_those_that_were_learned(bert):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 50, "pad_token_id": 1}
    roberta = RobertaForSequenceClassification(RobertaConfig(**sizes, max_position_embeddings=40))
    opt = OPTForSequenceClassification(
        OPTConfig(**sizes, word_embed_proj_dim=16, ffn_dim=16, max_position_embeddings=40)
    )
    for model, length in ((roberta, 38), (opt, 40)):
        assert num_positions(model) == length
        with torch.inference_mode():
            model(input_ids=torch.full((1, length), 7))
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, length + 1), 7))
    assert num_positions(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=1)) == 512
    assert num_positions(make_model()) is None


def test_little_in_common_is_left_as_it_is():
    draw = np.random.default_rng(1)
    one, *others = ([5, 6, *draw.integers(7, 200, size=30)] for _ in range(4))
    assert all(row.prefix == 0 for row in shared_rows(as_arrays([one, *others])))
    model, shapes = make_model(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    with laid_out(model, "shared", paired_rows):
        model(input_ids=torch.tensor([one, *others]), attention_mask=torch.ones(4, 32))
    assert shapes == [(4, 32)]


def test_rows_have_an_end():
    prompt = [1] * 500
    rows = shared_rows(as_arrays([[*prompt, *[2 + number] * 600] for number in range(20)]))
    assert len(rows) > 1
    assert max(row.length for row in rows) <= LONGEST_SHARED_ROW
    assert sorted(position for row in rows for position in row.sequences) == list(range(20))


def test_common_prefix_leaves_each_sequence_a_token_of_its_own():
    assert common_prefix(*as_arrays([[1, 2, 3], [1, 2]])) == 1
    assert common_prefix(*as_arrays([[1, 2, 3], [1, 2, 3]])) == 2
    assert common_prefix(*as_arrays([[1, 2, 3], [1, 4, 3]])) == 1
    assert common_prefix(*as_arrays([[1], [2]])) == 0


def test_models_that_would_read_it_wrongly_are_padded(bert):
    assert choose_layout(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=1)) == "padded"
    chunked = make_model("qwen3", layer_types=["chunked_attention", "full_attention"])
    assert choose_layout(chunked) == "padded"
    frozen = make_model()
    freeze_backbone(frozen)
    assert choose_layout(frozen) == "padded"


def test_model_that_ignores_its_window_is_found_out(caplog):
    model = make_model()
    assert choose_layout(model) == "shared"
    model.config.sliding_window = 4096
    assert choose_layout(model) == "padded"
    assert "does not read sequences laid out as 'shared'; they are padded" in caplog.text
    assert model.config.sliding_window == 4096


def test_model_that_ignores_positions_is_found_out(caplog):
    model = make_model()
    rotary = model.model.rotary_emb

    def from_zero(module, args, kwargs):
        positions = torch.arange(kwargs["position_ids"].shape[1])[None]
        return args, {**kwargs, "position_ids": positions}

    rotary.register_forward_pre_hook(from_zero, with_kwargs=True)
    assert choose_layout(model) == "padded"
    assert "does not read sequences laid out as 'shared'; they are padded" in caplog.text
