"""Models whose weights are spread over the processes, by FSDP2 or by DeepSpeed: made whole to be kept, and filled again."""

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
    """`bool`: whether no process holds all the weights of the model that is trained."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(accelerator: Accelerator, freeze_backbone: bool, use_vllm: bool) -> None:
    """Refuse ways of spreading a model that the rounds can't work with."""
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP1 keeps no parameters that could be read between the rounds; set `fsdp_version: 2` in the accelerate "
            "config."
        )
    if freeze_backbone and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "`freeze_backbone` trains one layer, which there is no need to shard; launch it with DDP (`--multi_gpu`)."
        )
    if use_vllm and is_sharded(accelerator):
        raise ValueError("`use_vllm` takes the weights of one process, which are sharded here; leave one out.")


def spread(model: nn.Module) -> None:
    """
    Give every process its part of the weights alone again. After a forward pass without a backward one, FSDP2 leaves some
    of them whole, and who asks for the parameters would get copies that are thrown away.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """`dict[str, nn.Parameter]`: the parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def shape_of(parameter: nn.Parameter) -> list[int]:
    """`list[int]`: shape of a parameter, where it is whole."""
    # ZeRO-3 leaves an empty tensor in its place.
    return list(getattr(parameter, "ds_shape", parameter.shape))


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    The trainable weights of a model. Where it is sharded, every process has to ask for them at the same time.

    Args:
        model ([`~torch.nn.Module`]):
            Model, not wrapped.

    Returns:
        `dict[str, torch.Tensor]`: by name; the model's own where it is whole, copies on the CPU where it is sharded.
    """
    spread(model)
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in trainable_parameters(model).items():
        # One after the other, so that no device holds more than one of them whole.
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
    Put trainable weights into a model. Where it is sharded, every process has to do so at the same time.

    Args:
        model ([`~torch.nn.Module`]):
            Model, not wrapped.
        weights (`dict[str, torch.Tensor]`):
            A tensor on the CPU for each trainable parameter, the same in every process.
    """
    spread(model)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if isinstance(parameter, DTensor):
                value = weights[name].to(parameter.device, parameter.dtype)
                # Each process takes its own part: all of them hold the same tensor.
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
    """Have parameters whole in every process for a while, where ZeRO-3 has partitioned them."""
    if not any(_is_partitioned(parameter) for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if is_changed else None):
        yield


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")
