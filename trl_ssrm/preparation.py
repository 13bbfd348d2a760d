"""What a trainer is given, made whole before the work begins: its configuration, its tokenizer and a pairwise model."""

import copy
import logging
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import RewardConfig

from .checks import not_tokenized
from .comparison import DEFAULT_TEMPLATE, Comparison
from .config import SSRMConfig
from .files import disk_error
from .loading import check_answers_behind, load_pairwise_model
from .markup import as_literal, holds_special_tokens, special_tokens_of
from .sequences import iterate_rows


logger = logging.getLogger(__name__)

# What is text, where it is a conversation. `chat_template_kwargs` are settings.
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "tools")


def complete_args(args: RewardConfig | None, model: Any) -> SSRMConfig:
    """A configuration with the default rounds where none, or one of [`~trl.RewardTrainer`], was given."""
    if isinstance(args, SSRMConfig):
        return args
    if args is None:
        return SSRMConfig(f"{_model_id(model).split('/')[-1]}-SSRM")
    return SSRMConfig(**{each.name: getattr(args, each.name) for each in fields(args) if each.init})


def load_tokenizer(model: Any, args: SSRMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, as [`~trl.RewardTrainer`] loads it, but before the data is checked against it."""
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    return AutoTokenizer.from_pretrained(
        _model_id(model), revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
    )


def prepare_pairwise(
    model: Any, args: SSRMConfig, tokenizer: PreTrainedTokenizerBase, quantization_config: Any
) -> tuple[Comparison, Any, Any, SSRMConfig]:
    """
    Make the comparison, and load the model with the score layer that answers it.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            What the trainer was given.
        args ([`SSRMConfig`]):
            Its configuration.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Its quantization.

    Returns:
        `tuple`: the comparison, the model, and the quantization and configuration that are left for the parent, which
        has nothing to load any more.

    Raises:
        ValueError: If the model answers no comparison, or was trained on another one.
    """
    comparison = Comparison(
        args.comparison_template or DEFAULT_TEMPLATE,
        args.comparison_labels,
        args.comparison_add_generation_prompt,
        args.max_length,
    )
    if args.chat_template_path is not None:
        raise ValueError(
            "`chat_template_path` would change what a pairwise model reads; pass a `processing_class` with the template."
        )
    token_ids = comparison.label_token_ids(tokenizer)
    if not isinstance(model, str):
        check_answers_behind(model.get_base_model() if is_peft_model(model) else model)
        return comparison, model, quantization_config, args
    stored = Comparison.from_pretrained(model)
    if stored is not None and replace(stored, max_length=args.max_length) != comparison:
        raise ValueError(f"{model} was trained on another comparison ({stored}); give the config the same.")
    # As the parent loads it.
    kwargs: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # a `str` is parsed by now
    dtype = kwargs.pop("dtype", "float32")
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    set_seed(args.seed)
    loaded = load_pairwise_model(model, token_ids, dtype, args.trust_remote_code, **kwargs)
    # The parent would warn that they have no effect on a model that is loaded.
    args = copy.copy(args)
    args.model_init_kwargs = None
    return comparison, loaded, None, args


def with_literal_messages(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, name: str
) -> Dataset | IterableDataset:
    """
    Messages that spell special tokens out, made such that the tokenizer reads the characters; see
    [`~trl_ssrm.markup.as_literal`]. Text that is no conversation is left alone: it has no turns but what it spells.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference pairs, before they are tokenized.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        name (`str`):
            What the dataset is called in a warning.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: the same rows. The rows that were changed are counted in
        the log, but for those of a stream.
    """
    special_tokens = special_tokens_of(tokenizer)

    def is_concerned(row: dict[str, Any]) -> bool:
        return isinstance(row.get("chosen"), list) and holds_special_tokens(list(row.values()), special_tokens)

    def make_literal(row: dict[str, Any]) -> dict[str, Any]:
        texts = {column: row[column] for column in _TEXT_COLUMNS if column in row}
        return as_literal(texts, special_tokens) if is_concerned(texts) else {}

    if not isinstance(dataset, Dataset):
        return dataset.map(make_literal)
    columns = [column for column in _TEXT_COLUMNS if column in dataset.column_names]
    if special_tokens.search(str({column: dataset.features[column] for column in columns})):
        raise ValueError(f"A field in `{name}` is named like a special token of the tokenizer; rename it.")
    if "chosen" not in columns or not isinstance(dataset[0]["chosen"], list):
        return dataset
    concerned = [number for number, row in enumerate(iterate_rows(dataset, columns)) if is_concerned(row)]
    if not concerned:
        return dataset
    logger.warning(
        f"Messages in {len(concerned)} rows of `{name}`, row {concerned[0]} being the first, spell special tokens of the "
        "tokenizer out; they are read as the characters that they are, so that none of them opens or ends a turn."
    )
    with PartialState().main_process_first():
        return dataset.map(make_literal, features=dataset.features, desc=f"Reading messages of {name} as text")


def tokenized_or_refused(
    tokenize: Callable[[Any], Any], dataset: Dataset | IterableDataset, name: str
) -> Dataset | IterableDataset:
    """
    Tokenize a dataset, and name the row that can't be.

    Args:
        tokenize (`Callable`):
            Tokenizes a dataset, each row for itself.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows.
        name (`str`):
            What the dataset is called in the error.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: what `tokenize` makes of it.

    Raises:
        ValueError: If there is a row that can't be tokenized.
    """

    def is_refused(start: int, stop: int) -> bool:
        try:
            tokenize(dataset.select(range(start, stop)))
        except Exception:
            return True
        return False

    try:
        return tokenize(dataset)
    except Exception as error:
        if not isinstance(dataset, Dataset) or isinstance(error, OSError) or disk_error(error) is not None:
            raise
        start, stop = 0, len(dataset)
        while stop - start > 1:
            middle = (start + stop) // 2
            start, stop = (start, middle) if is_refused(start, middle) else (middle, stop)
        # Each row alone may be one that can be.
        is_row = is_refused(start, stop)
        raise not_tokenized(f"Row {start} of `{name}`" if is_row else f"`{name}`", error) from error


def _model_id(model: Any) -> str:
    return model if isinstance(model, str) else model.config.name_or_path
