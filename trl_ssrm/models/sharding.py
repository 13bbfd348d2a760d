"""Models whose weights are sharded over the processes by FSDP2 or DeepSpeed: read and write their complete weights."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(accelerator: Accelerator) -> bool:
    """`bool`: whether each process holds only a part of the weights of the model in training."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(accelerator: Accelerator, freeze_backbone: bool) -> None:
    """Refuse kinds of sharding that the rounds do not support."""
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "With FSDP1 the weights can't be read between the rounds; set `fsdp_version: 2` in the accelerate config."
        )
    if freeze_backbone and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError("`freeze_backbone` does not support FSDP and DeepSpeed; launch with DDP (`--multi_gpu`).")


def spread(model: nn.Module) -> None:
    """
    Shard all weights again. After a forward pass without a backward pass, FSDP2 leaves some weights complete, and
    `parameters()` would return copies that FSDP2 discards later.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`dict[str, nn.Parameter]`: the trained parameters, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def shape_of(parameter: torch.Tensor) -> list[int]:
    """`list[int]`: shape of the complete parameter, also where it is sharded."""
    # With ZeRO-3, the parameter itself is an empty tensor.
    return list(getattr(parameter, "ds_shape", parameter.shape))


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    The trained weights of a model, complete. If the model is sharded, all processes have to call this at the same
    time.

    Args:
        model ([`~torch.nn.Module`]):
            Model, not wrapped.

    Returns:
        `dict[str, torch.Tensor]`: the weights by name: the model's own tensors, or copies on the CPU if it is sharded.
    """
    spread(model)
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in trainable_parameters(model).items():
        # One after the other, so that a device holds at most one complete weight.
        if isinstance(parameter, DTensor):
            weights[name] = DTensor.full_tensor(parameter).detach().cpu()
        elif _is_partitioned(parameter):
            with whole([parameter]):
                weights[name] = parameter.detach().to("cpu", copy=True)
        else:
            weights[name] = parameter
    return weights


def fill(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """
    Write trained weights into a model. If the model is sharded, all processes have to call this at the same time.

    Args:
        model ([`~torch.nn.Module`]):
            Model, not wrapped.
        weights (`dict[str, torch.Tensor]`):
            Complete tensor for each trained parameter, by name, the same in every process.
    """
    spread(model)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if isinstance(parameter, DTensor):
                value = weights[name].to(parameter.device, parameter.dtype)
                # `src_data_rank=None`: all processes have the tensor already, so nothing is sent.
                parameter.copy_(
                    distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
                )
            elif _is_partitioned(parameter):
                with whole([parameter], is_changed=True):
                    parameter.copy_(weights[name])
            else:
                parameter.copy_(weights[name])


@contextlib.contextmanager
def whole(parameters: list[Any], is_changed: bool = False) -> Iterator[None]:
    """Within this context, parameters that ZeRO-3 has partitioned are complete in every process."""
    if not any(_is_partitioned(parameter) for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if is_changed else None):
        yield


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")
