"""A backbone without BatchNorm: its statistics become part of the convolutions, ReLU and additions of their kernels."""

import copy
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from conditional_detr.deploy.kernels import Computation, FusedConv, of_any_size

_ANY_IMAGE = (2, 3, 160, 224)  # large enough that maps of different sizes stay apart
_ADDITIONS = (operator.add, operator.iadd, torch.add)


class FastBackbone(nn.Module):
    """The graph of a backbone, rewritten, which takes float32 pixels and gives maps in its own precision.

    Args:
        backbone: the plain backbone; it stays as it is.
        computation: what to compute in; oneDNN's kernels compute ReLU and additions with the convolution.
    """

    def __init__(self, backbone: nn.Module, computation: Computation) -> None:
        super().__init__()
        self.dtype = computation.dtype
        graph = _trace(copy.deepcopy(backbone).eval())
        _fold_norms(graph)
        graph.to(computation.dtype).to(memory_format=torch.channels_last)
        if computation.kernels:
            _fuse(graph)
        self.graph = graph
        apart = computation.kernels and computation.compiled  # the compiler's convolutions are slower than the kernels
        self._run: Any = torch.compiler.disable(self._maps_of_any_size) if apart else self._maps

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to the list of maps that the plain backbone gives."""
        return self._run(pixels)

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        return self.graph(pixels.to(dtype=self.dtype, memory_format=torch.channels_last))

    def _maps_of_any_size(self, pixels: Tensor) -> list[Tensor]:
        return [of_any_size(x) for x in self._maps(pixels)]


class _Tracer(fx.Tracer):
    """Sees frozen BatchNorm as one thing."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FrozenBatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _trace(backbone: nn.Module) -> fx.GraphModule:
    """Return a backbone as a graph, without what does nothing.

    Raises:
        ValueError: what the backbone does depends on the pixels, so there is no one graph.
    """
    try:
        traced = fx.GraphModule(backbone, _Tracer().trace(backbone))
    except Exception as error:  # of any kind: the backbone's own code runs on proxies
        raise ValueError(f"backbone: cannot be optimised, for it cannot be traced: {error}") from error
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    return traced


def _module(graph: fx.GraphModule, node: Any, kind: type[nn.Module]) -> Any:
    """Return the module that a node calls, if it is one of a kind."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = graph.get_submodule(str(node.target))
    return module if isinstance(module, kind) else None


def normalised_convolutions(backbone: nn.Module) -> list[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
    """Return each convolution whose output goes through a frozen BatchNorm and nowhere else, with that BatchNorm.

    Raises:
        ValueError: the backbone cannot be traced.
    """
    graph = _trace(backbone)
    return [(convolution, norm) for _, _, convolution, norm in _pairs(graph)]


def _called_once(graph: fx.GraphModule) -> set[Any]:
    """Return the names of modules that a graph calls in one place only."""
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    return {name for name, times in calls.items() if times == 1}


def _pairs(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node, nn.Conv2d, FrozenBatchNorm2d]]:
    """Give the nodes of a convolution and of the frozen BatchNorm after it, and the two modules."""
    once = _called_once(graph)
    for node in list(graph.graph.nodes):
        before: Any = node.args[0] if node.args else None
        norm, convolution = _module(graph, node, FrozenBatchNorm2d), _module(graph, before, nn.Conv2d)
        if norm is None or convolution is None or not {node.target, before.target} <= once:
            continue
        if len(before.users) == 1:
            yield before, node, convolution, norm


def _fold_norms(graph: fx.GraphModule) -> None:
    """Make each frozen BatchNorm part of the convolution before it."""
    for before, node, convolution, norm in _pairs(graph):
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        weight, bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
        convolution.weight, convolution.bias = weight, bias
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    _finish(graph)


def _fuse(graph: fx.GraphModule) -> None:
    """Let kernels compute what follows a convolution: ReLU, or the addition of a map of its size and then ReLU."""
    once = _called_once(graph)
    parameter = next(graph.parameters())
    ShapeProp(graph).propagate(parameter.new_zeros(_ANY_IMAGE))
    for node in list(graph.graph.nodes):
        convolution = _module(graph, node, nn.Conv2d)
        if convolution is None or node.target not in once or not pads_with_zeros(convolution):
            continue
        last: Any = node
        other = None
        user = _only_user(last)
        if user is not None and user.op == "call_function" and user.target in _ADDITIONS and not user.kwargs:
            parts = [part for part in user.args if part is not node]
            if len(parts) == 1 and _shape(node) is not None and _shape(parts[0]) == _shape(node):
                last, other = user, parts[0]
        user = _only_user(last)
        relu = _module(graph, user, nn.ReLU) is not None
        last = user if relu else last
        path = f"{str(node.target).replace('.', '_')}_fused"
        graph.add_submodule(path, FusedConv(convolution, relu=relu))
        with graph.graph.inserting_before(last):
            fused = graph.graph.call_module(path, (node.args[0], other) if other else (node.args[0],))
        fused.meta = dict(last.meta)
        last.replace_all_uses_with(fused)
        while last is not node:  # from the last to the convolution
            before = next(part for part in last.all_input_nodes if part is not other)
            graph.graph.erase_node(last)
            last = before
        graph.graph.erase_node(node)
    _finish(graph)


def pads_with_zeros(convolution: nn.Conv2d) -> bool:
    """Return whether a convolution pads, if at all, with zeros and by numbers: only those have fused kernels."""
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def _shape(node: Any) -> tuple[int, ...] | None:
    """Return the shape of what a node gives, if it is a tensor of the image that was sent through."""
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def _only_user(node: fx.Node) -> fx.Node | None:
    """Return the one node that uses another; None if there are several."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _finish(graph: fx.GraphModule) -> None:
    """Compile a changed graph, and leave out the modules that it no longer calls."""
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
