"""The attack's view of a network: the same function, run faster, and checked before it is used.

torch.fx traces the network, down to the modules of torch.nn. What is recognised in the graph runs by
`harness.training.fused`:

    conv [-> BatchNorm] [-> addition] [-> ReLU]     one step
    ReLU -> 2x2 max-pooling                         the pooling first: a quarter of the ReLUs, the same bits
    BatchNorm -> ReLU                               in the memory of the BatchNorm's output
    adaptive average pooling to the map's own size  nothing: a mean of one number is the number

A form belongs to one state of the network: its modules, their modes, what they hold beside tensors, and what
is trainable. It is made at the first pass in that state, and is used only if
  - no module has a hook, a parametrization or a forward of its own instance, then or at any later pass;
  - no tensor operation runs while the network is traced: its result would be a constant of the form; and the
    network turns neither gradients nor autocast off or on, has no gradients of its own, and does without
    checkpointing;
  - the network's own pass writes nothing that was there before, but the buffers of the modules of torch.nn;
  - its logits, and the gradients for the images and the trainable parameters, are the network's own.
Else, and for control flow that depends on values, the network itself is run. All of this is silent, and
leaves no trace on the network, its random numbers or its statistics. What `forward` reads from outside of the
network, such as a global variable, is as it was when the form was made.
"""
import enum
import functools
import inspect
import operator
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.training import fused
from harness.training.rewrite import rewrite

SAMPLE = 4  # images of the first batch that a form is checked on
MOST = 32   # forms: a network that changes its state more often is run itself

# How far a form may be from the network, as a part of the whole tensor's length. With every step as its
# modules it does the same operations in the same order, which only a GPU's atomic additions round
# differently. With fused steps, sums of some thousand products are added in another order, which is 1e-6 of a
# logit; ReLUs that are zero up to this then change sides, and with them single pixels of the gradient: up to
# 4e-3 of it was seen.
SAME, SAME_GRADIENT = 1e-6, 1e-5
ROUNDED, ROUNDED_GRADIENT = 1e-4, 5e-2

REFUSED = [(torch.no_grad, "__enter__"), (torch.enable_grad, "__enter__"),
           (torch.set_grad_enabled, "__init__"), (torch.inference_mode, "__enter__"),
           (torch.autocast, "__enter__"), (torch.autograd.Function, "apply"),
           (torch.autograd.graph.saved_tensors_hooks, "__enter__")]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KINDS_OF_HOOKS = {f"{name}_{kind}" for name in HOOKS for kind in ("with_kwargs", "always_called")}
IRRELEVANT = KINDS_OF_HOOKS | {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
                               "_load_state_dict_post_hooks", "_non_persistent_buffers_set"}
GLOBAL_HOOKS = [getattr(torch_hooks, f"_global{name}") for name in HOOKS]
FIXED = (bool, int, float, complex, str, bytes, type(None), type, range, slice, enum.Enum, Tensor, nn.Module,
         types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial,
         torch.dtype, torch.device, torch.layout, torch.memory_format)


class AttackView:
    """`view(x)` gives the logits of `network`, x [B, C, H, W]: by the fast form of its state, else by itself.

    No nn.Module, so that a parameter has one name. A copy of the view, or of what holds it, is a view of the
    copied network.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.forms: list[_Form] = []
        self.folded: WeakKeyDictionary[nn.Module, fused.Folded] = WeakKeyDictionary()

    def __reduce__(self) -> tuple:
        return AttackView, (self.network,)

    def __call__(self, x: Tensor) -> Tensor:
        """The logits [B, K]."""
        run = self._form(x)
        return self.network(x) if run is None else run(x)

    @property
    def used(self) -> bool:
        """Whether a form has been made that is used."""
        return any(form.run is not None for form in self.forms)

    def _form(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        if type(x) is not Tensor or x.ndim != 4 or any(GLOBAL_HOOKS) or _is_transformed():
            return None
        surroundings = _surroundings(x)
        for form in self.forms:
            if form.surroundings == surroundings and form.state.is_same():
                return form.run
        if len(self.forms) == MOST:
            return None
        state = _State(self.network)
        run = None if state.hooked or not state.visible else _make(self.network, x, state, self.folded)
        self.forms.append(_Form(state, surroundings, run))
        return run


class _Form:
    """What runs (None: the network itself) in a state of the network and of torch."""

    def __init__(self, state: "_State", surroundings: tuple, run: Callable[[Tensor], Tensor] | None):
        self.state, self.surroundings, self.run = state, surroundings, run


def _is_its_attributes(value: object) -> bool:
    """Whether an object holds nothing beside what `vars` gives, as a random number generator does."""
    return hasattr(value, "__dict__") and type(value).__basicsize__ <= _Form.__basicsize__


def _is_transformed() -> bool:
    """Whether torch.compile, torch.jit, torch.func or inference mode has hold of this pass."""
    compiled = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return compiled or torch.is_inference_mode_enabled() or torch._C._are_functorch_transforms_active()


def _surroundings(x: Tensor) -> tuple:
    """What a network's forward may ask of torch."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return kind, x.dtype, autocast, torch.is_grad_enabled()


