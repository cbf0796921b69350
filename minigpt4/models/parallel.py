"""A model over several processes: copies of the trained part, and slices of a language model too large for a card.

Frozen weights never travel between copies: every process reads them from the same files.
"""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minigpt4.common import dist_utils


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """Wraps a model so that the gradients of its trained parameters, and nothing else, are averaged over the ranks."""
    if dist_utils.get_world_size() == 1 or not any(p.requires_grad for p in model.parameters()):
        return model
    ignored = [name for name, p in model.named_parameters() if not p.requires_grad]
    ignored += [name for name, _ in model.named_buffers()]  # constants, all of them
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device.index])


def shard_language_model(llama: nn.Module, device: torch.device) -> None:
    """Slices a frozen LM's decoder over all ranks (FSDP2); a layer is whole on a card only while it computes.

    Token embeddings and output layer stay whole everywhere: they are used outside the decoder's own forward.
    Call it on the meta device, and fill the slices with ``local_slice``.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    mesh = init_device_mesh(device.type, (dist_utils.get_world_size(),))
    for layer in llama.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(llama.model, mesh=mesh, ignored_params={llama.model.embed_tokens.weight})


def local_slice(whole: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """This rank's slice of a tensor, copied to the device, in the form of a sharded parameter."""
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh
    slices = whole.chunk(mesh.size(), 0)
    mine = slices[mesh.get_local_rank()] if mesh.get_local_rank() < len(slices) else whole[:0]
    return DTensor.from_local(
        mine.to(device, copy=True),
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
