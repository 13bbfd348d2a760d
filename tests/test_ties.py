import json
import math

import numpy as np
import pytest
import torch
from conftest import preference_rows, weights_of
from datasets import Dataset, IterableDataset
from trl import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference

from trl_ssrm import ConfidenceFilteredDataCollator, SSRMTrainer
from trl_ssrm import evaluate as evaluate_model
from trl_ssrm.cli.commands import evaluate
from trl_ssrm.cli.parser import make_parser as command_parser
from trl_ssrm.cli.train import make_parser, make_trainer
from trl_ssrm.data.ties import ties_of
from trl_ssrm.rounds.label import join, label, training_rows
from trl_ssrm.rounds.run_data import report_contradictions
from trl_ssrm.rounds.run_directory import PRETRAINED
from trl_ssrm.scoring.pair_scores import PairScores


def with_ties(rows: list[dict], ties: list[int]) -> list[dict]:
    return [{**row, "tie": number in ties} for number, row in enumerate(rows)]


def exchanged(rows: list[dict]) -> list[dict]:
    """The same, with the two completions of each tie in the other order."""
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} if row["tie"] else row for row in rows]


def collate(trainer):
    trainer._set_signature_columns_if_needed()
    return lambda rows: trainer.data_collator(
        [{name: value for name, value in row.items() if name in trainer._signature_columns} for row in rows]
    )


def loss_of(trainer, row: int) -> float:
    trainer.model.eval()
    with torch.no_grad():
        inputs = trainer._prepare_inputs(collate(trainer)([trainer.train_dataset[row]]))
        return trainer.compute_loss(trainer.model, inputs).item()


def expected_loss(logit: float, is_tie: bool) -> float:
    right, wrong = -math.log(1 / (1 + math.exp(-logit))), -math.log(1 / (1 + math.exp(logit)))
    return (right + wrong) / 2 if is_tie else right


def rewards_of(trainer, row: int) -> list[float]:
    ids = [trainer.train_dataset[row][name] for name in ("chosen_ids", "rejected_ids")]
    with torch.no_grad():
        return [trainer.model(input_ids=torch.tensor([each])).logits.item() for each in ids]


# ---- Training ----


@pytest.mark.parametrize("has_pool", [True, False])
def test_loss_of_a_tie_is_that_of_the_target_one_half(llama, config, unlabeled, has_pool):
    train = Dataset.from_list(with_ties(preference_rows(8), [1, 2]))
    pool = {"unlabeled_dataset": unlabeled} if has_pool else {}
    trainer = SSRMTrainer(llama, config(), train_dataset=train, **pool)
    with torch.no_grad():
        trainer.model.score.weight.mul_(50)
    for row in range(3):
        chosen, rejected = rewards_of(trainer, row)
        assert abs(chosen - rejected) > 0.05
        assert loss_of(trainer, row) == pytest.approx(expected_loss(chosen - rejected, row > 0), rel=1e-4)


def test_loss_of_a_tie_of_a_pairwise_model(causal, pairwise_config, unlabeled):
    train = Dataset.from_list(with_ties(preference_rows(8), [1, 2]))
    for orders in ("both", "random"):
        config = pairwise_config(comparison_orders=orders)
        trainer = SSRMTrainer(causal("untied"), config, train_dataset=train, unlabeled_dataset=unlabeled)
        losses = [expected_loss(logit, True) for logit in rewards_of(trainer, 1)]
        if orders == "both":
            losses = [sum(losses) / 2]
        assert min(abs(loss_of(trainer, 1) / loss - 1) for loss in losses) < 1e-4
        labels = [0.5] if orders == "random" else [0.5, 0.5]
        assert collate(trainer)([trainer.train_dataset[1]])["label"].tolist() == labels
        assert 0.5 not in collate(trainer)([trainer.train_dataset[0]])["label"].tolist()


def test_order_of_a_tie_has_no_influence(llama, config):
    rows = with_ties(preference_rows(8), [1, 2, 5])
    weights = []
    for each in (rows, exchanged(rows)):
        args = RewardConfig(
            config().output_dir, bf16=False, use_cpu=True, max_steps=3, report_to="none", learning_rate=1e-3
        )
        trainer = SSRMTrainer(llama, args, train_dataset=Dataset.from_list(each))
        trainer.train()
        weights.append(weights_of(trainer.model))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=2e-5)


