import itertools
import json

import numpy as np
import pytest
import torch
from conftest import (
    letter_rows,
    preference_rows,
)
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import GRPOConfig, GRPOTrainer

from trl_ssrm import (
    Comparison,
    ConfidenceFilteredDataCollator,
    PairwiseJudge,
    PseudoLabelingCallback,
    SSRMRewardFunction,
    SSRMTrainer,
    best_of_n,
    label_preferences,
    load_pairwise_model,
    load_ppo_models,
    load_reward_model,
)
from trl_ssrm.scoring.preference import mean_win_probability


pytestmark = pytest.mark.slow


CONVERSATION = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]


COMPLETIONS = ["kind ab", "rude bax", "warm ab", "cold bax", "clear ab"]


def test_ranking_by_all_pairs_and_by_a_tournament(trained_judge, monkeypatch):
    judge = PairwiseJudge(trained_judge)
    asked = []
    real = judge.logits
    monkeypatch.setattr(judge, "logits", lambda prompts, pairs: asked.append(len(pairs)) or real(prompts, pairs))
    ranked = judge.rank("Say it: ", COMPLETIONS)
    assert sum(asked) == 10 and set(ranked[:3]) == {0, 2, 4}
    wins = mean_win_probability(judge.compare(["Say it: "], [COMPLETIONS])[0])
    assert ranked == sorted(range(5), key=lambda position: -wins[position])
    asked.clear()
    by_tournament = judge.rank("Say it: ", COMPLETIONS, method="tournament")
    assert sum(asked) == 4 and sorted(by_tournament) == list(range(5)) and by_tournament[0] in (0, 2, 4)
    with pytest.raises(ValueError, match="`method` must be 'all' or 'tournament', got 'swiss'"):
        judge.rank("a", COMPLETIONS, method="swiss")


def test_tournament_finds_the_best_of_completions_that_have_an_order(trained_judge, monkeypatch):
    judge = PairwiseJudge(trained_judge)
    monkeypatch.setattr(judge, "logits", lambda prompts, pairs: np.array([float(a) - float(b) for a, b in pairs]))
    for order in itertools.islice(itertools.permutations("1234567"), 0, None, 97):
        ranked = judge.rank("", order, method="tournament")
        assert order[ranked[0]] == "7" and sorted(ranked) == list(range(7))
    assert [order[position] for position in judge.rank("", order)] == list("7654321")


def test_reward_is_the_mean_win_probability_within_the_group(trained_judge):
    judge = PairwiseJudge(trained_judge)
    # Two prompts, in turns, as Online DPO gives them.
    prompts = ["Say x: ", "Say y: "] * 3
    completions = ["kind a", "rude b", "rude a", "kind b", "warm a", "lone b"]
    rewards = judge(prompts=prompts, completions=completions, trainer_state=None)
    for start in (0, 1):
        others = [number for number in range(6) if number % 2 == start]
        for number in others:
            pairs_of = [(completions[number], completions[other]) for other in others if other != number]
            expected = np.mean(judge.judge([prompts[number]] * 2, pairs_of))
            assert rewards[number] == pytest.approx(expected, abs=1e-6)
    assert judge(["alone"], ["kind"]) == [0.5] and judge([], []) == []


def test_comparison_that_does_not_fit_is_not_judged(trained_judge, caplog):
    judge = PairwiseJudge(trained_judge, comparison=Comparison(max_length=120))
    found = judge.judge(["a", "b"], [("kind", "rude"), ("kind" * 40, "rude")])
    assert found[0] > 0.5 and np.isnan(found[1])
    assert "1 of 2 pairs are not judged: they are longer than 120 tokens" in caplog.text
    with pytest.raises(
        ValueError, match="A pair has more tokens than `max_length` of the comparison, so there is no ranking"
    ):
        judge.rank("a", ["kind", "rude", "x" * 200])
    with pytest.raises(ValueError, match="there is no ranking"):
        judge.rank("a", ["kind", "rude", "x" * 200], method="tournament")
    rewards = judge(["a"] * 3, ["kind", "rude", "x" * 200])
    assert rewards[2] is None and rewards[0] + rewards[1] == pytest.approx(1)
    matrix = judge.compare(["a"], [["kind", "rude", "x" * 200]])[0]
    assert np.isnan(matrix[2, :2]).all()
    wins = mean_win_probability(matrix)
    assert wins[0] == pytest.approx(1 / (1 + np.exp(-matrix[0, 1]))) and wins[2] == 0.5


