"""Single nodes of autograd's graph: their kinds, their hooks, and the tensors that they save."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.autograd.graph import get_gradient_edge

# A node is recognised only by its type: a custom Function may store anything under any attribute of its node
LeafNode: Any = type(get_gradient_edge(torch.zeros((), device="cpu", requires_grad=True)).node)
FunctionNode: Any = torch._C._FunctionBase  # defined by Python code

_SAVED_NAMES: WeakKeyDictionary[type, tuple[str, ...]] = WeakKeyDictionary()  # attributes, by type of the node


def kind(node: Any) -> str:
    """Return the type name of one of torch's own nodes; an empty text for a node that Python code defines."""
    return "" if isinstance(node, FunctionNode) else type(node).__name__


def sequence_number(node: Any) -> int:
    """Return the place of a node's operation in the forward pass."""
    number: int = FunctionNode._sequence_nr(node) if isinstance(node, FunctionNode) else node._sequence_nr()
    return number


def has_hooks(node: Any) -> bool:
    """Return whether Python code has registered hooks on a node."""
    for register in (node.register_prehook, node.register_hook):
        handle = register(_no_change)
        hooks = handle.hooks_dict_ref()  # all hooks of a node share the dict that a further handle refers to
        handle.remove()
        if hooks:
            return True
    return False


def is_packed(saved: Any) -> bool:
    """Return whether a hook unpacks a saved tensor, given as torch's raw record of it."""
    # An older torch lacks the attribute, so the answer must be the safe one
    return saved is not None and getattr(saved, "unpack_hook", _no_change) is not None


def saved_tensors(node: Any) -> list[Any]:
    """Return torch's raw records of the tensors that a node has saved, if Python code does not define the node."""
    names = _saved_names(type(node))
    return [saved for name in names for saved in _as_tuple(getattr(node, name))] if names else []


def _no_change(*_: Any) -> None:
    """Leave a gradient as it is."""


def _saved_names(node_type: type) -> tuple[str, ...]:
    names = _SAVED_NAMES.get(node_type)
    if names is None:
        names = _SAVED_NAMES[node_type] = tuple(name for name in dir(node_type) if name.startswith("_raw_saved_"))
    return names


def _as_tuple(saved: Any) -> tuple[Any, ...]:
    return tuple(saved) if isinstance(saved, list | tuple) else (saved,)
