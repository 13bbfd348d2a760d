import runpy
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import preference_rows
from datasets import Dataset
from recipe_runs import RECIPES, run_recipe

from trl_ssrm import PairScores


# Its functions, as if it were imported.
policies = SimpleNamespace(**runpy.run_path(str(RECIPES / "selection_policies.py")))


def logits_of(confidence: np.ndarray) -> np.ndarray:
    """Positive pair logits with these confidences."""
    return np.log(confidence / (1 - confidence))


def test_threshold_follows_the_model():
    unsure, sure = PairScores(np.linspace(0.1, 0.9, 9)), PairScores(np.linspace(2.6, 3.4, 9))
    policy = policies.follows_the_model(momentum=0.5)
    first = unsure.confidence.mean()
    assert np.array_equal(policy(unsure), unsure.confidence > first)
    second = 0.5 * first + 0.5 * sure.confidence.mean()
    # Between the two means, so all of the sure pairs are above it.
    assert policy(sure).all() and unsure.confidence.max() < second < sure.confidence.min()
    # Their mean is 0.013 above the last threshold, and the average of the two is 0.0065 above it.
    near = PairScores(logits_of(second + np.array([0.0, 0.009, 0.03])))
    assert policy(near).tolist() == [False, True, True]


def test_each_policy_has_a_threshold_of_its_own():
    sure = PairScores(np.array([3.0, 4.0]))
    policies.follows_the_model()(PairScores(np.zeros(2)))
    assert policies.follows_the_model()(sure).tolist() == [False, True]


def test_no_group_gets_more_than_its_share():
    draw = np.random.default_rng(0)
    groups = draw.choice(3, size=900, p=[0.5, 0.3, 0.2])
    confidence = draw.random(900) / 2 + 0.5
    # Nearly all of the selected pairs are of the last group.
    mask = (groups == 2) | (draw.random(900) < 0.1)
    kept = policies.within_share(mask, confidence, groups)
    assert not (kept & ~mask).any()
    for group in range(3):
        share = (groups == group).mean()
        assert kept[groups == group].sum() <= np.ceil(share * mask.sum())
    left_out = mask & ~kept & (groups == 2)
    assert left_out.any() and confidence[left_out].max() <= confidence[kept & (groups == 2)].min()


def test_pool_that_is_kept_as_a_whole_has_the_shares_of_the_pool():
    groups = np.array([0, 0, 1, 2, 2, 2])
    assert policies.within_share(np.ones(6, dtype=bool), np.linspace(0.5, 1, 6), groups).all()


def test_groups_keep_their_most_confident_pairs():
    groups = np.array([0, 0, 0, 1, 1, 1])
    confidence = np.array([0.6, 0.9, 0.7, 0.8, 0.95, 0.55])
    mask = np.array([True, True, True, False, True, False])
    # Four pairs, two for each half of the pool.
    assert policies.within_share(mask, confidence, groups).tolist() == [False, True, True, False, True, False]


def test_sources_are_looked_up_by_the_rows_of_the_pairs():
    source_of_row = np.array(["web", "unused", "books"])
    confidence = np.array([0.9, 0.95, 0.85, 0.99, 0.6, 0.6])
    scores = PairScores(logits_of(confidence), rows=np.array([0, 0, 0, 0, 2, 2]))
    # Four pairs are above the threshold, all of them from the source that has two thirds of the pool.
    assert policies.quota_by_source(scores, source_of_row).tolist() == [True, True, False, True, False, False]
    assert policies.quota_by_source(scores, np.array(["web"] * 3)).tolist() == [True] * 4 + [False] * 2
    assert policies.quota_by_source(scores, source_of_row, threshold=0.97).sum() == 1


def test_no_range_of_length_differences_gets_more_than_its_share():
    draw = np.random.default_rng(0)
    # Types of a pool, whose differences would overflow.
    lengths = draw.integers(1, 250, size=(2000, 2)).astype(np.uint8)
    difference = lengths[:, 0].astype(int) - lengths[:, 1]
    # The longer the first completion, the surer the model that it is better.
    logits = difference / 50 + draw.normal(size=2000)
    scores = PairScores(logits, lengths=lengths)
    above, kept = scores.confidence > 0.8, policies.quota_by_length(scores)
    assert not (kept & ~above).any()
    more = np.where(logits > 0, difference, -difference)
    is_longest = more > np.quantile(more, 0.8)
    assert is_longest[above].mean() > 0.3
    assert 0 < is_longest[kept].sum() <= np.ceil(above.sum() / 5)
    # The shortest are fewer than their share, and all of them stay.
    assert np.array_equal(kept[more < 0], above[more < 0])


