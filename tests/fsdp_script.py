"""
`run_script.py` with the weights sharded by FSDP2, on CPUs. Accelerate shards on accelerators only, though PyTorch's FSDP2
and gloo do it on CPUs too; here the processes are taken for those of accelerators, and nothing else is different.
"""

import json
import os
import sys

import run_script
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def with_sharding() -> None:
    """Have accelerate shard the models of this process."""
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
        FSDP_CPU_RAM_EFFICIENT_LOADING="true",
    )
    real = PartialState.__init__

    def init(state, *args, **kwargs):
        real(state, *args, **kwargs)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


if __name__ == "__main__":
    torch.set_num_threads(1)
    with_sharding()
    run_script.main(**json.loads(sys.argv[1]))
    torch.distributed.destroy_process_group()
