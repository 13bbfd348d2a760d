"""Conversations are read as text, whatever form their content has, or refused with their row."""

import copy
import re
from pathlib import Path

import pytest
import trl
from conftest import CHAT_TEMPLATE, as_messages, preference_rows
from datasets import Dataset
from transformers import AutoTokenizer
from trl import RewardConfig, RewardTrainer

from trl_ssrm import (
    Comparison,
    PairwiseJudge,
    SSRMRewardFunction,
    SSRMTrainer,
    evaluate,
    generate_completions,
    label_preferences,
)
from trl_ssrm.data.conversations import ConversationReader


TURN = "{% for message in messages %}<|{{ message.role }}|>CONTENT<|end|>{% endfor %}"
# As the templates that TRL ships treat content that is a list of parts.
TEMPLATES = {
    "prints them as a list": TURN.replace("CONTENT", "{{ message.content }}"),
    "leaves them out": TURN.replace("CONTENT", "{% if message.content is string %}{{ message.content }}{% endif %}"),
    "raises": TURN.replace("CONTENT", "{{ message.content + '' }}"),
    "reads them": TURN.replace(
        "CONTENT",
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}",
    ),
}
WITHOUT_SYSTEM = TEMPLATES["prints them as a list"].replace(
    "in messages %}", "in messages if message.role != 'system' %}"
)


def conversations(num_rows: int, seed: int = 0) -> list[dict]:
    return [as_messages(row) for row in preference_rows(num_rows, seed)]


def in_parts(row: dict) -> dict:
    """The same conversation with each text as two parts."""
    return {
        name: [
            {
                **message,
                "content": [
                    {"type": "text", "text": message["content"][:3]},
                    {"type": "text", "text": message["content"][3:]},
                ],
            }
            for message in messages
        ]
        for name, messages in row.items()
    }


def with_system(row: dict) -> dict:
    return {**row, "prompt": [{"role": "system", "content": "Be kind."}, *row["prompt"]]}


def with_template(tokenizer, template: str):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def make(llama, config, tokenizer):
    """Makes trainers of rows with a chat template."""

    def make(template, train=None, pool=None, is_stream=False, **held_out):
        rows = {"train_dataset": train or conversations(4, 1), "unlabeled_dataset": pool or conversations(4, 2)}
        data = {name: Dataset.from_list(each) for name, each in {**rows, **held_out}.items()}
        if is_stream:
            data["eval_dataset"] = data["eval_dataset"].to_iterable_dataset()
        return SSRMTrainer(llama, config(), processing_class=with_template(tokenizer, template), **data)

    return make


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_text_in_parts_is_read_as_text(make, llama, policy, tokenizer, template):
    rows = [conversations(4, 1), conversations(4, 2), conversations(4, 3)]
    text, parts = (
        make(template, *data[:2], calibration_dataset=data[2])
        for data in (rows, [list(map(in_parts, own)) for own in rows])
    )
    for name in ("chosen_ids", "rejected_ids"):
        assert list(parts.data.labeled[name]) == list(text.data.labeled[name])
    assert parts.data.pool.pairs.fingerprint == text.data.pool.pairs.fingerprint
    assert parts.data.held_out["calibration"].fingerprint == text.data.held_out["calibration"].fingerprint
    reward_function = SSRMRewardFunction(llama, with_template(tokenizer, template))
    judge = PairwiseJudge(policy, comparison=Comparison(labels=["a", "b"]))
    for row, ids in zip(rows[0], text.data.labeled["chosen_ids"], strict=True):
        for each in (row, in_parts(row)):
            assert reward_function.tokenize(each["prompt"], each["chosen"]) == ids
            compared = judge.comparison.tokenize(judge.processing_class, *each.values())
            assert compared == judge.comparison.tokenize(judge.processing_class, *row.values())
    # What is stored is the row as it was.
    assert parts.data.pool.texts(0, True)["prompt"][0]["content"][0]["type"] == "text"


