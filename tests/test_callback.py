import numpy as np
import pytest
from conftest import preference_rows

from trl_ssrm import NonFiniteScoreError, PairScores, PseudoLabelingCallback, SSRMTrainer


def top_five(scores: PairScores) -> np.ndarray:
    return scores.confidence >= np.sort(scores.confidence)[-5]


def test_kept_pairs_are_a_dataset_that_a_person_can_open(llama, config, labeled, unlabeled):
    trainer = SSRMTrainer(llama, config(num_rounds=1), train_dataset=labeled, unlabeled_dataset=unlabeled)
    trainer.train()
    kept, facts = trainer.run.read_pseudo_labels(1)
    assert {"prompt", "chosen", "rejected", "confidence", "round"} <= set(kept.column_names)
    assert facts["kept"] == len(kept) > 0
    originals = {row["prompt"]: {row["chosen"], row["rejected"]} for row in unlabeled}
    for row in kept:
        assert {row["chosen"], row["rejected"]} == originals[row["prompt"]]
        assert row["confidence"] > 0.6 and row["round"] == 1


def test_kept_pairs_are_those_above_the_threshold_turned_by_the_sign(llama, config, labeled, unlabeled):
    seen = []

    class Watch(PseudoLabelingCallback):
        def score(self, trainer, pool, round):
            seen.append((pool, super().score(trainer, pool, round)))
            return seen[-1][1]

    trainer = SSRMTrainer(
        llama, config(num_rounds=1), train_dataset=labeled, unlabeled_dataset=unlabeled, callbacks=[Watch()]
    )
    trainer.train()
    ((pool, scores),) = seen
    expected = {
        pool.texts(pair, True)["chosen" if z > 0 else "rejected"]
        for pair, z in enumerate(scores.logits.tolist())
        if 1 / (1 + np.exp(-abs(z))) > 0.6
    }
    assert set(trainer.run.read_pseudo_labels(1)[0]["chosen"]) == expected


def test_plain_function_is_a_selection_policy(llama, config, labeled, unlabeled):
    # Under the threshold of the settings, which has no effect then.
    args = config(num_rounds=1, confidence_threshold=0.99999)
    trainer = SSRMTrainer(
        llama,
        args,
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        callbacks=[PseudoLabelingCallback(selection_policy=top_five)],
    )
    trainer.train()
    assert trainer.round_history[1]["kept"] == 5
    assert trainer.round_history[1]["num_train_pairs"] == len(labeled) + 5


def test_selection_by_a_subclass_is_trained_on(llama, config, labeled, unlabeled):
    class Three(PseudoLabelingCallback):
        def select(self, scores):
            mask = np.zeros(len(scores.logits), dtype=bool)
            mask[:3] = True
            return mask

    trainer = SSRMTrainer(
        llama,
        config(num_rounds=1, confidence_threshold=0.99),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        callbacks=[Three()],
    )
    trainer.train()
    assert trainer.round_history[1]["num_train_pairs"] == len(labeled) + 3


@pytest.mark.parametrize("mask", [np.ones(3, dtype=bool), np.ones(40)])
def test_policy_that_returns_no_mask_is_refused(llama, config, labeled, unlabeled, mask):
    trainer = SSRMTrainer(
        llama,
        config(num_rounds=1),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        callbacks=[PseudoLabelingCallback(selection_policy=lambda scores: mask)],
    )
    with pytest.raises(ValueError, match="has to be a mask of type bool with one value for each of the 40 pairs"):
        trainer.train()


def test_ties_are_counted_and_left_out_whatever_the_policy_says(llama, config, labeled, unlabeled):
    class Ties(PseudoLabelingCallback):
        def score(self, trainer, pool, round):
            logits = super().score(trainer, pool, round).logits.copy()
            logits[:7] = 0
            return PairScores(logits)

    callback = Ties(selection_policy=lambda scores: np.ones(len(scores.logits), dtype=bool))
    trainer = SSRMTrainer(
        llama, config(num_rounds=1), train_dataset=labeled, unlabeled_dataset=unlabeled, callbacks=[callback]
    )
    trainer.train()
    facts = trainer.round_history[1]
    assert (facts["ties"], facts["kept"]) == (7, 33)
    assert facts["num_train_pairs"] == len(labeled) + 33


def test_nan_reward_stops_the_run_and_names_the_rows(llama, config, labeled, unlabeled):
    trainer = SSRMTrainer(llama, config(num_rounds=1), train_dataset=labeled, unlabeled_dataset=unlabeled)
    row = preference_rows(40, seed=2)[17]
    ids = trainer.processing_class(row["prompt"] + row["chosen"])["input_ids"]

    def poison(module, args, output):
        output = output.clone()
        for number, sequence in enumerate(args[0].tolist()):
            if sequence[: len(ids)] == ids:
                output[number] = float("inf")
        return output

    trainer.model.get_input_embeddings().register_forward_hook(poison)
    with pytest.raises(NonFiniteScoreError, match="NaN or infinite rewards to rows 17 of `unlabeled_dataset`"):
        trainer.train()