class _State:
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


# ---- making a form -----------------------------------------------------------------------------------------


def _make(network: nn.Module, x: Tensor, state: _State,
          folded: WeakKeyDictionary) -> Callable[[Tensor], Tensor] | None:
    """The form for this state of the network, None where it is to be run itself."""
    sample = x.detach()[:SAMPLE].clone(memory_format=torch.preserve_format)
    try:
        with _undisturbed(network, x.device) as disturbed, _Writes(network) as writes:
            network(sample)
            if writes.found or disturbed():
                return None
        with _undisturbed(network, x.device):
            run = _traced(network, folded)
        with _nothing_hidden(state.parameters):
            return run if _agree(network, run, sample, state.parameters) else None
    except Exception:  # of any kind: the network's own on fewer images, of tracing, of running the form
        return None
    finally:
        folded.clear()  # of the numbers in the place of zeros


def _traced(network: nn.Module, folded: WeakKeyDictionary) -> Callable[[Tensor], Tensor]:
    """The network's graph with what is recognised in it as fused steps, as a function."""
    others = list(inspect.signature(type(network).forward).parameters.values())[2:]
    defaults = {other.name: other.default for other in others if other.default is not inspect.Parameter.empty}
    with _Nothing(), _refused():
        graph = _Tracer().trace(network, concrete_args=defaults)

    def conv_norm_relu(x, conv, norm, add, relu, in_place):
        plus = operator.iadd if in_place else operator.add
        return fused.conv_norm_relu(x, conv, norm, add, relu, plus, folded)

    rewrite(graph, dict(network.named_modules()), conv_norm_relu)
    return fx.GraphModule(network, graph).forward


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True


@contextmanager
def _refused() -> Iterator[None]:
    """Raise at what a trace leaves out: switched gradients or autocast, checkpointing, own gradients."""
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("this does not show in a trace")

    before = [(kind, name, vars(kind)[name]) for kind, name in REFUSED]
    try:
        for kind, name in REFUSED:
            setattr(kind, name, refuse)
        yield
    finally:
        for kind, name, value in before:
            setattr(kind, name, value)


class _Nothing(TorchDispatchMode):
    """Raises at any tensor operation."""

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        raise RuntimeError(f"{function} would be a constant of the form")


