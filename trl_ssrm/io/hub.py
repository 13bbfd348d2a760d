"""Find out whether a model exists, in a folder or on the hub, before it is loaded."""

import os
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id


# Enough for a bad connection. Transformers tries five times for each file and waits in between: half a minute in all.
SECONDS_TO_WAIT_FOR_HUB = 10

# If a model is in the cache, at least one of these files is there.
_CONFIGS = ("config.json", "adapter_config.json", "tokenizer_config.json")


def check_model_is_there(name_or_path: Any, of: str = "", **kwargs: Any) -> None:
    """
    Refuse a model that can't be loaded: no such folder, not in the cache, and the hub can't be reached. The hub is
    asked once, which takes 10 seconds at most.

    Args:
        name_or_path (`str` or [`~transformers.PreTrainedModel`]):
            Directory or model ID. A loaded model passes.
        of (`str`, *optional*, defaults to `""`):
            Role of the model for the message, such as "the base model of ...".
        kwargs (`dict[str, Any]`):
            Arguments that the model is loaded with. `revision`, `cache_dir` and `local_files_only` are used here.

    Raises:
        ValueError: If there is no such folder, if the path is a file, or if the hub can't be reached.
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
        # The hub answered. If the model does not exist, transformers explains it well.
        return
    except Exception as error:
        # The type depends on the HTTP client, which differs between versions of huggingface_hub.
        raise ValueError(
            f"{name}{of} is no folder here, and the hub can't be reached ({' '.join(str(error).split()):.200}); check "
            "the path, or the connection."
        ) from error