def test_completions_that_can_not_be_compared_are_no_labels(trained_judge, tmp_path, caplog):
    judge = PairwiseJudge(trained_judge, comparison=Comparison(max_length=120))
    rows = [
        {"prompt": "a", "completions": ["kind ab", "rude bax", "x" * 200]},
        {"prompt": "b", "completions": ["x" * 200, "ok"]},
    ]
    labels = label_preferences(judge, Dataset.from_list(rows), str(tmp_path / "labels"), pairing="all")
    assert len(labels) == 1 and {labels[0]["chosen"], labels[0]["rejected"]} == {"kind ab", "rude bax"}
    assert "3 (completions too long to be compared)" in caplog.text
    best = best_of_n(judge, Dataset.from_list(rows), str(tmp_path / "best"))
    assert best["prompt"][:] == ["a"]


def test_scalar_and_pairwise_models_are_not_taken_for_each_other(
    trained_judge, llama, pairwise_config, labeled, tmp_path
):
    for load in (load_reward_model, SSRMRewardFunction, lambda path: load_ppo_models(path, path)):
        with pytest.raises(ValueError, match="is a pairwise model, which gives no reward to a single completion"):
            load(trained_judge)
    with pytest.raises(ValueError, match="is a scalar reward model, which can't score a comparison"):
        PairwiseJudge(llama)
    Comparison(labels=["X", "Y"]).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="was trained on another comparison"):
        SSRMTrainer(trained_judge, pairwise_config(comparison=str(tmp_path)), train_dataset=labeled)
    # With the same comparison, training goes on from it.
    trainer = SSRMTrainer(trained_judge, pairwise_config(), train_dataset=labeled)
    torch.testing.assert_close(trainer.model.score.weight.cpu(), PairwiseJudge(trained_judge).model.score.weight)


def test_messages_without_text_are_refused(trained_judge):
    call = [{"role": "assistant", "content": "", "tool_calls": []}, {"role": "assistant", "content": None}]
    with pytest.raises(ValueError, match="A pairwise model reads text, but a message has none"):
        PairwiseJudge(trained_judge).judge([CONVERSATION], [(call, "b")])


def test_what_does_not_go_with_a_pairwise_model_is_refused(causal, bert, pairwise_config, labeled):
    encoder = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(causal())
    with pytest.raises(ValueError, match="BertForSequenceClassification can't"):
        SSRMTrainer(encoder, pairwise_config(), train_dataset=labeled, processing_class=tokenizer)
    with pytest.raises(ValueError, match="BertForSequenceClassification can't"):
        PairwiseJudge(encoder, processing_class=tokenizer)
    with pytest.raises(ValueError, match="must be a `ConfidenceFilteredDataCollator` with a `comparison_seed`"):
        collator = ConfidenceFilteredDataCollator(pad_token_id=0)
        SSRMTrainer(causal(), pairwise_config(), train_dataset=labeled, data_collator=collator)
    with pytest.raises(ValueError, match="`chat_template_path` would change the text that a pairwise model reads"):
        SSRMTrainer(causal(), pairwise_config(chat_template_path="x.jinja"), train_dataset=labeled)


def test_rows_that_do_not_fit_are_counted_without_a_pool_too(causal, pairwise_config, labeled, caplog):
    rows = Dataset.from_list([*labeled, {"prompt": "p", "chosen": "x" * 300, "rejected": "y"}])
    SSRMTrainer(causal(), pairwise_config(), train_dataset=rows)
    assert "Left out of `train_dataset`: 1 (longer than max_length=256)" in caplog.text
    with pytest.raises(ValueError, match="Every row of `eval_dataset` is longer than max_length=256"):
        SSRMTrainer(causal(), pairwise_config(), train_dataset=labeled, eval_dataset=rows.select([16]))


