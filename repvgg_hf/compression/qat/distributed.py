"""Parameters that are spread over several processes."""

import contextlib

import torch.distributed as distributed
from torch import nn


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` whose parameters `fully_shard` (FSDP) has spread over the ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextlib.contextmanager
def gathered(model: nn.Module):
    """A context in which every rank has all parameters of `model`."""
    sharded = sharded_modules(model)
    try:
        for module in sharded:
            module.unshard()
        yield
    finally:
        for module in sharded:
            module.reshard()
