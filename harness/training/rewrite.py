"""A network's graph (torch.fx) with the layers that `harness.training.fused` knows in its place.

Every rule keeps the function, whatever else the network does: what is replaced has one user, so that nobody
else sees it; and a convolution moves down to the end of its chain only over nodes that write nothing.
"""
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from harness.training.fused import max_pool

RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
ADDITIONS = {operator.add, torch.add, "add"}
ADDITIONS_IN_PLACE = {operator.iadd, "add_"}
WRITE_NOTHING = {F.relu, torch.relu, "relu", *ADDITIONS, operator.mul, torch.mul, torch.cat, torch.flatten,
                 "flatten", "size", F.max_pool2d, max_pool, F.avg_pool2d, F.adaptive_avg_pool2d}
FRESH = (nn.Conv2d, nn.BatchNorm2d)  # their output is new memory, which their backward pass does not need


def rewrite(graph: Graph, modules: dict[str, nn.Module], conv_norm_relu: Callable) -> None:
    """Change `graph`, a trace of the network whose `modules` are given by name, in place."""
    Rewriting(graph, modules, conv_norm_relu).run()


class Rewriting:
    """One graph on its way."""

    def __init__(self, graph: Graph, modules: dict[str, nn.Module], conv_norm_relu: Callable):
        self.graph, self.modules, self.conv_norm_relu = graph, modules, conv_norm_relu

    def run(self) -> None:
        """Apply every rule to every node."""
        for node in list(self.graph.nodes):
            self._pool(node)
            self._average(node)
        for node in reversed(list(self.graph.nodes)):  # the last convolution before an addition takes it
            if self._is(node, nn.Conv2d):
                self._fuse(node)
        for node in list(self.graph.nodes):
            self._relu_in_place(node)
        self.graph.lint()

    # ---- what a node is ------------------------------------------------------------------------------------

    def _is(self, node: Node, *kinds: type) -> bool:
        """A call, with one argument, of a module of exactly one of these classes."""
        return (node.op == "call_module" and type(self.modules[node.target]) in kinds and len(node.args) == 1
                and isinstance(node.args[0], Node) and not node.kwargs)

    def _is_relu(self, node: Node) -> bool:
        called = node.op in ("call_function", "call_method") and node.target in RELUS
        fits = 1 <= len(node.args) <= 2 and isinstance(node.args[0], Node) and set(node.kwargs) <= {"inplace"}
        return self._is(node, nn.ReLU) or (called and fits)

    def _writes(self, node: Node) -> bool:
        """Whether a ReLU works in place."""
        if node.op == "call_module":
            return self.modules[node.target].inplace
        in_place = bool(node.kwargs.get("inplace", len(node.args) == 2 and node.args[1]))
        return in_place or node.target in ("relu_", torch.relu_)

    def _is_pool(self, node: Node) -> bool:
        """2x2 max-pooling with stride 2 and nothing else to it."""
        if self._is(node, nn.MaxPool2d):
            layer = self.modules[node.target]
            stride, kernel = layer.stride, layer.kernel_size
            options = (layer.padding, layer.dilation, layer.ceil_mode, layer.return_indices)
            plain = options in ((0, 1, False, False), ((0, 0), (1, 1), False, False))
            return plain and kernel in (2, (2, 2)) and stride in (2, (2, 2))
        if not (node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d)):
            return False
        names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        given = dict(zip(names, node.args)) | node.kwargs
        usual = {"stride": 2, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
        sizes = given.get("kernel_size") in (2, (2, 2)) and given.get("stride") in (None, 2, (2, 2))
        plain = all(given.get(name, value) in (value, (value, value), None) for name, value in usual.items())
        return isinstance(given.get("input"), Node) and sizes and plain

    def _only_user(self, node: Node) -> Node | None:
        """The one node that uses this one, once."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        once = user is not None and list(user.args).count(node) == 1 and node not in user.kwargs.values()
        return user if once else None

    def _is_fresh(self, node: Node) -> bool:
        pooled = node.op == "call_function" and node.target in (F.max_pool2d, max_pool)
        return self._is(node, *FRESH) or pooled

    def _owns(self, node: Node) -> bool:
        """Whether a value has one user, and memory of its own."""
        if len(node.users) != 1:
            return False
        if self._is_relu(node):
            return not self._writes(node) or self._owns(node.args[0])
        return self._is_fresh(node)

    def _writes_nothing(self, node: Node) -> bool:
        """Whether a node certainly writes to no memory but its own, or that of a value with no other user."""
        if node.op in ("placeholder", "get_attr"):
            return True
        if node.op == "call_module":
            layer = self.modules[node.target]
            known = type(layer).__module__.startswith("torch.nn.modules")
            quiet = known and not getattr(layer, "inplace", False)
            return quiet or (self._is_relu(node) and self._owns(node.args[0]))
        if self._is_relu(node) and self._writes(node):
            return self._owns(node.args[0])
        return node.target in WRITE_NOTHING or node.target is self.conv_norm_relu

    # ---- rules ---------------------------------------------------------------------------------------------

    def _pool(self, node: Node) -> None:
        """Pooling by `max_pool`, before a ReLU instead of after it: the same bits, a quarter of the ReLUs."""
        if not self._is_pool(node):
            return
        source = node.args[0] if node.args else node.kwargs["input"]
        relu = source if self._is_relu(source) and len(source.users) == 1 else None
        if relu and self._writes(relu) and not self._owns(relu.args[0]):
            relu = None
        with self.graph.inserting_before(node):
            pooled = self.graph.call_function(max_pool, (relu.args[0] if relu else source,))
            if relu:
                pooled = self.graph.call_function(F.relu, (pooled,), {"inplace": True})
        self._replace(node, pooled)
        if relu:
            self.graph.erase_node(relu)

    def _average(self, node: Node) -> None:
        """Adaptive average pooling, left out where the map has its size already."""
        if self._is(node, nn.AdaptiveAvgPool2d):
            size = self.modules[node.target].output_size
        elif node.op == "call_function" and node.target is F.adaptive_avg_pool2d and len(node.args) == 2:
            size = node.args[1]
        else:
            return
        source, size = node.args[0], (size, size) if isinstance(size, int) else size
        fixed = isinstance(size, tuple) and all(isinstance(side, int) for side in size)
        if not fixed or not self._owns(source):
            return
        with self.graph.inserting_before(node):
            self._replace(node, self.graph.call_function(average, (source, size)))

    def _relu_in_place(self, node: Node) -> None:
        """ReLU in the memory of a BatchNorm's output that nobody else sees."""
        if self._is_relu(node) and self._is(node.args[0], nn.BatchNorm2d) and len(node.args[0].users) == 1:
            with self.graph.inserting_before(node):
                self._replace(node, self.graph.call_function(F.relu, (node.args[0],), {"inplace": True}))

    def _fuse(self, conv: Node) -> None:
        """A convolution and what follows as one step, at the place of its last part."""
        chain, norm, add, in_place, relu = [conv], None, None, False, False
        if (user := self._next(chain)) is not None and self._is(user, nn.BatchNorm2d):
            norm = user
            chain.append(user)
        if (user := self._next(chain)) is not None and (other := self._summand(user, chain[-1])) is not None:
            add, in_place = other, user.target in ADDITIONS_IN_PLACE
            chain.append(user)
        if (user := self._next(chain)) is not None and self._is_relu(user):
            relu = True
            chain.append(user)
        with self.graph.inserting_before(chain[-1]):
            layers = [None if node is None else self.graph.get_attr(node.target) for node in (conv, norm)]
            step = self.graph.call_function(self.conv_norm_relu, (conv.args[0], *layers, add, relu, in_place))
        self._replace(chain[-1], step)
        for node in reversed(chain[:-1]):
            self.graph.erase_node(node)

    def _next(self, chain: list[Node]) -> Node | None:
        """The only user of the chain's value, if the convolution may be moved there."""
        user = self._only_user(chain[-1])
        if user is None:
            return None
        node = chain[0].next
        while node is not user:
            again = node.op == "call_module" and node.target in [one.target for one in chain]
            if node not in chain and (again or not self._writes_nothing(node)):
                return None  # `again`: a BatchNorm of two calls, whose statistics depend on their order
            node = node.next
        return user

    def _summand(self, node: Node, value: Node) -> Node | None:
        """The other summand where `node` adds something to `value`."""
        if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
            return None
        if node.target in ADDITIONS_IN_PLACE and node.args[0] is not value:
            return None  # a write to the other summand
        other = node.args[1] if node.args[0] is value else node.args[0]
        return other if node.target in ADDITIONS | ADDITIONS_IN_PLACE and isinstance(other, Node) else None

    def _replace(self, node: Node, by: Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)


def average(x: Tensor, size: tuple[int, int]) -> Tensor:
    """F.adaptive_avg_pool2d(x, size), which leaves a map of that size as it is."""
    return x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size)
