import tracemalloc

import numpy as np
import pytest
from conftest import preference_rows
from datasets import Dataset

from trl_ssrm import (
    ConfidenceFilteredDataCollator,
    NonFiniteScoreError,
    PairScores,
    PseudoLabelingCallback,
    SSRMTrainer,
)
from trl_ssrm.rounds.callback import RoundCallback
from trl_ssrm.rounds.label import join


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


# ---- What the settings select ----


def test_by_default_soft_labels_are_kept_whatever_their_confidence_and_hard_ones_above_080(make_trainer, tmp_path):
    kept = {}
    for kind in ("soft", "hard"):
        trainer = make_trainer(
            confidence_threshold=None,
            num_rounds=1,
            num_train_epochs=1,
            pseudo_label_type=kind,
            callbacks=[Fixed(LOGITS)],
            output_dir=str(tmp_path / kind),
        )
        trainer.train()
        pseudo_labels, facts = trainer.run.read_pseudo_labels(1)
        kept[kind] = facts["confidence_threshold"], sorted(pseudo_labels["pair"])
    assert kept["soft"] == (0.5, list(range(40)))
    assert kept["hard"] == (0.8, np.flatnonzero(1 / (1 + np.exp(-np.abs(LOGITS))) > 0.8).tolist())


def test_collator_of_the_user_is_taken_as_it_is_or_refused(llama, config, labeled, unlabeled):
    def make(threshold: float, **settings) -> SSRMTrainer:
        collator = ConfidenceFilteredDataCollator(0, confidence_threshold=threshold)
        return SSRMTrainer(
            llama, config(**settings), train_dataset=labeled, unlabeled_dataset=unlabeled, data_collator=collator
        )

    assert make(0.6, confidence_threshold=0.6).data_collator.confidence_threshold == 0.6
    with pytest.raises(ValueError, match=r"leaves out pairs with a confidence up to 0.7, .* from 0.6 on"):
        make(0.7, confidence_threshold=0.6)
    with pytest.raises(ValueError, match=r"from 0.5 on"):
        make(0.6, confidence_threshold=None, pseudo_label_type="soft")


def test_callbacks_are_told_of_rounds_and_labelings_and_can_end_the_rounds(llama, config, labeled, unlabeled):
    told = []

    class Watch(RoundCallback):
        def on_round_begin(self, args, state, control, round, **kwargs):
            told.append(("round begin", round))

        def on_round_end(self, args, state, control, round, facts, round_history, **kwargs):
            told.append(("round end", round))
            assert facts is round_history[-1] and "temperature" in facts

        def on_labeling_begin(self, args, state, control, round, facts, settings, **kwargs):
            told.append(("labeling begin", round))
            assert facts["round"] == round and settings.confidence_threshold == 0.6

        def on_labeling_end(self, args, state, control, round, facts, **kwargs):
            told.append(("labeling end", round))
            assert facts["kept"] > 0
            control.should_training_stop = round == 2

    trainer = SSRMTrainer(
        llama,
        config(num_rounds=3),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        callbacks=[Watch(), Chance()],
    )
    output = trainer.train()
    assert told == [
        *[("round begin", 0), ("round end", 0), ("labeling begin", 0), ("labeling end", 1)],
        *[("round begin", 1), ("round end", 1), ("labeling begin", 1), ("labeling end", 2)],
    ]
    assert output.metrics["termination_reason"] == "callback" and len(trainer.round_history) == 2


def test_policy_is_told_rows_and_lengths(llama, config, labeled, unlabeled):
    seen = []

    def watch(scores: PairScores) -> np.ndarray:
        seen.append(scores)
        return scores.confidence > 0.5

    trainer = SSRMTrainer(
        llama,
        config(num_rounds=1),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        callbacks=[PseudoLabelingCallback(selection_policy=watch)],
    )
    trainer.train()
    pool, (scores,) = trainer.data.pool, seen
    assert scores.rows.tolist() == list(range(40))
    for pair in range(40):
        texts = pool.texts(pair, first_is_chosen=True)
        row, tokenize = unlabeled[int(scores.rows[pair])], trainer.processing_class
        assert texts["prompt"] == row["prompt"]
        expected = [len(tokenize(texts["prompt"] + texts[side])["input_ids"]) + 1 for side in ("chosen", "rejected")]
        assert scores.lengths[pair].tolist() == expected


