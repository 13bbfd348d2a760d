import shutil
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


def test_threshold_that_is_left_open_is_one_that_held_out_labels_vouch_for(llama, config, labeled, unlabeled):
    def thresholds(num_calibration: int, **settings):
        rows = Dataset.from_list(preference_rows(num_calibration, seed=9)) if num_calibration else None
        args = config(confidence_threshold=None, num_rounds=1, num_train_epochs=10, **settings)
        trainer = SSRMTrainer(
            llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled, calibration_dataset=rows
        )
        trainer.train()
        shutil.rmtree(args.output_dir)
        facts = trainer.round_history[1]
        assert facts["num_train_pairs"] == 16 + facts["kept"]
        return facts["confidence_threshold"], trainer.round_history[0].get("precision_threshold")

    assert thresholds(0) == (0.8, None)
    assert thresholds(24) == (0.8, None)
    used, found = thresholds(25)
    assert used == found != 0.8
    assert thresholds(25, selected_fraction=1.0)[1] is None


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


def test_fraction_of_the_pool_is_kept_and_trained_on(kept_by):
    trainer, pseudo_labels, facts = kept_by(LOGITS, selected_fraction=0.7)
    assert sorted(pseudo_labels["pair"]) == list(range(12, 40))
    # Some of them are less confident than the 0.8 of `confidence_threshold`.
    assert trainer.round_history[1]["num_train_pairs"] == 16 + 28
    assert facts["confidence_threshold"] == pytest.approx(1 / (1 + np.exp(-abs(LOGITS[11]))))


def test_adaptive_threshold_is_the_mean_confidence(kept_by):
    _, pseudo_labels, facts = kept_by(LOGITS, adaptive_threshold=True)
    confidence = 1 / (1 + np.exp(-np.abs(LOGITS)))
    assert facts["confidence_threshold"] == pytest.approx(confidence.mean())
    assert sorted(pseudo_labels["pair"]) == np.flatnonzero(confidence > confidence.mean()).tolist()


def test_target_precision_keeps_what_the_held_out_labels_vouch_for(llama, config, labeled, unlabeled):
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


def test_target_that_the_held_out_labels_do_not_vouch_for_selects_nothing(llama, config, labeled, unlabeled):
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


@pytest.mark.parametrize("name", ["num_folds", "target_precision", "second_opinion"])
def test_scores_of_someone_else_do_not_go_with_what_needs_those_of_the_model(
    llama, config, labeled, unlabeled, held_out, name
):
    value = {"num_folds": 2, "target_precision": 0.7, "second_opinion": "first_round"}[name]
    with pytest.raises(ValueError, match=name):
        SSRMTrainer(
            llama,
            config(**{name: value}),
            train_dataset=labeled,
            unlabeled_dataset=unlabeled,
            calibration_dataset=held_out,
            callbacks=[Fixed(LOGITS)],
        )


def test_best_against_worst_is_the_most_confident_pair_of_a_prompt(kept_by):
    rows = [{"prompt": f"Say {number}: ", "completions": ["one", "two", "three"]} for number in range(4)]
    logits = [1, 2, 3, 1, 5, 4, 0.1, 0.2, 0.3, 9, 8, 7]
    pool = Dataset.from_list(rows)
    _, pseudo_labels, _ = kept_by(logits, pool=pool, max_pairs_per_prompt=1, confidence_threshold=0.5)
    assert sorted(pseudo_labels["pair"]) == [2, 4, 8, 9]


def test_quantile_is_one_of_the_best_against_worst(llama, config, labeled):
    rows = [{"prompt": f"Say {number}: ", "completions": ["one", "two", "three"]} for number in range(4)]
    logits = [1, 2, 3, 1, 5, 4, 0.1, 0.2, 0.3, 9, 8, 7]
    trainer = SSRMTrainer(
        llama,
        config(num_rounds=1, max_pairs_per_prompt=1, selected_fraction=0.5),
        train_dataset=labeled,
        unlabeled_dataset=Dataset.from_list(rows),
        callbacks=[Fixed(logits)],
    )
    trainer.train()
    assert sorted(trainer.run.read_pseudo_labels(1)[0]["pair"]) == [4, 9]


def test_kept_pairs_have_the_lengths_of_the_pool(kept_by, llama, config, labeled, unlabeled):
    pool = SSRMTrainer(llama, config(), train_dataset=labeled, unlabeled_dataset=unlabeled).data.pool
    lengths = pool.pairs.lengths
    difference = lengths[pool.pairs.first] - lengths[pool.pairs.second]
    # The model likes length, and is the surer the longer.
    logits = np.where(difference == 0, 0.1, difference)
    _, _, free = kept_by(logits, confidence_threshold=0.85)
    shutil.rmtree(config().output_dir)
    _, pseudo_labels, facts = kept_by(logits, confidence_threshold=0.85, balance_by=["length"])
    assert 0 < facts["kept"] < free["kept"]
    assert facts["mean_confidence"] < free["mean_confidence"]