def test_column_without_a_tie_changes_nothing(llama, config, labeled):
    weights = []
    for rows in (labeled, labeled.add_column("tie", [None, False] * 8)):
        trainer = SSRMTrainer(llama, config(max_steps=3), train_dataset=rows)
        assert type(trainer.data_collator) is DataCollatorForPreference
        trainer.train()
        weights.append(weights_of(trainer.model))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_tie_keeps_its_target_beside_hard_and_weighted_pseudo_labels(make_trainer):
    trainer = make_trainer(train_dataset=with_ties(preference_rows(4, seed=1), [0]), pseudo_label_weight=0.3)
    scores = PairScores(np.linspace(-3, 3, 40))
    pseudo = training_rows(label(scores, np.arange(40), scores.confidence > 0.6), trainer.data.pool)
    rows = join(trainer.data.labeled, pseudo)
    assert rows["tie"][:5] == [True, False, False, False, False]
    batch = collate(trainer)([rows[0], rows[1], rows[4]])
    assert batch["label"].tolist() == [0.5, 1.0, 1.0] and batch["weight"].tolist() == pytest.approx([1.0, 1.0, 0.3])


def test_collator_keeps_a_tie_whatever_the_threshold():
    collator = ConfidenceFilteredDataCollator(pad_token_id=0, confidence_threshold=0.8)
    tie = {"chosen_ids": [1], "rejected_ids": [2], "tie": True}
    batch = collator([tie, {**tie, "tie": None}, {**tie, "tie": False, "probability": 0.7}])
    assert batch["label"].tolist() == [0.5, 1.0] and batch["weight"].tolist() == [1.0, 1.0]


def test_collator_that_would_not_see_ties_is_refused(llama, config):
    train = Dataset.from_list(with_ties(preference_rows(4), [1]))
    with pytest.raises(ValueError, match="`train_dataset` has ties, which `data_collator` would not see"):
        SSRMTrainer(llama, config(), train_dataset=train, data_collator=DataCollatorForPreference(pad_token_id=0))


# ---- Held-out figures ----


def test_ties_are_left_out_of_held_out_figures_and_counted(make_trainer, caplog):
    held_out = preference_rows(12, seed=3)
    calibration = preference_rows(9, seed=4)
    with_some = make_trainer(
        eval_dataset=with_ties(held_out, [0, 5]), calibration_dataset=with_ties(calibration, [8]), num_rounds=0
    )
    assert "2 of the 12 pairs of `eval_dataset` are ties. They are left out of its figures." in caplog.text
    assert "longer than" not in caplog.text
    with_some.train()
    facts = with_some.round_history[0]
    assert facts["eval_pairs"] == 10 and facts["calibration_pairs"] == 8
    rest = [row for number, row in enumerate(held_out) if number not in (0, 5)]
    scores = with_some.score_pairs(with_some.data.held_out["eval"], "eval")
    without = make_trainer(
        eval_dataset=rest,
        calibration_dataset=calibration[:8],
        num_rounds=0,
        output_dir=with_some.args.output_dir + "2",
    )
    without.train()
    for name, value in without.round_history[0].items():
        assert facts[name] == value, name
    assert facts["eval_accuracy"] == float((scores.logits > 0).mean())
    # The evaluation of TRL follows the same rule, also of pairs that are given to it.
    assert with_some.evaluate()["eval_loss"] == pytest.approx(without.evaluate()["eval_loss"])
    again = with_some.evaluate(Dataset.from_list(with_ties(held_out, [0, 5])))
    assert again["eval_loss"] == pytest.approx(without.evaluate()["eval_loss"])


def test_ties_of_an_evaluation_named_train_are_left_out(llama, config):
    rows = with_ties(preference_rows(6), [1, 2])
    data = Dataset.from_list(rows)
    trainer = SSRMTrainer(llama, config(), train_dataset=data, eval_dataset={"train": data})
    assert len(trainer.train_dataset) == 6 and len(trainer.eval_dataset["train"]) == 4


