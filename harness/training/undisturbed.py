"""A network as it is beside the values of its parameters: to be compared with later, and to be put back."""
import enum
import functools
import operator
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KINDS_OF_HOOKS = {f"{name}_{kind}" for name in HOOKS for kind in ("with_kwargs", "always_called")}
IRRELEVANT = KINDS_OF_HOOKS | {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
                               "_load_state_dict_post_hooks", "_non_persistent_buffers_set"}
FIXED = (bool, int, float, complex, str, bytes, type(None), type, range, slice, enum.Enum, Tensor, nn.Module,
         types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial,
         torch.dtype, torch.device, torch.layout, torch.memory_format)


class NetworkState:
    """What a network is made of beside the values of its tensors; can be compared with later, and put back.

    visible: whether every change of it would be seen; hooked: whether a pass does more than `forward` as its
    class has it.
    """

    def __init__(self, network: nn.Module):
        self.visible, self.hooked = True, False
        self.empty: list[object] = []                # containers without contents
        self.full: list[tuple[object, tuple, tuple]] = []  # containers, their contents, their names
        self._seen: set[int] = set()
        for module in network.modules():
            attributes = vars(module)
            self.hooked |= "forward" in attributes or any(attributes[name] for name in HOOKS)
            self.hooked |= isinstance(module, nn.utils.parametrize.ParametrizationList)
            self._add(attributes)
        self.parameters = list(network.parameters())
        self.trainable = [parameter.requires_grad for parameter in self.parameters]

    def _add(self, container: object) -> None:
        if id(container) in self._seen:
            return
        self._seen.add(id(container))
        contents = tuple(container.values() if isinstance(container, dict) else container)
        names = tuple(container)
        if contents:
            self.full.append((container, contents, names))
        else:
            self.empty.append(container)
        for name, value in zip(names, contents):
            if not (isinstance(name, str) and name in IRRELEVANT):
                self._look_into(value)

    def _look_into(self, value: object) -> None:
        if isinstance(value, (dict, list, set, deque)):
            self._add(value)
        elif isinstance(value, (tuple, frozenset)):
            for part in value:
                self._look_into(part)
        elif isinstance(value, FIXED):
            return
        elif isinstance(value, types.SimpleNamespace) or _is_its_attributes(value):
            self._add(vars(value))
        else:
            self.visible = False

    def is_same(self) -> bool:
        """Whether all is as it was, by identity: at every pass, so in few steps of the interpreter."""
        if any(self.empty) or [parameter.requires_grad for parameter in self.parameters] != self.trainable:
            return False
        for container, contents, _ in self.full:
            values = container.values() if isinstance(container, dict) else container
            if len(container) != len(contents) or not all(map(operator.is_, values, contents)):
                return False
        return True

    def restore(self) -> None:
        """Put everything back that was in a container."""
        for container in self.empty:
            container.clear()
        for container, contents, names in self.full:
            container.clear()
            if isinstance(container, dict):
                container.update(zip(names, contents))
            elif isinstance(container, set):
                container.update(contents)
            else:
                container.extend(contents)


class _Plain:
    """An object of nothing but attributes."""


def _is_its_attributes(value: object) -> bool:
    """Whether an object holds nothing beside what `vars` gives, as a random number generator does."""
    return hasattr(value, "__dict__") and type(value).__basicsize__ <= _Plain.__basicsize__


@contextmanager
def undisturbed(network: nn.Module, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Put back random states, buffers and what modules hold; yields whether more changed than layers change.

    Dropout and BatchNorm change torch's random states and the values of buffers.
    """
    state, foreign, own = NetworkState(network), _foreign_random_states(), random_states(device)
    tensors = [(tensor, tensor.data) for tensor in (*network.parameters(), *network.buffers())]
    values = [(buffer, buffer.clone()) for buffer in network.buffers()]

    def is_replaced(tensor: Tensor, before: Tensor) -> bool:
        return tensor.data_ptr() != before.data_ptr()

    def disturbed() -> bool:
        replaced = any(is_replaced(tensor, before) for tensor, before in tensors)
        return replaced or not state.is_same() or not _equal(_foreign_random_states(), foreign)

    try:
        yield disturbed
    finally:
        state.restore()
        for tensor, before in tensors:
            if is_replaced(tensor, before):
                tensor.data = before
        for buffer, value in values:
            buffer.data.copy_(value)
        torch.set_rng_state(own[0])
        if len(own) > 1:
            getattr(torch, device.type).set_rng_state(own[1], device)
        random.setstate(foreign[0])
        np.random.set_state(foreign[1])


def random_states(device: torch.device) -> list[Tensor]:
    """torch's random states: the CPU's, and the device's own where it is another."""
    own = [] if device.type in ("cpu", "meta") else [getattr(torch, device.type).get_rng_state(device)]
    return [torch.get_rng_state(), *own]


def _foreign_random_states() -> tuple[tuple, tuple]:
    return random.getstate(), np.random.get_state()


def _equal(one: tuple[tuple, tuple], other: tuple[tuple, tuple]) -> bool:
    return one[0] == other[0] and all(map(np.array_equal, one[1], other[1]))