def test_exchanging_the_completions_changes_no_selection_by_length():
    draw = np.random.default_rng(1)
    lengths, logits = draw.integers(1, 100, size=(500, 2)), draw.normal(size=500) * 3
    kept = policies.quota_by_length(PairScores(logits, lengths=lengths))
    assert 0 < kept.sum() < (PairScores(logits).confidence > 0.8).sum()
    assert np.array_equal(kept, policies.quota_by_length(PairScores(-logits, lengths=lengths[:, ::-1])))


def test_of_several_completions_the_best_is_kept_against_the_worst():
    rewards = {0: [0.3, -2.0, 1.5, 0.1], 1: [1.0, 0.9, 0.8], 2: [5.0, -5.0]}
    pairs = [
        (row, first, second)
        for row, values in rewards.items()
        for first in range(len(values))
        for second in range(first + 1, len(values))
    ]
    logits = np.array([rewards[row][first] - rewards[row][second] for row, first, second in pairs])
    scores = PairScores(logits, rows=np.array([row for row, _, _ in pairs]))
    kept = policies.best_against_worst(scores, np.arange(3))
    assert [pair for pair, is_kept in zip(pairs, kept, strict=True) if is_kept] == [(0, 1, 2), (1, 0, 2), (2, 0, 1)]
    sure = policies.best_against_worst(scores, np.arange(3), threshold=0.9)
    assert [pair for pair, is_kept in zip(pairs, sure, strict=True) if is_kept] == [(0, 1, 2), (2, 0, 1)]


@pytest.mark.parametrize("prompt_of_row", [np.array([1, 0, 1]), np.array(["one", "other", "one"])], ids=["int", "str"])
def test_rows_with_one_prompt_give_one_pair(prompt_of_row):
    scores = PairScores(np.array([1.0, -3.0, 2.0]), rows=np.array([0, 1, 2]))
    assert policies.best_against_worst(scores, prompt_of_row).tolist() == [False, True, True]


def test_ties_are_no_best_pair():
    scores = PairScores(np.zeros(3), rows=np.array([0, 0, 1]))
    assert not policies.best_against_worst(scores, np.arange(2)).any()


# ---- The recipe ----


@pytest.fixture
def settings(llama, tmp_path) -> dict:
    """A run on labeled pairs, and a pool of three completions a prompt from two sources."""
    for name, rows in (
        ("pairs/train", preference_rows(16, seed=1)),
        ("pool/train", [pool_row(number) for number in range(20)]),
    ):
        (tmp_path / name).parent.mkdir()
        Dataset.from_list(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
    return {
        "model_name_or_path": llama,
        "dataset_name": tmp_path / "pairs",
        "unlabeled_dataset_name": tmp_path / "pool",
        "output_dir": tmp_path / "run",
        "num_labeled": 16,
        "num_train_epochs": 6,
        "num_rounds": 1,
        "learning_rate": 3e-3,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
    }


def pool_row(number: int) -> dict:
    one, other = preference_rows(2, seed=100 + number)
    completions = [one["chosen"], one["rejected"], other["chosen"]]
    return {"prompt": f"Say {number}: ", "completions": completions, "source": "web" if number % 4 else "books"}


def pseudo_labels(settings: dict) -> Dataset:
    (path,) = settings["output_dir"].rglob("pseudo_labels.parquet")
    return Dataset.from_parquet(str(path))


def test_recipe_trains_on_one_pair_a_prompt(settings):
    run_recipe("selection_policies", **settings, policy="best_against_worst")
    kept = pseudo_labels(settings)
    assert 10 < len(kept) == len(set(kept["prompt"]))
    assert (settings["output_dir"] / "model.safetensors").is_file()


# The fold models select with the same policy.
@pytest.mark.parametrize(
    ("policy", "num_folds"), [("follows_the_model", 0), ("quota_by_length", 0), ("quota_by_source", 2)]
)
def test_recipe_trains_with_each_policy(policy, num_folds, settings):
    run_recipe("selection_policies", **settings, policy=policy, source_column="source", num_folds=num_folds)
    assert (settings["output_dir"] / "model.safetensors").is_file()
    assert 0 < len(pseudo_labels(settings)) < 60


def test_recipe_names_the_columns_if_the_source_is_none_of_them(settings):
    with pytest.raises(
        SystemExit, match="Set `source_column` to a column of the pool; it has prompt, completions, source"
    ):
        run_recipe("selection_policies", **settings, policy="quota_by_source", source_column="domain")