def test_ties_are_left_out_of_cross_fitted_figures(make_trainer):
    trainer = make_trainer(
        train_dataset=with_ties(preference_rows(9, seed=1), [2, 7]),
        num_folds=3,
        num_rounds=0,
        pretrain_on_pool=False,
    )
    trainer.train()
    logits = trainer.folds.held_out_logits(trainer.start)
    assert len(logits) == 7 and trainer.round_history[0]["cross_fit_pairs"] == 7
    assert trainer.round_history[0]["cross_fit_accuracy"] == float((logits > 0).mean())


def test_evaluate_command_leaves_ties_out(llama, tmp_path, capsys, caplog):
    path = tmp_path / "test.csv"
    rows = preference_rows(6)
    lines = ["prompt,chosen,rejected,tie"]
    for number, row in enumerate(rows):
        lines.append(f"{row['prompt']},{row['chosen']},{row['rejected']},{'True' if number < 2 else ''}")
    path.write_text("\n".join(lines))
    args = command_parser().parse_args(["evaluate", "--model_name_or_path", llama, "--dataset_name", str(path)])
    evaluate(args)
    assert f"2 of the 6 pairs of `{path}` are ties" in caplog.text and "| 4 |" in capsys.readouterr().out
    rows = [{**row, "tie": number < 2} for number, row in enumerate(rows)]
    assert evaluate_model(llama, Dataset.from_list(rows)).metrics["all"]["num_rows"] == 4


def test_ties_of_the_pool_are_no_gold_labels(make_trainer):
    rows = [{**row, "tie": number % 2 == 0} for number, row in enumerate(preference_rows(12, seed=5))]
    trainer = make_trainer(unlabeled_dataset=Dataset.from_list(rows), track_pseudo_label_accuracy=True, num_rounds=1)
    trainer.train()
    kept = trainer.run.read_pseudo_labels(1)[0]
    gold = {row["prompt"]: row["chosen"] for row in rows if not row["tie"]}
    right = [row["chosen"] == gold[row["prompt"]] for row in kept if row["prompt"] in gold]
    assert 0 < len(right) < len(kept) and trainer.round_history[1]["pseudo_label_accuracy"] == np.mean(right)


# ---- A run ----


@pytest.mark.parametrize("kind", ["scalar", "pairwise"])
def test_run_with_ties_from_a_file(kind, llama, causal, tmp_path, monkeypatch):
    rows = with_ties(preference_rows(12, seed=1), [1, 4, 11])
    path, pool = tmp_path / "labels.csv", tmp_path / "pool.jsonl"
    lines = ["prompt,chosen,rejected,tie"]
    lines += [f"{row['prompt']},{row['chosen']},{row['rejected']},{str(row['tie']).lower()}" for row in rows]
    path.write_text("\n".join(lines))
    # The pool's own ties say nothing.
    pool.write_text("\n".join(json.dumps({**row, "tie": "?"}) for row in preference_rows(10, seed=2)))
    model = llama if kind == "scalar" else causal("untied")
    argv = ["--model_name_or_path", model, "--dataset_name", str(path), "--unlabeled_dataset_name", str(pool)]
    argv += ["--output_dir", str(tmp_path / kind), "--preference_model", kind, "--max_length", "256", "--use_cpu"]
    argv += ["--bf16", "False", "--report_to", "none", "--num_train_epochs", "1", "--save_strategy", "no"]
    argv += ["--gradient_checkpointing", "False", "--num_folds", "2"]
    argv += ["--pseudo_label_type", "hard", "--confidence_threshold", "0.5"]
    parsed, _ = make_parser().parse(argv)
    trainer = make_trainer(*parsed)
    # Of each training: the round, the number of pairs, and the batches.
    seen = []
    call, train_once = trainer.data_collator.torch_call, trainer.train_once

    def record_training(*args):
        seen.append((trainer.round, len(trainer.train_dataset), []))
        train_once(*args)

    def record(examples):
        seen[-1][2].append(call(examples))
        return seen[-1][2][-1]

    monkeypatch.setattr(trainer, "train_once", record_training)
    monkeypatch.setattr(trainer.data_collator, "torch_call", record)
    trainer.train()
    assert trainer.termination_reason == "max_rounds"
    facts = trainer.round_history[0]
    assert facts["cross_fit_pairs"] == 9
    # The share of labels that pretraining is judged by.
    assert (9 * facts["pretraining_share_right"]) % 1 == pytest.approx(0, abs=1e-9)
    ties_seen = {(round, size): 0 for round, size, _ in seen}
    for round, size, batches in seen:
        ties_seen[round, size] += sum(int(batch["label"].eq(0.5).sum()) for batch in batches if "label" in batch)
    pretraining, first, second = ties_seen.pop((PRETRAINED, 10)), ties_seen.pop((0, 12)), ties_seen.pop((1, 22))
    assert (pretraining, first, second) == (0, 3, 3)
    # Each tie is left out by one of the two fold models. Those of a pairwise model, which has no linear one, compare both starts.
    both_starts = kind == "pairwise" and facts["pretraining_share_right"] > 0.5
    assert sum(ties_seen.values()) == 3 * (2 if both_starts else 1)


