"""Optimise a backbone: fold BatchNorm into the convolutions, and fuse ReLU and additions into their kernels."""

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

from conditional_detr.deploy.kernels import Computation, FusedConv, MapMemory, mark_dynamic_size

_EXAMPLE_SHAPE = (2, 3, 160, 224)  # large enough that different feature maps have different sizes
_NEW_MAPS = (FusedConv, nn.MaxPool2d)  # never return a view of their first input
_ADDITIONS = (operator.add, operator.iadd, torch.add)


class FastBackbone(nn.Module):
    """Optimised graph of a backbone, which takes float32 pixels and returns feature maps in its own dtype.

    Args:
        backbone: the plain backbone; it is not changed.
        computation: dtype and kernels; oneDNN's kernels compute ReLU and additions with the convolution.
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
        eager = computation.kernels and computation.compiled  # the compiler's convolutions are slower than the kernels
        self._run: Any = torch.compiler.disable(self._dynamic_maps) if eager else self._maps

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the feature maps of the plain backbone for pixels (B, 3, H, W)."""
        return self._run(pixels)

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        return self.graph(pixels.to(dtype=self.dtype, memory_format=torch.channels_last))

    def _dynamic_maps(self, pixels: Tensor) -> list[Tensor]:
        return [mark_dynamic_size(x) for x in self._maps(pixels)]


class _Tracer(fx.Tracer):
    """Tracer that keeps frozen BatchNorm as one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FrozenBatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _trace(backbone: nn.Module) -> fx.GraphModule:
    """Return the graph of a backbone, without identities.

    Raises:
        ValueError: the control flow of the backbone depends on the pixels.
    """
    try:
        traced = fx.GraphModule(backbone, _Tracer().trace(backbone))
    except Exception as error:  # of any type: the backbone's own code runs on proxies
        raise ValueError(f"backbone: expected one that torch.fx can trace, got an error: {error}") from error
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
    return traced


def _module(graph: fx.GraphModule, node: Any, expected: type[nn.Module] | tuple[type[nn.Module], ...]) -> Any:
    """Return the module that a node calls if it is of an expected type, else None."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    module = graph.get_submodule(str(node.target))
    return module if isinstance(module, expected) else None


def normalised_convolutions(backbone: nn.Module) -> list[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
    """Return each convolution whose only consumer is a frozen BatchNorm, with that BatchNorm.

    Raises:
        ValueError: the backbone cannot be traced.
    """
    graph = _trace(backbone)
    return [(convolution, norm) for _, _, convolution, norm in _pairs(graph)]


def _called_once(graph: fx.GraphModule) -> set[Any]:
    """Return the names of the modules that a graph calls exactly once."""
    calls = Counter(node.target for node in graph.graph.nodes if node.op == "call_module")
    return {name for name, number in calls.items() if number == 1}


def _pairs(graph: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node, nn.Conv2d, FrozenBatchNorm2d]]:
    """Yield the nodes of a convolution and of the frozen BatchNorm after it, and both modules."""
    once = _called_once(graph)
    for node in list(graph.graph.nodes):
        before: Any = node.args[0] if node.args else None
        norm, convolution = _module(graph, node, FrozenBatchNorm2d), _module(graph, before, nn.Conv2d)
        if norm is None or convolution is None or not {node.target, before.target} <= once:
            continue
        if len(before.users) == 1:
            yield before, node, convolution, norm


def _fold_norms(graph: fx.GraphModule) -> None:
    """Fold each frozen BatchNorm into the convolution before it."""
    for before, node, convolution, norm in _pairs(graph):
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        weight, bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
        convolution.weight, convolution.bias = weight, bias
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    _finish(graph)


def _fuse(graph: fx.GraphModule) -> None:
    """Fuse each convolution with the ReLU after it, or the addition of a map of the same size, also with ReLU."""
    once = _called_once(graph)
    parameter = next(graph.parameters())
    memory = MapMemory()
    ShapeProp(graph).propagate(parameter.new_zeros(_EXAMPLE_SHAPE))
    for node in list(graph.graph.nodes):
        convolution = _module(graph, node, nn.Conv2d)
        if convolution is None or node.target not in once or not pads_with_zeros(convolution):
            continue
        last: Any = node
        other = None
        user = _only_user(last)
        if user is not None and user.op == "call_function" and user.target in _ADDITIONS and not user.kwargs:
            operands = [operand for operand in user.args if operand is not node]
            if len(operands) == 1 and _shape(node) is not None and _shape(operands[0]) == _shape(node):
                last, other = user, operands[0]
        user = _only_user(last)
        relu = _module(graph, user, nn.ReLU) is not None
        last = user if relu else last
        path = f"{str(node.target).replace('.', '_')}_fused"
        graph.add_submodule(path, FusedConv(convolution, relu=relu, memory=memory))
        with graph.graph.inserting_before(last):
            fused = graph.graph.call_module(path, (node.args[0], other) if other else (node.args[0],))
        fused.meta = dict(last.meta)
        last.replace_all_uses_with(fused)
        while last is not node:  # from the last node back to the convolution
            before = next(operand for operand in last.all_input_nodes if operand is not other)
            graph.graph.erase_node(last)
            last = before
        graph.graph.erase_node(node)
    _add_in_place(graph)
    _finish(graph)


def _add_in_place(graph: fx.GraphModule) -> None:
    """Let each fused addition write to the memory of the map that it adds, if nothing reads that map afterwards."""
    position = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in position:
        if _module(graph, node, FusedConv) is None or len(node.args) == 1:
            continue
        x, other = node.args
        # the output of another module could be a view, whose memory something else reads
        known = all(_module(graph, each, _NEW_MAPS) is not None for each in (other, *other.users))
        if known and x is not other and max(other.users, key=position.__getitem__) is node:
            node.args = (x, other, True)


def pads_with_zeros(convolution: nn.Conv2d) -> bool:
    """Return whether a convolution pads with zeros and numeric padding, as fused kernels require."""
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def _shape(node: Any) -> tuple[int, ...] | None:
    """Return the shape of a node's output for the example image; None: it is not a tensor."""
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def _only_user(node: fx.Node) -> fx.Node | None:
    """Return the only node that uses a node; None if there are several."""
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _finish(graph: fx.GraphModule) -> None:
    """Recompile a changed graph and delete the modules that it no longer calls."""
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
