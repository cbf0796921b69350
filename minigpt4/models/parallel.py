"""A model on several processes: replicas of the trained part (DDP), and shards of a frozen language model (FSDP2).

Frozen weights are never communicated between replicas: every process reads them from the same files.
"""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minigpt4.common import dist_utils


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Wraps a model in DDP, which averages the gradients of its trained parameters over the ranks.

    Rank 0's trained parameters are copied to all ranks; parameters without gradient and buffers are not communicated.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if dist_utils.get_world_size() == 1 or not trained:
        return model
    for parameter in trained:
        dist.broadcast(parameter.detach(), src=0)
    with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, which 2.10 does not have by the new name
        warnings.simplefilter("ignore", FutureWarning)
        device_ids = None if device.type == "cpu" else [device.index]
        return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False, init_sync=False)


def shard_language_model(llm: nn.Module, device: torch.device) -> None:
    """Shards the decoder layers of a frozen language model of transformers over all ranks (FSDP2).

    A layer is whole on a device only while it computes. Token embeddings and output layer are replicated: they are used
    outside the decoder's own forward. Call it on the meta device, then fill the shards with ``local_shard``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    mesh = init_device_mesh(device.type, (dist_utils.get_world_size(),))
    decoder = llm.base_model
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh, ignored_params={llm.get_input_embeddings().weight})


def local_shard(whole: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """Returns this rank's shard of a tensor, copied to the device, in the form of the sharded ``parameter``."""
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh
    shards = whole.chunk(mesh.size(), 0)
    mine = shards[mesh.get_local_rank()] if mesh.get_local_rank() < len(shards) else whole[:0]
    form = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(mine.to(device, copy=True), mesh, parameter.placements, **form)
