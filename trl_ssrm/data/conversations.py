"""Conversations as chat templates take them: text parts joined, and no text that the template leaves out."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from .markup import as_literal, special_tokens_of


# Arguments of `apply_chat_template` that decide what it returns. A row may only set what the template reads.
RESERVED = frozenset(
    ("conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict")
    + ("return_assistant_tokens_mask", "tokenizer_kwargs")
)


def with_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    Join content that is given as text parts, which some chat templates print as a list and others do not read at all.

    Args:
        messages (`list[dict[str, Any]]`):
            Messages. Content is text, or parts such as `{"type": "text", "text": "Hello"}`.

    Returns:
        `list[dict[str, Any]]`: the same messages with content as text. A tool call without content has the content
        `None`, as in a [`~datasets.Dataset`].

    Raises:
        ValueError: If a part is not text.
    """
    return [{**message, "content": _joined(message.get("content"))} for message in messages]


def with_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`list[dict[str, Any]]`: the messages of [`with_text`] with content as a list of one text part, or an empty list."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}] if message["content"] else []}
        for message in with_text(messages)
    ]


def takes_parts_alone(tokenizer: Any) -> bool:
    """`bool`: whether the chat template reads content as parts and not as text, as those of some vision models."""

    def reads(content: Any) -> bool:
        try:
            return _mark(0) in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:
            return False

    return not reads(_mark(0)) and reads([{"type": "text", "text": _mark(0)}])


def are_messages(value: Any, of_parts: bool) -> bool:
    """`bool`: whether a value is a list of messages of which one has parts (or text) as its content."""
    kind = list if of_parts else str
    return isinstance(value, list) and any(
        isinstance(each, dict) and isinstance(each.get("content"), kind) for each in value
    )


def begins_with(completion: Any, prompt: Any) -> bool:
    """`bool`: whether a completion repeats the messages of its prompt at its start."""
    if not (isinstance(completion, list) and isinstance(prompt, list) and prompt):
        return False
    return _comparable(completion[: len(prompt)]) == _comparable(prompt)


def odd_part(content: Any) -> Any:
    """`Any`: the first part of a message's content that is not text; `None` if there is none."""
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            return part
    return None


def template_arguments(tools: Any, chat_template_kwargs: Any) -> dict[str, Any]:
    """
    Arguments of the chat template that a row has, as in [`~trl.RewardTrainer`].

    Args:
        tools (`list` or `str`, *optional*):
            Tools, as a list or as JSON. Empty text, as in an empty cell of a CSV file, means none.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments.

    Returns:
        `dict[str, Any]`: the arguments, with `tools` among them.

    Raises:
        ValueError: If the tools are not a list, or an argument is none of the template's.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise ValueError(f"the tools {tools!r:.50} are no JSON; give a list of tools") from None
    if not isinstance(tools, list | None):
        raise ValueError(f"the tools are {tools!r:.50}; give a list of tools")
    if chat_template_kwargs is None or chat_template_kwargs == "":
        chat_template_kwargs = {}
    if not isinstance(chat_template_kwargs, dict):
        raise ValueError(f"the arguments of the chat template are {chat_template_kwargs!r:.50}; give a dictionary")
    if reserved := sorted(RESERVED & chat_template_kwargs.keys()):
        raise ValueError(f"{reserved[0]!r} is no argument of the chat template; leave it out")
    return {"tools": tools, **chat_template_kwargs}


class ConversationReader:
    """
    Prepares conversations for the chat template of a tokenizer, and refuses those that the template does not read.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer: Any = tokenizer
        self.special_tokens = special_tokens_of(tokenizer)
        self.in_form = with_parts if takes_parts_alone(tokenizer) else with_text
        self._read_forms: set[str] = set()

    def read(self, messages: list[dict[str, Any]], tools: Any, chat_template_kwargs: Any) -> tuple[list, dict]:
        """
        Messages and arguments for `apply_chat_template`, with special tokens in text escaped.

        Args:
            messages (`list[dict[str, Any]]`):
                A whole conversation.
            tools (`list` or `str`, *optional*):
                As in [`template_arguments`].
            chat_template_kwargs (`dict[str, Any]`, *optional*):
                As in [`template_arguments`].

        Returns:
            `tuple[list, dict]`: messages and arguments.

        Raises:
            ValueError: If a message can't be read, or the template leaves out its text.
        """
        arguments = template_arguments(tools, chat_template_kwargs)
        messages, arguments["tools"] = as_literal([self.in_form(messages), arguments["tools"]], self.special_tokens)
        self.check_is_read(messages, arguments)
        return messages, arguments

    def check_is_read(self, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> None:
        """
        Refuse a conversation with a message whose text the chat template leaves out. Of conversations with the same
        roles, fields and arguments one is rendered.

        Args:
            messages (`list[dict[str, Any]]`):
                A whole conversation, in the form that [`ConversationReader.read`] gives.
            arguments (`dict[str, Any]`):
                Arguments of the chat template.

        Raises:
            ValueError: Names the message.
        """
        fields = [
            (str(each.get("role")), *sorted(name for name in each if _is_there(each[name]))) for each in messages
        ]
        form = repr((fields, {name: value for name, value in arguments.items() if name != "tools"}))
        form += " with tools" * bool(arguments.get("tools"))
        if form in self._read_forms:
            return
        # Text may be trimmed, cut or escaped on purpose, so a mark at its end shows whether the template reads it.
        texts = [each["content"] for each in with_text(messages)]
        marked = [
            {**each, "content": f"{text} {_mark(place)}"} if _is_there(text) else each
            for place, (each, text) in enumerate(zip(messages, texts, strict=True))
        ]
        try:
            rendered = self.tokenizer.apply_chat_template(self.in_form(marked), tokenize=False, **arguments).casefold()
        except Exception:
            # Then the conversation itself fails too, and its error says more.
            return
        for place, each in enumerate(messages):
            if _is_there(texts[place]) and _mark(place) not in rendered:
                raise ValueError(
                    f"the chat template leaves out the text of message {place}, of the role {each['role']!r}"
                )
        self._read_forms.add(form)


def _comparable(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with parts joined, and without the empty fields that a `Dataset` fills in."""
    return [
        {name: part for name, part in message.items() if part not in (None, [])} for message in with_text(messages)
    ]


def _joined(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    if (part := odd_part(content)) is not None:
        raise ValueError(f"a message has the part {part!r:.50}, and a tokenizer reads only text")
    return "".join(part["text"] for part in content)


def _is_there(content: Any) -> bool:
    return content is not None and bool(str(content).strip())


def _mark(place: int) -> str:
    return f"qzx{place}xzq"