class Fixed(PseudoLabelingCallback):
    """Gives the pool the logits that a test says, in the order of the pool."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def score(self, trainer, pool, round):
        temperature = trainer.round_history[round]["temperature"]
        return PairScores(np.asarray(self.logits, dtype=float)[: len(pool)], temperature)


@pytest.fixture
def kept_by(llama, config, labeled, unlabeled):
    """Trains one round on given logits and returns the trainer, the kept pairs and the facts."""

    def train(logits, pool=None, **settings):
        trainer = SSRMTrainer(
            llama,
            config(**{"num_rounds": 1, "num_train_epochs": 1, **settings}),
            train_dataset=labeled,
            unlabeled_dataset=pool or unlabeled,
            callbacks=[Fixed(logits)],
        )
        trainer.train()
        pseudo_labels, facts = trainer.run.read_pseudo_labels(1)
        return trainer, pseudo_labels, facts

    return train


LOGITS = np.linspace(0.2, 4, 40) * np.where(np.arange(40) % 3, 1, -1)


def test_target_precision_keeps_the_pairs_above_the_threshold_of_the_held_out_labels(
    llama, config, labeled, unlabeled
):
    seen = []

    class Watch(PseudoLabelingCallback):
        def threshold(self, scores):
            seen.append(scores)
            return super().threshold(scores)

    trainer = SSRMTrainer(
        llama,
        config(num_rounds=1, num_train_epochs=10, target_precision=0.8),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        calibration_dataset=Dataset.from_list(preference_rows(80, seed=9)),
        callbacks=[Watch()],
    )
    trainer.train()
    threshold = trainer.round_history[0]["precision_threshold"]
    pseudo_labels, facts = trainer.run.read_pseudo_labels(1)
    assert facts["confidence_threshold"] == threshold < 1
    assert sorted(pseudo_labels["pair"]) == np.flatnonzero(seen[0].confidence > threshold).tolist() != []
    # All of them are trained on, whatever `confidence_threshold` is.
    assert trainer.round_history[1]["num_train_pairs"] == 16 + facts["kept"]


def test_target_that_the_held_out_labels_do_not_reach_selects_nothing(llama, config, labeled, unlabeled):
    # Labels of chance.
    rows = preference_rows(60, seed=9)
    turned = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if number % 2 else row
        for number, row in enumerate(rows)
    ]
    trainer = SSRMTrainer(
        llama,
        config(target_precision=0.9, num_train_epochs=1),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        calibration_dataset=Dataset.from_list(turned),
    )
    trainer.train()
    assert trainer.termination_reason == "nothing_selected"
    assert trainer.round_history[0]["precision_threshold"] == 1.0


def test_target_precision_is_refused_where_a_callback_scores_the_pool(make_trainer, held_out):
    with pytest.raises(ValueError, match="a callback with a `score` of its own labels the pool here"):
        make_trainer(target_precision=0.7, calibration_dataset=held_out, callbacks=[Fixed(LOGITS)])


def test_length_bias_is_logged(kept_by):
    trainer, pseudo_labels, facts = kept_by(LOGITS)
    lengths, pairs = trainer.data.pool.pairs.lengths, trainer.data.pool.pairs
    longer = (lengths[pairs.first] - lengths[pairs.second]) * np.sign(LOGITS) > 0
    kept = pseudo_labels["pair"][:]
    assert facts["chosen_longer"] == pytest.approx(longer[kept].mean())
    assert facts["chosen_longer_in_pool"] == pytest.approx(longer.mean())


def test_memory_of_labeling_a_pool_from_files_is_that_of_a_few_numbers_a_pair(llama, config, labeled, tmp_path):
    def peak(num_rows: int) -> int:
        path = str(tmp_path / f"{num_rows}.parquet")
        Dataset.from_list(preference_rows(num_rows, seed=2)).to_parquet(path)
        trainer = SSRMTrainer(
            llama,
            config(output_dir=str(tmp_path / str(num_rows)), num_rounds=1),
            train_dataset=labeled,
            unlabeled_dataset=Dataset.from_parquet(path, cache_dir=str(tmp_path)),
            callbacks=[Fixed(np.linspace(1, 2, num_rows))],
        )
        trainer.round_history = [{"temperature": 1.0, "global_step": 0}]
        tracemalloc.start()
        try:
            trainer.begin_labeling()
            share = trainer.share_of_pool(1)
            scores = trainer.score(share)
            trainer.keep(share, scores, trainer.pseudo_labeling_callback.kept(scores))
            rows = join(trainer.data.labeled, trainer.rows_of(trainer.read_labels()))
            assert len(rows) == len(labeled) + num_rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(5000) - peak(2000) < 3000 * 250


class Chance(PseudoLabelingCallback):
    """Labels of chance, other ones each round."""

    def score(self, trainer, pool, round):
        return PairScores(np.random.default_rng(round).normal(size=len(pool)) * 5)


def test_weight_of_a_collator_of_the_user_counts(llama, config, labeled, unlabeled):
    args = config(num_rounds=1, confidence_threshold=0.5)
    collator = ConfidenceFilteredDataCollator(0, confidence_threshold=0.5, pseudo_label_weight=0.25)
    trainer = SSRMTrainer(
        llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled, data_collator=collator, callbacks=[Chance()]
    )
    weights, collate = set(), collator.torch_call

    def watch(examples):
        batch = collate(examples)
        # A batch of round 0 has labeled pairs alone, and TRL's keys.
        weights.update(batch["weight"].tolist() if "weight" in batch else [])
        return batch

    collator.torch_call = watch
    trainer.train()
    assert weights == {1.0, 0.25}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_precision": 0.9}, "`target_precision` needs held-out labels; give `calibration_dataset`"),
        ({"target_precision": 0.9, "num_folds": 2}, "held-out labels of 16 prompts can confirm 0.855 at most"),
        ({"keep_best_round": True}, "`keep_best_round` compares the rounds on held-out labels"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(llama, config, labeled, unlabeled, settings, message):
    with pytest.raises(ValueError, match=message):
        SSRMTrainer(llama, config(**settings), train_dataset=labeled, unlabeled_dataset=unlabeled)
