"""What decides the result of a run, so that it is resumed with the same settings and data only."""

import math
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn

from ..config import SSRMConfig
from ..io.storage import content_hash
from ..models.sharding import shape_of


# Raise it when the files of a run are read in another way than before. A run of another format is refused.
FORMAT = 5

# Settings that decide the result besides the data and the model. A run is resumed with the same ones only.
_DECISIVE_SETTINGS = (
    *(
        name
        for name in SSRMConfig.__annotations__
        # The content of the comparison counts, not its path.
        if name not in ("score_batch_tokens", "track_pseudo_label_accuracy", "comparison")
    ),
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "optim_args", "max_grad_norm"),
    *("seed", "data_seed", "bf16", "fp16", "max_length", "center_rewards_coefficient", "disable_dropout"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "neftune_noise_alpha"),
    *("train_sampling_strategy", "dataloader_drop_last"),
)


def run_identity(args: SSRMConfig, model: nn.Module, data: dict[str, Any]) -> dict[str, Any]:
    """
    The facts that decide the result of a run.

    Args:
        args ([`SSRMConfig`]):
            Settings of the run.
        model ([`~torch.nn.Module`]):
            Model of the run; its class, the shapes of its parameters and the settings of its adapter count.
        data (`dict[str, Any]`):
            Fingerprints of the datasets, by their names.

    Returns:
        `dict[str, Any]`: JSON values by the names of what they stand for.
    """
    settings = args.to_dict()
    shapes = sorted((name, shape_of(parameter)) for name, parameter in model.named_parameters())
    return {
        "format": FORMAT,
        **{name: _as_told(settings[name]) for name in _DECISIVE_SETTINGS},
        "total_train_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "model": f"{type(model).__name__} {content_hash(shapes)}",
        **({"adapter": content_hash(_adapter(model))} if is_peft_model(model) else {}),
        **data,
    }


def _adapter(model: Any) -> list[str]:
    """What decides the result of an adapter with weights of the same shapes, such as its `lora_alpha`."""
    settings = model.active_peft_config.to_dict()
    # A base may have moved, and a library may be newer. The order of a set says nothing.
    names = sorted(settings.keys() - {"base_model_name_or_path", "revision", "peft_version", "inference_mode"})
    sets = {name: sorted(settings[name]) for name in names if isinstance(settings[name], set)}
    return [f"{name} {sets.get(name, settings[name])}" for name in names]


def _as_told(setting: Any) -> Any:
    """A setting as JSON can hold it: `max_grad_norm` may be infinite."""
    return str(setting) if isinstance(setting, float) and not math.isfinite(setting) else setting
