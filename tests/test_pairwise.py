import itertools
import json

import numpy as np
import pytest
import torch
from conftest import TWO_PROCESSES, as_messages, letter_rows, make_tokenizer, preference_rows, run_script
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
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
from trl_ssrm.scoring.preference import mean_win_probability, orders_agree, pairwise_logits


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONVERSATION = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]


def with_prefix_space() -> PreTrainedTokenizerFast:
    """A tokenizer of the kind of SentencePiece: alone, "A" is another token than behind other text."""
    characters = sorted({chr(code) for code in range(32, 127)} | {"\n", "▁", "é"})
    vocab = {character: index for index, character in enumerate(characters)}
    vocab |= {"▁A": len(vocab), "▁B": len(vocab) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "A"), ("▁", "B")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>")


@pytest.fixture(scope="session")
def causal(tmp_path_factory):
    """Makes directories of causal language models that were never trained, but whose logits differ."""
    made = {}

    def make(kind: str = "untied") -> str:
        if kind in made:
            return made[kind]
        directory = tmp_path_factory.mktemp(kind)
        tokenizer = (
            with_prefix_space() if kind == "prefix" else make_tokenizer(pad_token="<|pad|>", eos_token="<|eos|>")
        )
        if kind != "plain":
            tokens = ["<|user|>", "<|assistant|>", "<|end|>"]
            tokenizer.add_special_tokens({"additional_special_tokens": tokens})
            tokenizer.chat_template = CHAT_TEMPLATE
        set_seed(1)
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        shared = {**sizes, "num_attention_heads": 4, "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.1}
        if kind == "neox":
            # Another family: its output embedding has another name.
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**shared, max_position_embeddings=1024))
        else:
            model = LlamaForCausalLM(LlamaConfig(**shared, tie_word_embeddings=kind == "tied"))
        model.save_pretrained(directory, max_shard_size="100KB" if kind == "sharded" else "1GB")
        tokenizer.save_pretrained(directory)
        made[kind] = str(directory)
        return made[kind]

    return make


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
    with pytest.raises(
        ValueError, match="The label 'First' is 5 tokens of this tokenizer; choose `labels`"
    ):
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


@pytest.fixture
def pairwise_config(config):
    def make(**settings):
        return config(**{"preference_model": "pairwise", "max_length": 256, "num_rounds": 1, **settings})

    return make


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
    args = pairwise_config(
        num_folds=2,
        comparison_orders="both",
        num_train_epochs=10,
        confidence_threshold=0.5,
    )
    trainer = SSRMTrainer(causal(), args, train_dataset=labeled, unlabeled_dataset=unlabeled)
    trainer.train()
    stored = trainer.run.read_fold(0, 1)
    assert stored["orders_agree"].dtype == bool and len(stored["orders_agree"]) == len(trainer.data.pool)
    kept = trainer.run.read_pseudo_labels(1)[0]["pair"][:]
    assert len(kept) > 0
    own = trainer.run.read_pseudo_labels(1)[0]["first_is_chosen"][:]
    assert [bool(z > 0) for z in stored["pool"][kept]] == own


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
        *TWO_PROCESSES,
        **settings,
        output_dir=str(tmp_path / "two"),
        per_device_train_batch_size=4,
    )
    assert one["kept"] == two["kept"] and all(one["kept"])


# ---- The judge ----


@pytest.fixture(scope="session")
def trained_judge(causal, tmp_path_factory) -> str:
    """Directory of a pairwise model that prefers good words."""
    from trl_ssrm import SSRMConfig

    directory = str(tmp_path_factory.mktemp("judge"))
    args = SSRMConfig(
        directory,
        preference_model="pairwise",
        bf16=False,
        gradient_checkpointing=False,
        learning_rate=3e-3,
        num_train_epochs=8,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SSRMTrainer(causal(), args, train_dataset=Dataset.from_list(preference_rows(96, seed=1)))
    trainer.train()
    trainer.save_model(directory)
    return directory


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
    assert "1 of 2 comparisons are longer than 120 tokens" in caplog.text
    with pytest.raises(ValueError, match="A comparison is longer than its `max_length`, so there is no ranking"):
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
    with pytest.raises(ValueError, match="`chat_template_path` would change what a pairwise model reads"):
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
    with pytest.raises(ValueError, match="A judge has the `max_length` of its comparison"):
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
