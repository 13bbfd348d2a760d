"""A copy of a reward model that the package `rewardbench` can load."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..io.files import write_json
from ..models.comparison import FILE_NAME as COMPARISON_FILE


def export_for_rewardbench(model: str, output_dir: str) -> None:
    """
    Copy a scalar reward model for the package `rewardbench`, which runs on transformers 4.

    Transformers 5 has new names for the tokenizer class, the special tokens and the rotary embedding. Version 4
    refuses the first two. It ignores the third, uses its default base for the positions, and silently gives other
    scores. The copy has the old names too. Weights and tokens are the same, and transformers 5 reads the copy as well.

    Args:
        model (`str`):
            Directory of a reward model. For an adapter, give the directory that [`SSRMTrainer.merge_and_save`] wrote.
        output_dir (`str`):
            Directory for the copy. It must not exist.

    Raises:
        ValueError: If `model` is no directory of a scalar reward model, if its layers have different rotary
            embeddings, or if `output_dir` exists.
    """
    source, target = Path(model), Path(output_dir)
    if not (source / "config.json").is_file() or (source / COMPARISON_FILE).exists():
        raise ValueError(
            f"{model} is no directory of a scalar reward model; give one that has a `config.json` and no "
            f"`{COMPARISON_FILE}`."
        )
    if target.exists():
        raise ValueError(f"`output_dir` {output_dir} exists; choose another one.")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    _add_old_config_names(config, model)
    _use_old_tokenizer_names(tokenizer)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("_*", "checkpoint-*", "*.bin", "runs"))
    write_json(target / "config.json", config)
    write_json(target / "tokenizer_config.json", tokenizer)


def _add_old_config_names(config: dict[str, Any], model: str) -> None:
    rope = config.get("rope_parameters")
    if rope is not None:
        if "rope_theta" not in rope:
            raise ValueError(
                f"The layers of {model} have different rotary embeddings, which can't be exported; use `evaluate` "
                "with `benchmark='rewardbench'`."
            )
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]


def _use_old_tokenizer_names(tokenizer: dict[str, Any]) -> None:
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        # The class of version 4 returns token types too, and decoders refuse them.
        tokenizer.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
