import itertools

import numpy as np
import pytest
import torch
from conftest import (
    as_messages,
    preference_rows,
    run_script,
)
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from trl_ssrm import (
    Comparison,
    PairwiseJudge,
    PseudoLabelingCallback,
    SSRMTrainer,
    load_pairwise_model,
)
from trl_ssrm.rounds.run_directory import INITIAL
from trl_ssrm.scoring.preference import orders_agree, pairwise_logits


CONVERSATION = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]


def reference_probability(path: str, prompt: list, first: str, second: str, add_generation_prompt: bool) -> float:
    """Scoring as the paper's code is described: the two letters' logits behind the prompt, both orders, temperature 1."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    context = "\n\n" + "".join(f"<turn> {message['role']}\n {message['content']}\n" for message in prompt)
    probabilities = []
    for a, b in ((first, second), (second, first)):
        text = f"[CONTEXT] {context} [RESPONSE A] {a} [RESPONSE B] {b} \n"
        if tokenizer.chat_template is None:
            ids = tokenizer(text, return_tensors="pt")
            letters = [tokenizer(text + letter)["input_ids"][-1] for letter in "AB"]
        else:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=add_generation_prompt,
                return_tensors="pt",
                return_dict=True,
            )
            rendered = tokenizer.decode(ids["input_ids"][0])
            letters = [tokenizer(rendered + letter, add_special_tokens=False)["input_ids"][-1] for letter in "AB"]
        with torch.inference_mode():
            logits = model(**ids).logits[0, -1]
        probabilities.append(logits[letters].softmax(dim=0))
    return ((probabilities[0][0] + probabilities[1][1]) / 2).item()


def pairs(num_pairs: int) -> tuple[list, list]:
    rows = [as_messages(row) for row in preference_rows(num_pairs, seed=7)]
    prompts = [[*CONVERSATION[: 2 * (number % 2)], *row["prompt"]] for number, row in enumerate(rows)]
    return prompts, [(row["chosen"], row["rejected"]) for row in rows]


# ---- What the model reads and answers ----


def test_default_comparison_is_that_of_the_released_code():
    context = "\n\n<turn> user\n Hi\n<turn> assistant\n Yo\n<turn> user\n Bye\n"
    expected = f"[CONTEXT] {context} [RESPONSE A] one [RESPONSE B] two \n"
    assert Comparison().render(CONVERSATION, "one", "two") == expected


@pytest.mark.parametrize("kind", ["untied", "tied", "sharded", "neox", "plain"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_probabilities_are_those_of_the_reference_scoring(causal, kind, add_generation_prompt):
    prompts, completions = pairs(6)
    judge = PairwiseJudge(causal(kind), comparison=Comparison(add_generation_prompt=add_generation_prompt))
    found = judge.judge(prompts, completions)
    expected = [
        reference_probability(causal(kind), prompt, one[0]["content"], other[0]["content"], add_generation_prompt)
        for prompt, (one, other) in zip(prompts, completions, strict=True)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(found) > 0.001


def test_label_is_the_token_that_it_is_behind_the_prompt(causal):
    tokenizer = AutoTokenizer.from_pretrained(causal("prefix"))
    alone = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in "AB"]
    behind = [tokenizer("<|assistant|>" + label, add_special_tokens=False)["input_ids"][-1:] for label in "AB"]
    assert alone != behind
    assert [[token] for token in Comparison().label_token_ids(tokenizer)] == behind
    model, info = AutoModelForCausalLM.from_pretrained(causal("prefix")), load_pairwise_model
    score = info(causal("prefix"), Comparison().label_token_ids(tokenizer)).score.weight
    rows = model.get_output_embeddings().weight
    torch.testing.assert_close(score[0], rows[behind[0][0]] - rows[behind[1][0]])


def test_exchanging_the_completions_turns_the_probability_round(causal):
    prompts, completions = pairs(20)
    judge = PairwiseJudge(causal())
    exchanged = [(second, first) for first, second in completions]
    np.testing.assert_allclose(
        np.add(judge.judge(prompts, completions), judge.judge(prompts, exchanged)), 1, atol=1e-6
    )
    assert judge.judge(["x"], [("same", "same")]) == [0.5]


def test_both_orders_enter_as_the_mean_of_their_probabilities():
    scores = np.array([[2.0, -1.0], [0.0, 0.0], [1.0, 1.0], [900.0, -900.0], [3.0, 0.5]])
    sigmoid = 1 / (1 + np.exp(-np.clip(scores, -700, 700)))
    expected = (sigmoid[:, 0] + 1 - sigmoid[:, 1]) / 2
    np.testing.assert_allclose(1 / (1 + np.exp(-pairwise_logits(scores))), expected, atol=1e-12)
    assert (pairwise_logits(scores[:, ::-1]) == -pairwise_logits(scores)).all()
    assert orders_agree(scores).tolist() == [True, True, False, True, False]


def test_oldest_turns_are_left_out_first_and_answers_never_cut(causal):
    tokenizer = AutoTokenizer.from_pretrained(causal())
    long = [{"role": "user", "content": "old " * 10}, {"role": "assistant", "content": "older"}, CONVERSATION[-1]]
    whole, _ = Comparison().tokenize(tokenizer, long, "one", "three")
    for max_length, left in ((len(whole), 3), (len(whole) - 1, 2), (10, 1)):
        one, other = Comparison(max_length=max_length).tokenize(tokenizer, long, "one", "three")
        assert one == Comparison().encode(tokenizer, long[3 - left :], "one", "three")
        assert other == Comparison().encode(tokenizer, long[3 - left :], "three", "one")


def test_template_and_labels_are_settings(causal):
    tokenizer = AutoTokenizer.from_pretrained(causal())
    comparison = Comparison(
        template="{{ messages[-1].content }}: {{ responses | join(' or ') }}? {{ labels | join('/') }}",
        labels=["1", "2"],
    )
    assert comparison.render(CONVERSATION, "x", "y") == "Bye: x or y? 1/2"
    assert comparison.label_token_ids(tokenizer) == tuple(tokenizer("12", add_special_tokens=False)["input_ids"])


def test_template_does_not_run_code():
    with pytest.raises(ValueError, match="The template of the comparison can't be rendered"):
        Comparison(template="{{ ''.__class__.__mro__[1].__subclasses__() }}").render(CONVERSATION, "a", "b")
    with pytest.raises(ValueError, match="can't be rendered: Encountered unknown tag"):
        Comparison(template="{% nonsense %}").render(CONVERSATION, "a", "b")


# ---- What is refused ----


def test_labels_that_are_not_one_token_each_are_refused(causal):
    tokenizer = AutoTokenizer.from_pretrained(causal())
    with pytest.raises(ValueError, match="The label 'First' is 5 tokens of this tokenizer; choose `labels`"):
        Comparison(labels=["First", "B"]).label_token_ids(tokenizer)
    with pytest.raises(ValueError, match="The labels 'A' and 'A' are the same token"):
        Comparison(labels=["A", "A"]).label_token_ids(tokenizer)


def test_comparison_that_ends_with_padding_is_refused(causal):
    tokenizer = AutoTokenizer.from_pretrained(causal())
    tokenizer.pad_token = "<|end|>"
    Comparison().label_token_ids(tokenizer)
    with pytest.raises(ValueError, match="A comparison ends with '<|end|>', which is the padding token too"):
        Comparison(add_generation_prompt=False).label_token_ids(tokenizer)


def test_encoder_is_refused(bert, config, labeled):
    with pytest.raises(ValueError, match="answers after the comparison, which BertForSequenceClassification can't"):
        PairwiseJudge(bert)
    with pytest.raises(ValueError, match="start from a causal language model"):
        SSRMTrainer(bert, config(preference_model="pairwise"), train_dataset=labeled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preference_model": "triple"}, "`preference_model` must be one of"),
        ({"preference_model": "pairwise", "center_rewards_coefficient": 0.1}, "a pairwise model gives none"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


# ---- Rounds ----


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_rounds_teach_a_pairwise_model(causal, pairwise_config, kind, tmp_path):
    rows = {seed: preference_rows(number, seed) for seed, number in ((1, 64), (2, 64), (3, 32))}
    if kind == "conversation":
        rows = {seed: [as_messages(row) for row in each] for seed, each in rows.items()}
    labeled, pool, held_out = (Dataset.from_list(rows[seed]) for seed in (1, 2, 3))
    trainer = SSRMTrainer(
        causal(),
        pairwise_config(track_pseudo_label_accuracy=True, num_train_epochs=10, round_num_train_epochs=4),
        train_dataset=labeled,
        eval_dataset=held_out,
        unlabeled_dataset=pool,
    )
    zero_shot = trainer.score_pairs(trainer.data.held_out["eval"], "eval")
    trainer.train()
    facts = trainer.round_history[1]
    assert facts["eval_accuracy"] > 0.9 > np.mean(zero_shot.logits > 0)
    assert facts["pseudo_label_accuracy"] > 0.9 and facts["kept"] > 20
    assert 0 <= facts["eval_order_disagreement"] < 0.5 and 0 <= facts["order_disagreement"] < 0.5
    trainer.save_model(str(tmp_path / "saved"))

    # The saved model is a plain sequence classifier, and a judge by its directory alone.
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(plain.score.weight, trainer.model.score.weight)
    judge = PairwiseJudge(str(tmp_path / "saved"))
    assert judge.comparison == trainer.comparison
    found = judge.judge(held_out["prompt"], [(row["chosen"], row["rejected"]) for row in held_out])
    expected = 1 / (1 + np.exp(-trainer.score_pairs(trainer.data.held_out["eval"], "eval").logits))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_both_orders_teach_that_the_order_says_nothing(
    causal, pairwise_config, labeled, unlabeled, held_out, tmp_path
):
    disagreement = {}
    for orders in ("random", "both"):
        args = pairwise_config(
            output_dir=str(tmp_path / orders), comparison_orders=orders, num_rounds=0, num_train_epochs=10
        )
        trainer = SSRMTrainer(
            causal(), args, train_dataset=labeled, eval_dataset=held_out, unlabeled_dataset=unlabeled
        )
        trainer.train()
        facts = trainer.round_history[0]
        disagreement[orders] = facts["eval_order_disagreement"]
    assert disagreement["both"] <= disagreement["random"]
    assert disagreement["both"] < 0.2 and facts["eval_accuracy"] > 0.9


def test_folds_of_a_pairwise_model_are_asked_in_both_orders(causal, pairwise_config, labeled, unlabeled):
    settings = {"num_folds": 2, "num_rounds": 0, "pretrain_on_pool": False}
    args = pairwise_config(**settings, comparison_orders="both", num_train_epochs=10)
    trainer = SSRMTrainer(causal(), args, train_dataset=labeled, unlabeled_dataset=unlabeled)
    scores, real = [], trainer.score_pairs
    trainer.score_pairs = lambda pairs, name, **kwargs: scores.append(real(pairs, name, **kwargs)) or scores[-1]
    trainer.train()
    for fold in range(2):
        assert scores[fold].orders_agree is not None
        assert np.array_equal(trainer.run.read_fold(fold, INITIAL), scores[fold].logits)


def test_pool_labels_change_nothing_for_a_pairwise_model(causal, pairwise_config, labeled, unlabeled, tmp_path):
    swapped = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if number % 3 else row
        for number, row in enumerate(unlabeled)
    ]
    weights, kept = [], []
    for name, pool in (("one", unlabeled), ("other", Dataset.from_list(swapped))):
        args = pairwise_config(output_dir=str(tmp_path / name), confidence_threshold=0.5, round_num_train_epochs=1)
        trainer = SSRMTrainer(causal(), args, train_dataset=labeled, unlabeled_dataset=pool)
        trainer.train()
        weights.append(trainer.model.score.weight.detach().clone())
        kept.append(trainer.run.read_pseudo_labels(1)[0].select_columns(["prompt", "chosen", "rejected"]).to_list())
    assert torch.equal(*weights)
    assert kept[0] == kept[1] and len(kept[0]) > 5


def test_pool_of_several_completions_gives_all_their_pairs(causal, pairwise_config, labeled):
    pool = Dataset.from_list(
        [{"prompt": f"p{n}", "completions": ["kind one", "rude two", "warm three"]} for n in range(4)]
    )
    trainer = SSRMTrainer(causal(), pairwise_config(), train_dataset=labeled, unlabeled_dataset=pool)
    assert len(trainer.data.pool) == 12 and len(trainer.data.pool.pairs.sequences) == 24
    texts = {(n, *sorted(trainer.data.pool.texts(n, True)[name] for name in ("chosen", "rejected"))) for n in range(3)}
    assert {pair[1:] for pair in texts} == set(itertools.combinations(["kind one", "rude two", "warm three"], 2))
    expected = trainer.comparison.tokenize(
        trainer.processing_class,
        *(trainer.data.pool.texts(0, True)[name] for name in ("prompt", "chosen", "rejected")),
    )
    first, second = (
        trainer.data.pool.pairs.sequences[int(side[0])]["input_ids"]
        for side in (trainer.data.pool.pairs.first, trainer.data.pool.pairs.second)
    )
    assert (first, second) == expected


def test_comparisons_that_do_not_fit_are_counted(causal, pairwise_config, labeled, unlabeled, caplog):
    rows = [*unlabeled, {"prompt": "p", "chosen": "x" * 300, "rejected": "y"}]
    SSRMTrainer(causal(), pairwise_config(), train_dataset=labeled, unlabeled_dataset=Dataset.from_list(rows))
    assert "Left out of `unlabeled_dataset`: 1 (longer than max_length=256)" in caplog.text


def test_pair_is_shown_in_one_order_whichever_is_preferred(causal, pairwise_config, labeled):
    def batch(rows: list[dict]) -> dict:
        trainer = SSRMTrainer(causal(), pairwise_config(num_rounds=0), train_dataset=Dataset.from_list(rows))
        return trainer.data_collator(list(trainer.train_dataset))

    rows = labeled.to_list()
    one = batch(rows)
    other = batch([{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows])
    assert one["input_ids"].shape[0] == 16 and set(one["label"].tolist()) == {0.0, 1.0}
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(one["label"], 1 - other["label"])


def test_policy_can_require_that_both_orders_agree(causal, pairwise_config, labeled, unlabeled):
    kept = []
    for policy in (None, lambda scores: scores.orders_agree):
        args = pairwise_config(
            output_dir=f"{pairwise_config().output_dir}-{len(kept)}",
            num_train_epochs=6,
            round_num_train_epochs=1,
            confidence_threshold=0.5,
        )
        trainer = SSRMTrainer(
            causal(),
            args,
            train_dataset=labeled,
            unlabeled_dataset=unlabeled,
            callbacks=[PseudoLabelingCallback(selection_policy=policy)],
        )
        trainer.train()
        facts = trainer.round_history[1]
        kept.append(facts["kept"])
        agreeing = round((1 - facts["order_disagreement"]) * facts["pool_size"])
    assert kept[0] == 40 > kept[1] == agreeing > 0


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "4-bit"])
def test_adapter_of_a_pairwise_model_is_a_judge(causal, pairwise_config, labeled, unlabeled, tmp_path, quantized):
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32) if quantized else None
    trainer = SSRMTrainer(
        causal(),
        pairwise_config(use_cpu=True, confidence_threshold=0.5),
        train_dataset=labeled,
        unlabeled_dataset=unlabeled,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        quantization_config=four_bit,
    )
    assert trainer.model.base_model.model.score.modules_to_save["default"].weight.abs().sum() > 0
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    judge = PairwiseJudge(str(tmp_path / "saved"))
    expected = 1 / (1 + np.exp(-trainer.score_pairs(trainer.data.labeled_pairs, "labeled").logits))
    found = judge.judge(labeled["prompt"], [(row["chosen"], row["rejected"]) for row in labeled])
    # What quantization rounds away from the base is what is different.
    np.testing.assert_allclose(found, expected, atol=0.4 if quantized else 1e-4)


def test_two_processes_keep_the_pairs_of_one(causal, tmp_path):
    settings = {"model": causal(), "preference_model": "pairwise", "dataloader_drop_last": True, "max_length": 256}
    one = run_script("run_script.py", **settings, output_dir=str(tmp_path / "one"), per_device_train_batch_size=8)
    two = run_script(
        "run_script.py",
        num_processes=2,
        **settings,
        output_dir=str(tmp_path / "two"),
        per_device_train_batch_size=4,
    )
    assert one["kept"] == two["kept"] and all(one["kept"])
