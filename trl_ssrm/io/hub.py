"""Where models come from: a folder here, or the hub."""

import os
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id


# What a request takes on a bad connection; transformers asks five times for each file, and waits in between.
SECONDS_TO_WAIT_FOR_HUB = 10

# One of them is in the cache if a model is.
_CONFIGS = ("config.json", "adapter_config.json", "tokenizer_config.json")


def check_model_is_there(name_or_path: Any, of: str = "", **kwargs: Any) -> None:
    """
    Refuse the name of a model that is neither a folder, nor in the cache, nor to be asked for, instead of asking for each
    of its files until all attempts are over.

    Args:
        name_or_path (`str` or [`~transformers.PreTrainedModel`]):
            Directory or model ID. A model that is loaded is there.
        of (`str`, *optional*, defaults to `""`):
            What the model is to the one that was asked for, for the message.
        kwargs (`dict[str, Any]`):
            What it is loaded with; `revision`, `cache_dir` and `local_files_only` count here.

    Raises:
        ValueError: If it is a path where there is no folder, or if the hub can't be reached.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        return
    name, of = str(name_or_path), of and f", {of}"
    if os.path.isdir(name):
        return
    if os.path.exists(name):
        raise ValueError(f"{name}{of} is a file; give the folder that it is in.")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"There is no folder {name}{of}; check the path.") from None
    if kwargs.get("local_files_only"):
        return
    where = {"revision": kwargs.get("revision"), "cache_dir": kwargs.get("cache_dir")}
    if any(isinstance(try_to_load_from_cache(name, file, **where), str) for file in _CONFIGS):
        return
    try:
        HfApi().model_info(name, revision=kwargs.get("revision"), timeout=SECONDS_TO_WAIT_FOR_HUB)
    except HfHubHTTPError:
        # It has answered, if only that there is no such model, which transformers says with what can be done.
        return
    except Exception as error:
        # Which client it is that says so differs from version to version.
        raise ValueError(
            f"{name}{of} is no folder here, and the hub can't be reached ({' '.join(str(error).split()):.200}); check the "
            "path, or the connection."
        ) from error