def test_part_that_is_no_text_is_refused_with_its_row(make, llama):
    odd = in_parts(conversations(1)[0])
    odd["chosen"][0]["content"][1] = {"type": "image", "text": None}
    words = (
        r"`chosen` of row 1 of `%s` has a message with the part .*'image'.*reads only parts with a `text`; drop the"
    )
    rows = [in_parts(conversations(1, 5)[0]), odd]
    for name in ("train", "pool"):
        argument = "unlabeled_dataset" if name == "pool" else "train_dataset"
        with pytest.raises(ValueError, match=words % argument):
            make(TEMPLATES["reads them"], **{name: rows})
    with pytest.raises(ValueError, match=words % "dataset"):
        evaluate(llama, Dataset.from_list(rows))
    with pytest.raises(ValueError, match=r"The completion of row 1 can't be tokenized \(a message has the part"):
        SSRMRewardFunction(llama).score([row["prompt"] for row in rows], [row["chosen"] for row in rows])


def test_text_that_the_template_leaves_out_is_refused_with_its_row(make, llama, policy, tokenizer, tmp_path):
    rows = [*conversations(2, 7), with_system(conversations(1, 8)[0])]
    words = (
        "Row 2 of `%s` can't be tokenized (the chat template leaves out the text of message 0, of the role 'system'"
    )
    for name, argument in (("train", "train_dataset"), ("pool", "unlabeled_dataset")):
        with pytest.raises(ValueError, match=re.escape(words % argument)):
            make(WITHOUT_SYSTEM, **{name: rows})
    # Each row of the pool gives several pairs to tokenize.
    pool = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], row["chosen"]]} for row in rows]
    with pytest.raises(ValueError, match=re.escape(words % "unlabeled_dataset")):
        make(WITHOUT_SYSTEM, pool=pool)
    with pytest.raises(ValueError, match=re.escape(words % "calibration_dataset")):
        make(WITHOUT_SYSTEM, calibration_dataset=rows)
    stream = make(WITHOUT_SYSTEM, eval_dataset=rows, is_stream=True).eval_dataset
    with pytest.raises(ValueError, match=re.escape(words % "eval_dataset")):
        list(stream)
    own = with_template(tokenizer, WITHOUT_SYSTEM)
    reward_function, dataset = SSRMRewardFunction(llama, own), Dataset.from_list(rows)
    for read in (
        lambda: evaluate(reward_function, dataset, disable_tqdm=True),
        lambda: label_preferences(reward_function, dataset, str(tmp_path / "labels"), disable_tqdm=True),
        lambda: generate_completions(
            policy,
            dataset,
            str(tmp_path / "completions"),
            processing_class=with_template(AutoTokenizer.from_pretrained(policy), WITHOUT_SYSTEM),
            max_new_tokens=1,
            disable_tqdm=True,
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(words % "dataset")):
            read()
    with pytest.raises(ValueError, match=r"The completion of row 2 can't be tokenized \(the chat template leaves out"):
        reward_function([row["prompt"] for row in rows], [row["chosen"] for row in rows])


def test_template_may_trim_cut_and_escape_text(tokenizer):
    templates = [
        TURN.replace("CONTENT", "{{ message.content | trim }}"),
        TURN.replace("CONTENT", "{{ message.content | tojson }}"),
        # Earlier reasoning is dropped on purpose.
        TURN.replace("CONTENT", "{{ message.content.split('</think>')[-1] }}"),
    ]
    messages = [{"role": "user", "content": ' "a"\n'}, {"role": "assistant", "content": "<think>b</think> c "}]
    for template in templates:
        ConversationReader(with_template(tokenizer, template)).read(messages, None, None)


SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_template_of_trl_reads_text_and_parts_alike(tokenizer, path):
    own = with_template(tokenizer, path.read_text(encoding="utf-8"))
    own.bos_token = own.eos_token
    row = conversations(1)[0]
    reader = ConversationReader(own)
    read = [reader.read(each["prompt"] + each["chosen"], None, None) for each in (row, in_parts(row))]
    one, other = (own.apply_chat_template(messages, tokenize=False, **arguments) for messages, arguments in read)
    assert one == other
    for name in ("prompt", "chosen"):
        assert row[name][0]["content"].strip() in one
        assert "'text'" not in one


def test_template_that_reads_parts_alone_is_given_parts_in_training(make, llama, tokenizer):
    template = TURN.replace("CONTENT", "{% for part in message.content %}{{ part.text }}{% endfor %}")
    trainer = make(template, pool=list(map(in_parts, conversations(4, 2))))
    expected = make(TEMPLATES["prints them as a list"])
    assert list(trainer.data.labeled["chosen_ids"]) == list(expected.data.labeled["chosen_ids"])
    assert trainer.data.pool.pairs.fingerprint == expected.data.pool.pairs.fingerprint
    row = conversations(1, 1)[0]
    ids = SSRMRewardFunction(llama, with_template(tokenizer, template)).tokenize(row["prompt"], row["chosen"])
    assert ids == expected.data.labeled["chosen_ids"][0]


def test_one_of_conversations_with_the_same_turns_is_rendered_twice(tokenizer, monkeypatch):
    reader = ConversationReader(with_template(tokenizer, CHAT_TEMPLATE))
    rendered = []
    render = reader.tokenizer.apply_chat_template
    monkeypatch.setattr(
        reader.tokenizer, "apply_chat_template", lambda *args, **kwargs: rendered.append(1) or render(*args, **kwargs)
    )
    for row in conversations(50):
        reader.read(row["prompt"] + row["chosen"], None, None)
    assert len(rendered) == 1


def test_without_a_pool_text_is_read_as_trl_reads_it(llama, config, tokenizer, tmp_path):
    rows = Dataset.from_list([in_parts(with_system(row)) for row in conversations(3)])
    own = with_template(tokenizer, WITHOUT_SYSTEM)
    settings = {"report_to": "none", "bf16": False, "gradient_checkpointing": False}
    theirs = RewardTrainer(
        llama, RewardConfig(str(tmp_path / "trl"), **settings), train_dataset=rows, processing_class=own
    )
    ours = SSRMTrainer(llama, config(), train_dataset=rows, processing_class=own)
    for name in ("chosen_ids", "rejected_ids"):
        assert list(ours.train_dataset[name]) == list(theirs.train_dataset[name])


def test_tool_call_without_content_gets_a_reward_or_names_its_row(llama, tokenizer):
    call = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}]
    prompts, completions = [conversations(1)[0]["prompt"]] * 2, [conversations(1)[0]["chosen"], call]
    assert len(SSRMRewardFunction(llama)(prompts, completions)) == 2
    raising = SSRMRewardFunction(llama, with_template(tokenizer, TEMPLATES["raises"]))
    with pytest.raises(
        ValueError, match=r"^The completion of row 1 can't be tokenized \('dict object' has no attribute 'content'"
    ):
        raising(prompts, completions)


def test_row_that_a_judge_can_not_read_is_named(policy, tmp_path):
    judge = PairwiseJudge(policy, comparison=Comparison(labels=["a", "b"]))
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    rows = conversations(3)
    rows[2]["rejected"] = [call]
    rows[0]["chosen"][0]["tool_calls"] = call["tool_calls"]
    dataset = Dataset.from_list(rows)
    words = "Row 2 of `dataset` can't be tokenized (A pairwise model reads text, but a message has none"
    for read in (
        lambda: evaluate(judge, dataset, disable_tqdm=True),
        lambda: label_preferences(judge, dataset, str(tmp_path), disable_tqdm=True),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
            read()
    with pytest.raises(ValueError, match="^Pair 2 can't be tokenized"):
        judge.judge([row["prompt"] for row in rows], [(row["chosen"], row["rejected"]) for row in rows])
