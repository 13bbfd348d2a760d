import numpy as np
import pytest
import torch
from conftest import assert_same_weights, weights_of
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_ssrm import SSRMTrainer


@pytest.fixture(params=["llama", "bert"])
def model(request) -> str:
    return request.getfixturevalue(request.param)


SETTINGS = {"freeze_backbone": True, "num_rounds": 1, "learning_rate": 0.05, "confidence_threshold": 0.5}


def test_features_that_were_kept_give_the_scores_of_the_whole_model(model, config, labeled, unlabeled, held_out):
    args = config(**SETTINGS)
    trainer = SSRMTrainer(model, args, train_dataset=labeled, unlabeled_dataset=unlabeled, eval_dataset=held_out)
    before = weights_of(trainer.model)
    trainer.train()
    trained = [name for name, weight in weights_of(trainer.model).items() if not torch.equal(weight, before[name])]
    assert trained and all(name.startswith(("score", "classifier")) for name in trained)
    assert trainer.round_history[1]["kept"] > 0
    trainer.save_model()
    plain = AutoModelForSequenceClassification.from_pretrained(args.output_dir).eval()
    assert_same_weights(weights_of(plain), weights_of(trainer.model))
    pairs = trainer.data.held_out["eval"]
    logits = trainer.score_pairs(pairs, "eval").logits
    for pair, z in enumerate(logits):
        ids = [pairs.sequences[int(index[pair])]["input_ids"] for index in (pairs.first, pairs.second)]
        with torch.no_grad():
            first, second = (plain(input_ids=torch.tensor([each])).logits.item() for each in ids)
        assert first - second == pytest.approx(z, abs=1e-4)


def test_backbone_runs_once_a_sequence(llama, config, labeled, unlabeled):
    trainer = SSRMTrainer(llama, config(**SETTINGS), train_dataset=labeled, unlabeled_dataset=unlabeled)
    seen = []
    layer = trainer.model.base_model.layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
    trainer.train()
    num_sequences = len(trainer.data.labeled_pairs.sequences) + len(trainer.data.pool.pairs.sequences)
    # The first batch runs twice: its scores are compared with those of the whole model.
    assert sum(seen) == num_sequences + seen[0]


def test_what_is_learned_is_what_is_learned_with_the_backbone_in_every_step(llama, config, labeled, tmp_path):
    frozen = SSRMTrainer(llama, config(**SETTINGS), train_dataset=labeled)
    frozen.train()
    plain = SSRMTrainer(llama, config(learning_rate=0.05, output_dir=str(tmp_path / "plain")), train_dataset=labeled)
    plain.model.base_model.requires_grad_(False)
    plain.train()
    difference = frozen.model.score.weight - plain.model.score.weight
    moved = plain.model.score.weight - AutoModelForSequenceClassification.from_pretrained(llama).score.weight
    assert difference.abs().max() < 1e-3 * moved.abs().max()


def test_head_that_reads_something_else_is_refused(llama, config, labeled):
    model = AutoModelForSequenceClassification.from_pretrained(llama)
    model.score.register_forward_pre_hook(lambda module, args: (args[0].cumsum(1),))
    trainer = SSRMTrainer(
        model,
        config(freeze_backbone=True),
        train_dataset=labeled,
        processing_class=AutoTokenizer.from_pretrained(llama),
    )
    with pytest.raises(ValueError, match="`freeze_backbone` can't tell which features the score head"):
        trainer.train()


def test_mixed_precision_works(llama, config, labeled, unlabeled):
    args = config(**SETTINGS, bf16=True, use_cpu=True)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled)
    trainer.train()
    assert trainer.round_history[1]["kept"] > 0
    again = SSRMTrainer(
        trainer.model, config(freeze_backbone=True), train_dataset=labeled, processing_class=trainer.processing_class
    )
    assert again.model.frozen_backbone is trainer.model.frozen_backbone


def test_padding_token_that_ends_a_sequence_is_read_as_transformers_reads_it(llama, config, labeled):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(llama, pad_token_id=tokenizer.pad_token_id)
    trainer = SSRMTrainer(model, config(freeze_backbone=True), train_dataset=labeled, processing_class=tokenizer)
    trainer.train()
    plain = AutoModelForSequenceClassification.from_pretrained(llama, pad_token_id=tokenizer.pad_token_id).eval()
    plain.load_state_dict(trainer.model.state_dict())
    ids = torch.tensor([tokenizer("Say: kind")["input_ids"] + [tokenizer.eos_token_id]])
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_killed_run_resumes_to_the_same_weights(llama, config, labeled, unlabeled, tmp_path):
    expected = SSRMTrainer(
        llama,
        config(**SETTINGS, output_dir=str(tmp_path / "whole")),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
    )
    expected.train()
    trainer = SSRMTrainer(llama, config(**SETTINGS), train_dataset=labeled, unlabeled_dataset=unlabeled)
    trainer.run.write_pseudo_labels = None
    with pytest.raises(TypeError):
        trainer.train()
    resumed = SSRMTrainer(llama, config(**SETTINGS), train_dataset=labeled, unlabeled_dataset=unlabeled)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(resumed.model), weights_of(expected.model))


def test_adapter_is_refused(llama, config, labeled):
    with pytest.raises(ValueError, match="leave `peft_config` out"):
        SSRMTrainer(
            llama, config(freeze_backbone=True), train_dataset=labeled, peft_config=LoraConfig(task_type="SEQ_CLS")
        )


def test_padding_on_the_left_gives_the_same_features(llama, config, labeled):
    trainer = SSRMTrainer(llama, config(freeze_backbone=True), train_dataset=labeled)
    short, long = [[5, 6, 7], [8, 9, 10, 11, 12]]
    pad = trainer.processing_class.pad_token_id
    right = torch.tensor([[*short, pad, pad], long]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    left = torch.tensor([[pad, pad, *short], long]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    scores = [trainer.model(input_ids=ids, attention_mask=mask).logits for ids, mask in (right, left)]
    assert np.allclose(*(each.detach().numpy() for each in scores))
