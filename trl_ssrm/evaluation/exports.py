"""Copies of a model for other tools."""

import json
import shutil
from pathlib import Path

from ..io.files import write_json
from ..models.comparison import FILE_NAME as COMPARISON_FILE


def export_for_rewardbench(model: str, output_dir: str) -> None:
    """
    Copy a scalar reward model so that the package `rewardbench` can read it, which runs on transformers 4.

    Transformers 5 names the tokenizer class, the special tokens and the rotary embedding in ways that version 4 does
    not know: the first two it refuses, and without the third it would take another base for the positions and give
    other scores without a word. The copy names them in the old way too. Weights and tokens are the same, and
    transformers 5 reads it as well.

    Args:
        model (`str`):
            Directory of a reward model. Of an adapter, the directory that [`SSRMTrainer.merge_and_save`] wrote.
        output_dir (`str`):
            Directory for the copy. It must not exist.

    Raises:
        ValueError: If the directory holds no reward model, a pairwise one, or one whose layers have different rotary
            embeddings, or if `output_dir` exists.
    """
    source, target = Path(model), Path(output_dir)
    if not (source / "config.json").is_file() or (source / COMPARISON_FILE).exists():
        raise ValueError(f"{model} is no directory of a scalar reward model; `rewardbench` can't run anything else.")
    if target.exists():
        raise ValueError(f"`output_dir` {output_dir} exists; choose another one.")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if rope is not None:
        if "rope_theta" not in rope:
            raise ValueError(
                f"The layers of {model} have different rotary embeddings, which version 4 names otherwise."
            )
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    tokenizer = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        # In version 4 the class gives token types too, which decoders refuse.
        tokenizer.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("_*", "checkpoint-*", "*.bin", "runs"))
    write_json(target / "config.json", config)
    write_json(target / "tokenizer_config.json", tokenizer)