class _Writes(TorchDispatchMode):
    """Finds writes to what was there before, but to buffers of torch.nn's modules, and undoes them."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []
        tracer = _Tracer()
        leaves = [module for module in network.modules() if tracer.is_leaf_module(module, "")]
        self.allowed = {_storage(buffer) for module in leaves for buffer in module.buffers()}

    def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        arguments = function._schema.arguments
        named = kwargs or {}
        given = list(zip(arguments, args))
        given += [(argument, named[argument.name]) for argument in arguments if argument.name in named]
        for argument, value in given:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    if _storage(tensor) not in self.allowed:
                        self.found.append((tensor, tensor.clone()))
        before = {_storage(tensor) for tensor in _tensors((args, named))}
        result = function(*args, **named)
        self.allowed |= {_storage(tensor) for tensor in _tensors(result)} - before
        return result

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, value in reversed(self.found):
                tensor.copy_(value)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _undisturbed(network: nn.Module, device: torch.device) -> Iterator[Callable[[], bool]]:
    """Put back random states, buffers and what modules hold; yields whether more changed than layers change.

    Dropout and BatchNorm change torch's random states and the values of buffers.
    """
    state, foreign, random_states = _State(network), _foreign_random_states(), _random_states(device)
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
        torch.set_rng_state(random_states[0])
        if len(random_states) > 1:
            getattr(torch, device.type).set_rng_state(random_states[1], device)
        random.setstate(foreign[0])
        np.random.set_state(foreign[1])


def _random_states(device: torch.device) -> list[Tensor]:
    own = [] if device.type in ("cpu", "meta") else [getattr(torch, device.type).get_rng_state(device)]
    return [torch.get_rng_state(), *own]


def _foreign_random_states() -> tuple[tuple, tuple]:
    return random.getstate(), np.random.get_state()


def _equal(one: tuple[tuple, tuple], other: tuple[tuple, tuple]) -> bool:
    return one[0] == other[0] and all(map(np.array_equal, one[1], other[1]))


@contextmanager
def _nothing_hidden(parameters: list[Tensor]) -> Iterator[None]:
    """Random numbers for parameters of zeros only, as of a last layer at its start: they hide the rest."""
    zeros = [parameter for parameter in parameters if not bool(parameter.any())]
    try:
        for k, parameter in enumerate(zeros):  # by `data`: a graph that is kept does not notice
            parameter.data.normal_(0.0, 0.1, generator=torch.Generator(parameter.device).manual_seed(k))
        yield
    finally:
        for parameter in zeros:
            parameter.data.zero_()


def _agree(network: nn.Module, run: Callable[[Tensor], Tensor], sample: Tensor,
           parameters: list[Tensor]) -> bool:
    """Whether `run` gives what the network gives: logits as in this pass, gradients without autocast."""
    def results(function: Callable, as_modules: bool, gradients: bool) -> list[list[Tensor]]:
        with _undisturbed(network, sample.device), fused.as_modules(as_modules):
            return _results(function, network, sample, parameters, gradients)

    kind, gradients = sample.device.type, torch.is_grad_enabled()
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, dtype, cache_enabled=False):  # a cast that is kept would have no graph
            if not _near(results(run, True, False), results(network, True, False), SAME, SAME_GRADIENT):
                return False
    cudnn = {name: getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    with torch.autocast(kind, enabled=False), torch.backends.cudnn.flags(**cudnn, allow_tf32=False):
        expected = results(network, True, gradients)
        if not _near(results(run, True, gradients), expected, SAME, SAME_GRADIENT):
            return False
        fuses = not all(parameter.requires_grad for parameter in parameters)
        return not fuses or _near(results(run, False, gradients), expected, ROUNDED, ROUNDED_GRADIENT)


def _results(function: Callable[[Tensor], Tensor], network: nn.Module, sample: Tensor,
             parameters: list[Tensor], gradients: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What a pass gives and leaves behind, and its gradients for the images and the trainable parameters."""
    x = sample.clone(memory_format=torch.preserve_format).requires_grad_(gradients)
    sources = [x, *(parameter for parameter in parameters if parameter.requires_grad)]
    logits = function(x)
    found = []
    if gradients and logits.requires_grad:
        slopes = torch.linspace(-1.0, 1.0, logits.numel(), dtype=logits.dtype, device=logits.device)
        slopes = slopes.view_as(logits)
        found = torch.autograd.grad(logits, sources, slopes, allow_unused=True)
        found = [sample.new_zeros(()) if gradient is None else gradient for gradient in found]
    left = [buffer.clone() for buffer in network.buffers()] + _random_states(sample.device)
    return [logits.detach(), *left], found


def _near(found: tuple[list, list], expected: tuple[list, list], values: float, gradients: float) -> bool:
    return all(len(some) == len(others) and all(_is_near(a, b, tolerance) for a, b in zip(some, others))
               for some, others, tolerance in zip(found, expected, (values, gradients)))


def _is_near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """|found - expected| <= tolerance |expected| in l_2; never for tensors that are not finite."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    found, expected = found.double(), expected.double()
    return bool((found - expected).norm() <= tolerance * expected.norm())
