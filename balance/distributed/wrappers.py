"""Wrappers of a model that reduce its gradients over ranks in an ordinary backward pass."""

from __future__ import annotations

import gc
import sys
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from .sharding import sharded_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping, Sequence
    from weakref import ReferenceType

    from torch import Tensor

_REFUSED = {  # wrappers whose parameters are not what their modules list, by module and class
    ("torch.distributed.fsdp", "FullyShardedDataParallel"): "FSDP1",
    ("deepspeed", "DeepSpeedEngine"): "DeepSpeed",
}
_HASHES = 1 << 20  # squares of so small hashes, and their sums over ranks, are exact in float64

_OWNERS: MutableMapping[Tensor, ReferenceType[DistributedDataParallel] | None] = WeakTensorKeyDictionary()


class Model(NamedTuple):
    """Parameters of a model, in an order that is equal on all ranks.

    Attributes:
        wrappers: The DistributedDataParallel modules that contain a parameter that this rank's losses reach.
        parameters: Their trainable parameters, then the reached parameters that belong to no wrapper.
        num_free: Number of parameters that belong to no wrapper.
        is_sharded: Whether FSDP2 shards the parameters, which are then the sharded ones.
    """

    wrappers: list[DistributedDataParallel]
    parameters: list[Tensor]
    num_free: int
    is_sharded: bool = False

    @property
    def layout(self) -> int:
        """A number that is the same on two ranks only if their parameters have the same sizes in the same order."""
        sizes = [len(self.wrappers), self.num_free, *(parameter.numel() for parameter in self.parameters)]
        return zlib.crc32(repr(sizes).encode()) % _HASHES

    @property
    def is_wrapped(self) -> bool:
        """True if wrappers reduce the gradients of all parameters in an ordinary backward pass."""
        return self.is_sharded or (bool(self.wrappers) and not self.num_free)

    @property
    def order_is_known(self) -> bool:
        """True if the order is certain also for parameters that the losses of this rank do not reach."""
        return len(self.wrappers) == 1 and not self.num_free

    def heads(self, excluded: Iterable[Tensor]) -> list[Tensor]:
        """Return all parameters but some."""
        ids = {id(tensor) for tensor in excluded}
        return [parameter for parameter in self.parameters if id(parameter) not in ids]


def read_model(leaves: Sequence[Tensor]) -> Model:
    """Return the model of some leaf tensors of a graph.

    Args:
        leaves: Leaf tensors that require a gradient, in the order of a walk through the graph.

    Raises:
        RuntimeError: If a wrapper other than DistributedDataParallel reduces gradients in the process.
    """
    if sharded := sharded_parameters(leaves):
        if any(id(leaf) not in sharded for leaf in leaves):
            raise RuntimeError(
                "Either all parameters that the losses reach must be sharded or none, but only some are. Call fully_shard on "
                "the whole model too, after its parts."
            )
        return Model([], list({id(p): p for p in (sharded[id(leaf)] for leaf in leaves)}.values()), 0, is_sharded=True)
    new = [leaf for leaf in leaves if leaf not in _OWNERS]
    if new:
        _find_owners(new)
    owners = [None if (owner := _OWNERS[leaf]) is None else owner() for leaf in leaves]
    wrappers = list({id(wrapper): wrapper for wrapper in owners if wrapper is not None}.values())
    free = [leaf for leaf, wrapper in zip(leaves, owners, strict=True) if wrapper is None]
    wrapped = [parameter for wrapper in wrappers for parameter in _reduced_parameters(wrapper) if parameter.requires_grad]
    parameters = list({id(parameter): parameter for parameter in (*wrapped, *free)}.values())
    return Model(wrappers, parameters, len(free))


def _find_owners(leaves: Sequence[Tensor]) -> None:
    """Find the wrappers that contain leaf tensors. A tensor has no reference to them, so all objects are searched."""
    refused = _refused_classes()
    modules = []
    for instance in gc.get_objects():
        if issubclass(type(instance), DistributedDataParallel):
            modules.append(instance)
        elif refused and type(instance) in refused:
            raise RuntimeError(
                f"Balancer does not support {refused[type(instance)]}, whose gradients only its own backward pass reduces. Use "
                "DistributedDataParallel or FSDP2 (fully_shard)."
            )
    owners = {id(parameter): ref(module) for module in modules for parameter in _reduced_parameters(module)}
    for leaf in leaves:
        _OWNERS[leaf] = owners.get(id(leaf))


def _reduced_parameters(wrapper: DistributedDataParallel) -> Iterable[Tensor]:
    """Return the parameters that a wrapper reduces: all except for the parameters that it ignores."""
    ignored = wrapper.parameters_to_ignore
    if not ignored:
        return wrapper.parameters()
    return [parameter for name, parameter in wrapper.module.named_parameters() if name not in ignored]


def is_inside_forward() -> bool:
    """Return whether the forward pass of a DistributedDataParallel module is running, as in Lightning's ``training_step``.

    The wrapper then has not seen the losses yet, so that it does not prepare for their backward pass.
    """
    return DistributedDataParallel._active_ddp_module is not None


def _refused_classes() -> dict[type, str]:
    classes: dict[type, str] = {}
    for (module, name), label in _REFUSED.items():
        kind: Any = getattr(sys.modules.get(module), name, None)
        if kind is not None:
            classes[kind] = label
    return classes
