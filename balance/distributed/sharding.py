"""Parameters that FSDP2 (``fully_shard``) shards, and the gathered tensors that replace them during a step."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping, Sequence
    from weakref import ReferenceType

    from torch import Tensor
    from torch.distributed import ProcessGroup

_FSDP = "torch.distributed.fsdp._fully_shard._fsdp_param"
_SHARDED: MutableMapping[Tensor, ReferenceType[Any] | None] = WeakTensorKeyDictionary()  # by gathered tensor


def is_distributed_tensor(tensor: object) -> bool:
    """Return whether a tensor is distributed over ranks (a DTensor)."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there are none
    return module is not None and isinstance(tensor, module.DTensor)


def may_be_sharded() -> bool:
    """Return whether any parameter of this process can be sharded, which needs torch.distributed."""
    return _FSDP in sys.modules and torch.distributed.is_initialized()


def sharded_parameters(leaves: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return the sharded parameters of leaf tensors, by the ids of the leaf tensors; leaf tensors without are left out.

    During a step FSDP2 replaces its parameters by gathered tensors, which are the leaves of the graph. Only its records
    connect the two.
    """
    if not may_be_sharded():
        return {}
    module: Any = sys.modules[_FSDP]
    leaves = list(leaves)
    if new := [leaf for leaf in leaves if leaf not in _SHARDED]:
        records = [instance for instance in gc.get_objects() if type(instance) is module.FSDPParam]
        by_id = {id(record.sharded_param): record.sharded_param for record in records}
        by_id |= {id(getattr(record, "_unsharded_param", record.sharded_param)): record.sharded_param for record in records}
        for leaf in new:
            parameter = by_id.get(id(leaf))
            _SHARDED[leaf] = None if parameter is None else ref(parameter)
    pairs = [(id(leaf), None if (weak := _SHARDED[leaf]) is None else weak()) for leaf in leaves]
    return {key: parameter for key, parameter in pairs if parameter is not None}


def local_shard(tensor: Any) -> Tensor:
    """Return this rank's shard of a distributed tensor, flat."""
    shard: Tensor = tensor.to_local().detach().reshape(-1)
    return shard


def from_shard(shard: Tensor, parameter: Any) -> Tensor:
    """Return a distributed tensor like a sharded parameter, given this rank's shard, flat."""
    module: Any = sys.modules["torch.distributed.tensor"]
    shard = shard.view(parameter.to_local().shape).to(parameter.dtype)
    result: Tensor = module.DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return result


def shard_group(parameters: Sequence[Any]) -> ProcessGroup:
    """Return the ranks that together have one copy of all parameters: with replicas, the ranks of one replica.

    Args:
        parameters: Sharded parameters.

    Raises:
        RuntimeError: If they are sharded over different ranks, or in several dimensions.
    """
    layouts = {(parameter.device_mesh, _sharded_dims(parameter)) for parameter in parameters}
    dims = next(iter(layouts))[1]
    if len(layouts) != 1 or len(dims) != 1:
        raise RuntimeError(
            "All parameters must be sharded by fully_shard over one dimension of one mesh, but they are not. Tensor "
            "parallelism is not supported."
        )
    group: ProcessGroup = parameters[0].device_mesh.get_group(dims[0])
    return group


def _sharded_dims(parameter: Any) -> tuple[int, ...]:
    return tuple(dim for dim, placement in enumerate(parameter.placements) if placement.is_shard())
