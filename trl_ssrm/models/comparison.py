"""The comparison that a pairwise preference model reads: a prompt and two answers in one text."""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file
from trl import maybe_extract_prompt

from ..data.markup import as_literal, special_tokens_of
from ..io.files import write_json


logger = logging.getLogger(__name__)

FILE_NAME = "comparison.json"

# What the released code of the paper (RLHFlow, pair-pm) shows the model.
DEFAULT_TEMPLATE = (
    "[CONTEXT] \n\n{% for message in messages %}<turn> {{ message.role }}\n {{ message.content }}\n{% endfor %}"
    " [RESPONSE {{ labels[0] }}] {{ responses[0] }} [RESPONSE {{ labels[1] }}] {{ responses[1] }} \n"
)


@dataclass(frozen=True)
class Comparison:
    """
    How a prompt and two answers are shown to a pairwise preference model, and how it answers.

    The text of the template is given to the model as a message of the user. Its answer is one of two labels, each one
    token.

    Args:
        template (`str`, *optional*):
            Jinja template of the text, with `messages` (the prompt: list of messages), `responses` (the two answers, as
            text, in the order in which they are shown) and `labels`. Default: that of the released code of [Semi-Supervised
            Reward Modeling](https://huggingface.co/papers/2409.06903).
        labels (`list[str]`, *optional*, defaults to `["A", "B"]`):
            What the model answers if it prefers the answer shown first, and the one shown second.
        add_generation_prompt (`bool`, *optional*, defaults to `True`):
            Whether the text ends with the start of the model's turn, behind which the label belongs.
        max_length (`int`, *optional*):
            Longest comparison in tokens. The oldest turns of the prompt are left out as far as needed.
    """

    template: str = DEFAULT_TEMPLATE
    labels: list[str] = field(default_factory=lambda: ["A", "B"])
    add_generation_prompt: bool = True
    max_length: int | None = None

    def save_pretrained(self, directory: str) -> None:
        """
        Write the comparison beside a model.

        Args:
            directory (`str`):
                Directory of the model.
        """
        write_json(Path(directory) / FILE_NAME, asdict(self))

    @classmethod
    def from_pretrained(cls, name_or_path: str, revision: str | None = None) -> "Comparison | None":
        """
        The comparison that a model was trained on.

        Args:
            name_or_path (`str`):
                Directory or model ID.
            revision (`str`, *optional*):
                Revision of a model of the hub.

        Returns:
            [`Comparison`] or `None`: `None` if the model was saved with none.
        """
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
            raise ValueError(f"{path} is no comparison ({error}); mend it, or load another model.") from error

    def render(self, messages: list[dict[str, Any]], first: str, second: str) -> str:
        """
        The text that shows two answers to a prompt.

        Args:
            messages (`list[dict[str, Any]]`):
                The prompt.
            first (`str`):
                The answer shown first.
            second (`str`):
                The other one.

        Returns:
            `str`

        Raises:
            ValueError: If the template can't be rendered.
        """
        # The template comes with the checkpoint, so it must not run code.
        environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True)
        try:
            template = environment.from_string(self.template)
            return template.render(messages=messages, responses=[first, second], labels=self.labels)
        # Templates are programs, so whatever it is.
        except Exception as error:
            raise ValueError(f"The template of the comparison can't be rendered: {error}; mend it.") from error

    def encode(self, tokenizer: PreTrainedTokenizerBase, messages: list, first: str, second: str) -> list[int]:
        """
        One comparison, however long.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            messages (`list[dict[str, Any]]`):
                The prompt.
            first (`str`):
                The answer shown first.
            second (`str`):
                The other one.

        Returns:
            `list[int]`: token IDs.
        """
        return tokenizer(self._prompt(tokenizer, messages, first, second), **self._special_tokens(tokenizer))[
            "input_ids"
        ]

    def tokenize(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Any, first: Any, second: Any
    ) -> tuple[list[int], list[int]]:
        """
        Both orders of a comparison.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            prompt (`str` or `list[dict[str, Any]]`):
                Text or conversation.
            first (`str` or `list[dict[str, Any]]`):
                A completion, as text or messages.
            second (`str` or `list[dict[str, Any]]`):
                The other one.

        Returns:
            `tuple[list[int], list[int]]`: token IDs with `first` shown first, and with `second` shown first. Without
            the oldest turns of the prompt if that makes both fit into `max_length`; answers are never cut.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        answers = [answer if isinstance(answer, str) else _text(answer) for answer in (first, second)]
        _text(messages)
        # Neither a prompt nor an answer ends the turn that the comparison is.
        messages, answers = as_literal([messages, answers], special_tokens_of(tokenizer))
        while True:
            one = self.encode(tokenizer, messages, answers[0], answers[1])
            other = self.encode(tokenizer, messages, answers[1], answers[0])
            if self.max_length is None or max(len(one), len(other)) <= self.max_length or len(messages) < 2:
                return one, other
            messages = messages[1:]

    def label_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
        """
        Token IDs of the two labels, where the model answers.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.

        Returns:
            `tuple[int, int]`: the token that the label becomes behind the prompt or, where it merges with it, alone.

        Raises:
            ValueError: If a label is not one token, if both are the same, or if a comparison ends with padding.
        """
        prompt = self._prompt(tokenizer, [{"role": "user", "content": "a"}], "b", "c")
        before = tokenizer(prompt, **self._special_tokens(tokenizer))["input_ids"]
        # A classifier reads the last token that is no padding, whatever the attention mask says.
        if before[-1] == (tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id):
            raise ValueError(
                f"A comparison ends with {tokenizer.decode(before[-1:])!r}, which is the padding token too, so it would "
                "not be read to its end; set another `pad_token` of the tokenizer."
            )
        ids = []
        for label in self.labels:
            after = tokenizer(prompt + label, **self._special_tokens(tokenizer))["input_ids"]
            alone = tokenizer(label, add_special_tokens=False)["input_ids"]
            if after[:-1] == before:
                ids.append(after[-1])
            elif len(alone) == 1:
                ids.append(alone[0])
            else:
                raise ValueError(
                    f"The label {label!r} is {len(alone)} tokens of this tokenizer; choose `comparison_labels` of one "
                    "token each."
                )
        if ids[0] == ids[1]:
            raise ValueError(
                f"The labels {self.labels[0]!r} and {self.labels[1]!r} are the same token of this tokenizer; choose other "
                "`comparison_labels`."
            )
        return ids[0], ids[1]

    def _prompt(self, tokenizer: Any, messages: list, first: str, second: str) -> str:
        text = self.render(messages, first, second)
        if tokenizer.chat_template is None:
            return text
        message = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=self.add_generation_prompt)

    @staticmethod
    def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
        # A chat template writes them itself.
        return {"add_special_tokens": tokenizer.chat_template is None}


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
            Rows with `chosen` and `rejected`, with or without `prompt`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        comparison ([`Comparison`]):
            How the pairs are shown.
        max_length (`int`, *optional*):
            Rows with a longer comparison are left out.
        num_proc (`int`, *optional*):
            Number of processes to tokenize with.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: with `chosen_ids`, which show the chosen completion
        first, and `rejected_ids`, which show the rejected one first.
    """

    def tokenize(row: dict[str, Any]) -> dict[str, list[int]]:
        row = maybe_extract_prompt(row)
        chosen_ids, rejected_ids = comparison.tokenize(tokenizer, row["prompt"], row["chosen"], row["rejected"])
        return {"chosen_ids": chosen_ids, "rejected_ids": rejected_ids}

    if ignored := {"tools", "chat_template_kwargs"} & set(dataset.column_names or []):
        logger.warning(f"The columns {sorted(ignored)} are not part of a comparison and have no effect.")
    kwargs: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        kwargs["num_proc"] = num_proc
    with PartialState().main_process_first():
        dataset = dataset.map(tokenize, **kwargs, **({"desc": "Tokenizing comparisons"} if kwargs else {}))
        if max_length is not None:
            dataset = dataset.filter(
                lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length, **kwargs
            )
    return dataset


def _text(messages: list[dict[str, Any]]) -> str:
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise ValueError(
                "A pairwise model reads text, but a message has none, such as one that calls a tool; leave the row out."
            )
    return "\n".join(message["content"] for message in messages)
