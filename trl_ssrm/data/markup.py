"""Special tokens in the text of a message: read as the characters that they are, so that no text opens a turn."""

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase


# Parts a special token for the tokenizer, and shows nowhere.
_ZERO_WIDTH_SPACE = "\u200b"


def strings_of(value: Any) -> Iterator[str]:
    """The strings in JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from strings_of(part)


def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """`re.Pattern[str]`: what the tokenizer would read as a special token wherever it stands."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # One character can't be parted, and nothing else can be meant by it.
    tokens = sorted((token for token in added | set(tokenizer.all_special_tokens) if len(token) > 1), key=len)
    return re.compile("|".join(map(re.escape, reversed(tokens))) or r"(?!)")


def holds_special_tokens(value: Any, special_tokens: re.Pattern[str]) -> bool:
    """`bool`: whether a text, or messages, spell a special token out."""
    return any(special_tokens.search(text) for text in strings_of(value))


def as_literal(value: Any, special_tokens: re.Pattern[str]) -> Any:
    """
    Text as text: a special token that is spelled out gets a zero-width space behind its first character, so that the
    tokenizer reads its characters, not the token.

    A chat template writes special tokens around what a message says, and the tokenizer can't tell whose they are. Without
    this, an answer that holds the end of a turn and the start of another one would have its reward read behind a turn
    that nobody took.

    Args:
        value (`Any`):
            JSON values, such as a text, messages or tools.
        special_tokens (`re.Pattern[str]`):
            As from [`special_tokens_of`].

    Returns:
        `Any`: the same, where it spells no special token; otherwise a copy in which nothing does.
    """
    if isinstance(value, str):
        # Parting one may leave another that overlaps with it.
        while special_tokens.search(value):
            value = special_tokens.sub(lambda found: f"{found[0][0]}{_ZERO_WIDTH_SPACE}{found[0][1:]}", value)
        return value
    if isinstance(value, dict):
        return {as_literal(name, special_tokens): as_literal(part, special_tokens) for name, part in value.items()}
    return [as_literal(part, special_tokens) for part in value] if isinstance(value, list) else value
