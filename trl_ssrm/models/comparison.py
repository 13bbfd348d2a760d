"""The comparison that a pairwise preference model reads: a prompt and two answers in one text."""

import functools
import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..data.checks import tokenizing, unformatted
from ..data.conversations import with_text
from ..data.markup import as_literal, special_tokens_of
from ..data.prompts import with_prompt
from ..data.tokenization import ROW_COLUMN
from ..io.files import write_json


logger = logging.getLogger(__name__)

FILE_NAME = "comparison.json"

# Text that the paper's released code (RLHFlow, pair-pm) gives to the model.
DEFAULT_TEMPLATE = (
    "[CONTEXT] \n\n{% for message in messages %}<turn> {{ message.role }}\n {{ message.content }}\n{% endfor %}"
    " [RESPONSE {{ labels[0] }}] {{ responses[0] }} [RESPONSE {{ labels[1] }}] {{ responses[1] }} \n"
)


@dataclass(frozen=True)
class Comparison:
    """
    How a prompt and two answers are shown to a pairwise preference model, and how it answers.

    The rendered template is given to the model as a message of the user. The model answers with one of two labels,
    each a single token.

    Args:
        template (`str`, *optional*):
            Jinja template of the text, with the variables `messages` (list of messages of the prompt), `responses`
            (texts of the two answers, in the order in which they are shown) and `labels`. By default the template of
            the released code of [Semi-Supervised Reward Modeling](https://huggingface.co/papers/2409.06903).
        labels (`list[str]`, *optional*, defaults to `["A", "B"]`):
            Label for the answer shown first, and label for the answer shown second.
        add_generation_prompt (`bool`, *optional*, defaults to `True`):
            Whether the text ends with the start of the model's turn, after which the label is expected.
        max_length (`int`, *optional*):
            Longest comparison in tokens. If a comparison is longer, the oldest turns of its prompt are left out.
    """

    template: str = DEFAULT_TEMPLATE
    labels: list[str] = field(default_factory=lambda: ["A", "B"])
    add_generation_prompt: bool = True
    max_length: int | None = None

    def save_pretrained(self, directory: str) -> None:
        """
        Write the comparison to `comparison.json` in a directory.

        Args:
            directory (`str`):
                Directory of the model.
        """
        write_json(Path(directory) / FILE_NAME, asdict(self))

    @classmethod
    def from_pretrained(cls, name_or_path: str, revision: str | None = None) -> "Comparison | None":
        """
        Load a comparison from a file, or the comparison that a model was trained on.

        Args:
            name_or_path (`str`):
                A JSON file, or a directory or model ID with a `comparison.json`.
            revision (`str`, *optional*):
                Revision of a model on the hub.

        Returns:
            [`Comparison`] or `None`: `None` if the directory or model has no `comparison.json`.

        Raises:
            ValueError: If there is no such file, or if it does not describe a comparison.
        """
        path: str | None
        if os.path.isfile(name_or_path):
            path = name_or_path
        elif str(name_or_path).endswith(".json"):
            raise ValueError(f"There is no file {name_or_path}; check the path of the comparison.")
        else:
            path = cached_file(name_or_path, FILE_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is None:
            return None
        try:
            stored = cls(**json.loads(Path(path).read_text(encoding="utf-8")))
            are_labels = isinstance(stored.labels, list) and [type(label) for label in stored.labels] == [str, str]
            if not are_labels or not isinstance(stored.template, str) or not isinstance(stored.max_length, int | None):
                raise TypeError("a field is of the wrong type")
            return stored
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is not a comparison ({error}); correct it, or write one with `Comparison.save_pretrained`."
            ) from error

    def render(self, messages: list[dict[str, Any]], first: str, second: str) -> str:
        """
        Render the text of a comparison.

        Args:
            messages (`list[dict[str, Any]]`):
                Messages of the prompt.
            first (`str`):
                Answer shown first.
            second (`str`):
                Answer shown second.

        Returns:
            `str`: the text, before the chat template.

        Raises:
            ValueError: If the template can't be rendered.
        """
        try:
            return _compiled(self.template).render(messages=messages, responses=[first, second], labels=self.labels)
        # A template is a program and can raise any exception.
        except Exception as error:
            raise ValueError(f"The template of the comparison can't be rendered: {error}; correct it.") from error

    def encode(self, tokenizer: PreTrainedTokenizerBase, messages: list, first: str, second: str) -> list[int]:
        """
        Tokenize one comparison, whatever its length.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            messages (`list[dict[str, Any]]`):
                Messages of the prompt.
            first (`str`):
                Answer shown first.
            second (`str`):
                Answer shown second.

        Returns:
            `list[int]`: token IDs.
        """
        return _token_ids(tokenizer, self._prompt(tokenizer, messages, first, second))

    def tokenize(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Any, first: Any, second: Any
    ) -> tuple[list[int], list[int]]:
        """
        Tokenize a comparison in both orders. If one is longer than `max_length`, the oldest turns of the prompt are
        left out until both fit or one turn is left; answers are never cut.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            prompt (`str` or `list[dict[str, Any]]`):
                Text or conversation.
            first (`str` or `list[dict[str, Any]]`):
                First completion, as text or messages.
            second (`str` or `list[dict[str, Any]]`):
                Second completion, as text or messages.

        Returns:
            `tuple[list[int], list[int]]`: token IDs with `first` shown first, and with `second` shown first.

        Raises:
            ValueError: If a message has no text, or the template can't be rendered.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else with_text(prompt)
        answers = [answer if isinstance(answer, str) else _text(answer) for answer in (first, second)]
        _text(messages)
        # So that no prompt and no answer can end the turn that holds the comparison.
        messages, answers = as_literal([messages, answers], special_tokens_of(tokenizer))
        while True:
            one = self.encode(tokenizer, messages, answers[0], answers[1])
            other = self.encode(tokenizer, messages, answers[1], answers[0])
            if self.max_length is None or max(len(one), len(other)) <= self.max_length or len(messages) < 2:
                return one, other
            messages = messages[1:]

    def label_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
        """
        Token IDs of the two labels at the place where the model answers.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.

        Returns:
            `tuple[int, int]`: for each label its token after the prompt. If the tokenizer merges the label with the
            end of the prompt, the token of the label alone.

        Raises:
            ValueError: If a label is not one token, if both are the same token, or if a comparison ends with the
                padding token.
        """
        prompt = self._prompt(tokenizer, [{"role": "user", "content": "a"}], "b", "c")
        before = _token_ids(tokenizer, prompt)
        # A classifier reads the last token that is not the padding token, whatever the attention mask says.
        if before[-1] == (tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id):
            raise ValueError(
                f"A comparison ends with {tokenizer.decode(before[-1:])!r}, which is the padding token too, so the "
                "model would not read its end; set another `pad_token` of the tokenizer."
            )
        ids = []
        for label in self.labels:
            after = _token_ids(tokenizer, prompt + label)
            alone = tokenizer(label, add_special_tokens=False)["input_ids"]
            if after[:-1] == before:
                ids.append(after[-1])
            elif len(alone) == 1:
                ids.append(alone[0])
            else:
                raise ValueError(
                    f"The label {label!r} is {len(alone)} tokens of this tokenizer; choose `labels` of one token each."
                )
        if ids[0] == ids[1]:
            raise ValueError(
                f"The labels {self.labels[0]!r} and {self.labels[1]!r} are the same token of this tokenizer; choose "
                "other `labels`."
            )
        return ids[0], ids[1]

    def _prompt(self, tokenizer: Any, messages: list, first: str, second: str) -> str:
        text = self.render(messages, first, second)
        if tokenizer.chat_template is None:
            return text
        message = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=self.add_generation_prompt)


def tokenize_comparisons(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    comparison: Comparison,
    max_length: int | None = None,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Tokenize a preference dataset for a pairwise model.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `chosen` and `rejected`, optionally with `prompt`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        comparison ([`Comparison`]):
            How the pairs are shown to the model.
        max_length (`int`, *optional*):
            Longest comparison in tokens; rows with a longer one are left out.
        num_proc (`int`, *optional*):
            Number of processes to tokenize with.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the rows, with `chosen_ids` (chosen completion shown
        first) and `rejected_ids` (rejected completion shown first).
    """

    def tokenize(row: dict[str, Any], number: int) -> dict[str, list[int]]:
        row = with_prompt(row)
        with tokenizing(f"Row {row.get(ROW_COLUMN, number)} of the pairs"):
            chosen_ids, rejected_ids = comparison.tokenize(tokenizer, row["prompt"], row["chosen"], row["rejected"])
        return {"chosen_ids": chosen_ids, "rejected_ids": rejected_ids}

    if ignored := {"tools", "chat_template_kwargs"} & set(dataset.column_names or []):
        logger.warning(f"A comparison shows no {sorted(ignored)}; these columns have no effect.")
    kwargs: dict[str, Any] = {}
    dataset = unformatted(dataset)
    if isinstance(dataset, Dataset):
        kwargs["num_proc"] = num_proc
    with PartialState().main_process_first():
        dataset = dataset.map(
            tokenize, with_indices=True, **kwargs, **({"desc": "Tokenizing comparisons"} if kwargs else {})
        )
        if max_length is not None:
            dataset = dataset.filter(
                lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length, **kwargs
            )
    return dataset


# Compiling takes 1.1 ms, and rendering 0.01.
@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    # Sandboxed: the template comes with the checkpoint, so it must not run code.
    return ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(template)


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # A chat template has already written the special tokens.
    return tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]


def _text(messages: list[dict[str, Any]]) -> str:
    messages = with_text(messages)
    for message in messages:
        if not isinstance(message["content"], str):
            raise ValueError(
                "A pairwise model reads text, but a message has none (such as a tool call); leave out its row."
            )
    return "\n".join(message["content"] for message in messages)