def test_capped_answers_are_told_of(causal, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(causal())
    model.config.logits_scaling = 8.0
    model.save_pretrained(tmp_path)
    load_pairwise_model(str(tmp_path), (1, 2))
    assert "has logits_scaling between its last hidden state and its answer" in caplog.text


def test_judge_trains_a_policy(trained_judge, policy, tmp_path):
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in letter_rows(8, seed=1)])
    args = GRPOConfig(
        output_dir=str(tmp_path),
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=6,
        max_steps=2,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = GRPOTrainer(policy, reward_funcs=PairwiseJudge(trained_judge), args=args, train_dataset=prompts)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    # Win probabilities within a group are 0.5 on average.
    assert all(log["reward"] == pytest.approx(0.5, abs=1e-5) for log in logs)
    assert all(log["reward_std"] > 0 for log in logs)


def test_judge_labels_as_a_scalar_model_does(trained_judge, tmp_path):
    judge = PairwiseJudge(trained_judge)
    data = Dataset.from_list([{"prompt": f"Say {n}: ", "completions": COMPLETIONS[n % 3 :]} for n in range(6)])
    labels = label_preferences(judge, data, str(tmp_path / "labels"), pairing="all", min_confidence=0.6)
    assert len(labels) > 6
    for row in labels:
        probability = judge.judge([row["prompt"]], [(row["chosen"], row["rejected"])])[0]
        assert row["confidence"] == pytest.approx(probability, abs=1e-6) and probability >= 0.6
    best = best_of_n(judge, data, str(tmp_path / "best"))
    assert {row["completion"].split()[0] for row in best} <= {"kind", "warm", "clear"}
    with pytest.raises(ValueError, match="set `max_length` of the judge's `comparison` instead"):
        label_preferences(judge, data, str(tmp_path / "other"), max_length=9)


def test_judge_teaches_a_scalar_model_that_ppo_takes(trained_judge, policy, causal, config, tmp_path):
    """Round 0 has a few labels; the pool is labeled by the judge, with its probabilities as soft labels."""
    path = causal("plain")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.save_pretrained(path)
    held_out = Dataset.from_list(preference_rows(40, seed=3))
    trainer = SSRMTrainer(
        path,
        config(
            num_rounds=1, pseudo_label_type="soft", confidence_threshold=0.6, max_steps=1, round_num_train_epochs=4
        ),
        train_dataset=Dataset.from_list(preference_rows(4, seed=9)),
        unlabeled_dataset=Dataset.from_list(preference_rows(80, seed=2)),
        eval_dataset=held_out,
        callbacks=[PseudoLabelingCallback(teacher=PairwiseJudge(trained_judge))],
    )
    trainer.train()
    before, after = (facts["eval_accuracy"] for facts in trainer.round_history)
    assert after > 0.9 and after > before
    kept = trainer.run.read_pseudo_labels(1)[0]
    judged = PairwiseJudge(trained_judge).judge(
        kept["prompt"], list(zip(kept["chosen"], kept["rejected"], strict=True))
    )
    np.testing.assert_allclose(kept["confidence"], judged, atol=1e-5)
    trainer.save_model(str(tmp_path / "student"))
    models = load_ppo_models(path, str(tmp_path / "student"))
    ppo = pytest.importorskip("trl.experimental.ppo")
    rows = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in preference_rows(16)]
    args = ppo.PPOConfig(
        str(tmp_path / "ppo"),
        response_length=4,
        total_episodes=8,
        per_device_train_batch_size=4,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
    )
    data = Dataset.from_list(rows)
    ppo_trainer = ppo.PPOTrainer(args=args, train_dataset=data, eval_dataset=data, **models)
    ppo_trainer.train()
    assert np.isfinite(ppo_trainer.state.log_history[-1]["objective/scores"])


def test_comparison_is_saved_with_the_model(trained_judge):
    stored = json.loads((open(f"{trained_judge}/comparison.json")).read())
    assert Comparison(**stored) == Comparison.from_pretrained(trained_judge) == Comparison(max_length=1024)