def test_run_with_other_ties_is_another_run(make_trainer):
    rows = preference_rows(8, seed=1)
    identities = [
        make_trainer(train_dataset=each, num_rounds=0).identity["train_dataset"]
        for each in (rows, with_ties(rows, []), with_ties(rows, [1]), with_ties(rows, [2]))
    ]
    assert identities[0] == identities[1] and len(set(identities)) == 3
    trainer = make_trainer(train_dataset=with_ties(rows, [1]), num_rounds=0)
    trainer.train()
    with pytest.raises(ValueError, match="train_dataset"):
        make_trainer(train_dataset=with_ties(rows, [2]), num_rounds=0).train(resume_from_checkpoint=True)


def test_tie_has_no_opposite_label(make_trainer, caplog):
    rows = preference_rows(4, seed=1)
    tie = with_ties(rows[:1], [0])
    trainer = make_trainer(train_dataset=[*tie, *exchanged(tie), *with_ties(rows[1:], [])])
    assert "opposite labels" not in caplog.text
    report_contradictions(trainer.data.labeled_pairs, "train_dataset")
    assert "opposite labels" in caplog.text


# ---- Refusals ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["yes", None], "`tie` of row 0 of `d` is 'yes'; make it true, false or missing"),
        ([None, 1], "`tie` of row 1 of `d` is 1;"),
        ([0.0, 1.0], "`tie` of row 0 of `d` is 0.0;"),
    ],
)
def test_value_that_is_neither_true_nor_false_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ties_of(Dataset.from_dict({"tie": values}), "d")


def test_margin_of_a_tie_is_refused(llama, config):
    rows = [{**row, "margin": float(row["tie"])} for row in with_ties(preference_rows(3), [2])]
    with pytest.raises(ValueError, match="`margin` of row 2 of `train_dataset` is 1.0, but the pair is a tie"):
        SSRMTrainer(llama, config(), train_dataset=Dataset.from_list(rows))


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset", "calibration_dataset"])
def test_nothing_but_ties_is_refused(make_trainer, name):
    rows = with_ties(preference_rows(3, seed=5), [0, 1, 2])
    with pytest.raises(ValueError, match=f"Every pair of `{name}` is a tie"):
        make_trainer(**{name: rows})


def test_stream_with_ties_is_refused(llama, config):
    stream = IterableDataset.from_generator(lambda: iter(with_ties(preference_rows(3), [1])))
    with pytest.raises(ValueError, match="`train_dataset` is a stream, whose `tie` is not read"):
        SSRMTrainer(llama, config(max_steps=1), train_dataset=stream)


def test_word_in_a_file_that_is_no_truth_is_refused(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("prompt,chosen,rejected,tie\np,a,b,\nq,c,d,maybe\n")
    argv = ["--model_name_or_path", "x", "--dataset_name", str(path), "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="Row 1 of .*labels.csv has 'maybe' in the column `tie`; write true or false"):
        make_trainer(*make_parser().parse(argv)[0])