def test_no_source_gets_more_than_its_share(kept_by):
    rows = [{**row, "source": "web" if number < 30 else "books"} for number, row in enumerate(preference_rows(40, 2))]
    logits = np.where(np.arange(40) < 30, 0.1, 3.0)
    logits[:5] = 2.0
    _, pseudo_labels, _ = kept_by(logits, pool=Dataset.from_list(rows), balance_by=["source"])
    kept = sorted(pseudo_labels["pair"])
    # 15 were selected; a quarter of the pool is books.
    assert kept[:5] == [0, 1, 2, 3, 4] and len(kept) == 5 + 4


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
        trainer.round_history = [{"temperature": 1.0}]
        tracemalloc.start()
        try:
            rows = trainer.pseudo_labeling_callback.on_round_end(
                trainer.args, trainer.state, trainer.control, trainer=trainer, round=0
            )
            rows = trainer.data_collator.build_dataset(trainer.data.labeled, rows)
            assert len(rows) == len(labeled) + num_rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(5000) - peak(2000) < 3000 * 250


class Chance(PseudoLabelingCallback):
    """Labels of chance, other ones each round."""

    def score(self, trainer, pool, round):
        return PairScores(np.random.default_rng(round).normal(size=len(pool)) * 5)


def test_weight_of_pseudo_labels_rises_over_the_rounds(llama, config, labeled, unlabeled):
    args = config(num_rounds=3, pseudo_label_warmup_rounds=2, pseudo_label_weight=0.8, confidence_threshold=0.5)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled, callbacks=[Chance()])
    seen = []
    build = trainer.data_collator.build_dataset
    trainer.data_collator.build_dataset = lambda *args: seen.append(build(*args)) or seen[-1]
    trainer.train()
    assert [set(rows["weight"]) for rows in seen] == [{1.0, 0.4}, {1.0, 0.8}, {1.0, 0.8}]


def test_weight_of_a_collator_of_the_user_counts(llama, config, labeled, unlabeled):
    args = config(num_rounds=1, confidence_threshold=0.5)
    collator = ConfidenceFilteredDataCollator(0, confidence_threshold=0.5, pseudo_label_weight=0.25)
    trainer = SSRMTrainer(
        llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled, data_collator=collator, callbacks=[Chance()]
    )
    seen = []
    build = collator.build_dataset
    collator.build_dataset = lambda *args: seen.append(build(*args)) or seen[-1]
    trainer.train()
    assert set(collator(seen[0].to_list())["weight"].tolist()) == {1.0, 0.25}


def test_rounds_go_on_while_the_weight_rises(llama, config, labeled, unlabeled):
    args = config(num_rounds=3, pseudo_label_warmup_rounds=3, confidence_threshold=0.5)
    logits = np.linspace(1, 2, 40)
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled, callbacks=[Fixed(logits)])
    trainer.train()
    assert trainer.termination_reason == "max_rounds"


def test_pseudo_labels_of_the_labeled_pairs_are_subtracted(llama, config, labeled, unlabeled):
    args = config(
        num_rounds=1, debias_pseudo_labels=True, num_folds=4, pseudo_label_weight=0.5, confidence_threshold=0.5
    )
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled)
    seen = []
    build = trainer.data_collator.build_dataset
    trainer.data_collator.build_dataset = lambda *args: seen.append(build(*args)) or seen[-1]
    trainer.train()
    rows, *of_folds = seen
    # Labels of 12 pairs and the pool, with the same weight.
    assert [len(each) for each in of_folds] == [12 + 40] * 4
    weight = np.array(rows["weight"])
    assert weight[:16].tolist() == [1.0] * 16
    # Together they weigh half of what the labels weigh, once with one sign and once with the other.
    assert weight[16:56].tolist() == pytest.approx([0.5 * 16 / 40] * 40)
    assert weight[56:].tolist() == [-0.5] * 16
    assert rows["chosen_ids"][:16] == rows["chosen_ids"][56:]
    # By models that have not seen the labels.
    logits = trainer.folds.held_out_logits(0)
    assert ((np.array(rows["probability"][56:]) > 0.5) == (logits > 0)).all()
    assert rows["probability"][:16] == [None] * 16 and None not in rows["probability"][16:]


def test_rounds_end_when_they_no_longer_help(llama, config, labeled, unlabeled, held_out):
    # A learning rate that wrecks the model in the rounds.
    args = config(num_rounds=9, round_patience=2, confidence_threshold=0.5, learning_rate=0.05, num_train_epochs=1)
    trainer = SSRMTrainer(
        llama,
        args,
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        eval_dataset=held_out,
        callbacks=[Chance()],
    )
    trainer.train()
    losses = [facts["eval_log_loss"] for facts in trainer.round_history]
    assert trainer.termination_reason == "no_improvement"
    assert np.argmin(losses) == len(losses) - 3 and len(losses) < 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance_by": ["source"]}, "`balance_by` names 'source', which is no column of `unlabeled_dataset`"),
        ({"target_precision": 0.9}, "`target_precision` needs `calibration_dataset` or `num_folds`"),
        ({"target_precision": 0.9, "num_folds": 2}, "the held-out labels can vouch for 0.855 at most"),
        ({"round_patience": 1}, "`round_patience` needs `calibration_dataset`, `num_folds` or `eval_dataset`"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(llama, config, labeled, unlabeled, settings, message):
    with pytest.raises(ValueError, match=message):
        SSRMTrainer(llama, config(**settings), train_dataset=labeled, unlabeled_dataset=unlabeled)
