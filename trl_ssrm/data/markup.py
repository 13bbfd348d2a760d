"""Escape special tokens in the text of messages, so that no message can open or end a turn."""

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase


# Invisible, and inside the text of a special token it keeps the tokenizer from recognizing the token.
_ZERO_WIDTH_SPACE = "\u200b"


def strings_of(value: Any) -> Iterator[str]:
    """Yield the strings in JSON values, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from strings_of(part)


def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """`re.Pattern[str]`: matches text that the tokenizer reads as a special token."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # A token of one character can't be split by a space.
    tokens = sorted((token for token in added | set(tokenizer.all_special_tokens) if len(token) > 1), key=len)
    return re.compile("|".join(map(re.escape, reversed(tokens))) or r"(?!)")


def holds_special_tokens(value: Any, special_tokens: re.Pattern[str]) -> bool:
    """`bool`: whether a text, or messages, contain a special token."""
    return any(special_tokens.search(text) for text in strings_of(value))


def as_literal(value: Any, special_tokens: re.Pattern[str]) -> Any:
    """
    Escape special tokens: each gets a zero-width space after its first character, so the tokenizer reads it as
    ordinary characters.

    A chat template writes special tokens around each message, and the tokenizer can't distinguish them from the same
    characters in a message. Without escaping, an answer could end its turn and start a new one, and the reward would
    be read after that forged turn.

    Args:
        value (`Any`):
            JSON values, such as a text, messages or tools.
        special_tokens (`re.Pattern[str]`):
            Pattern from [`special_tokens_of`].

    Returns:
        `Any`: a copy without special tokens; equal to the value if it contains none.
    """
    if isinstance(value, str):
        # Splitting one token may leave another that overlaps with it.
        while special_tokens.search(value):
            value = special_tokens.sub(lambda found: f"{found[0][0]}{_ZERO_WIDTH_SPACE}{found[0][1:]}", value)
        return value
    if isinstance(value, dict):
        return {as_literal(name, special_tokens): as_literal(part, special_tokens) for name, part in value.items()}
    return [as_literal(part, special_tokens) for part in value] if isinstance(value, list) else value
