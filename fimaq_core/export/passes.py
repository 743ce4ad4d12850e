"""Changes of an exported graph that save time: scales move into constants, and bytes move.

Codes differ from those of the unchanged graph by rounding alone, so only next to a tie.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

#: Order of the dimensions (n, tokens, heads, d) in which heads are joined.
_JOINED = [0, 2, 1, 3]


class Linear(NamedTuple):
    """Nodes of a linear layer with one input scale per token: ``(x @ weight) * rows + bias``."""

    matmul: Any
    factor: Any
    add: Any
    rows: np.ndarray  # (1, tokens, 1) scales
    bias: np.ndarray  # (channels,)


class Graph:
    """Nodes of an ``onnx.ModelProto`` by the tensors that they make and read.

    Attributes:
        proto: the graph.
        values: initializers as arrays, by name.
    """

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.proto = model.graph
        self.values: dict[str, np.ndarray] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in self.proto.initializer
        }
        self.makers = {name: node for node in self.proto.node for name in node.output}
        self._counts: dict[str, int] = defaultdict(int)
        for node in (*self.proto.node, self.proto):
            for name in node.output if node is self.proto else node.input:
                self._counts[name if isinstance(name, str) else name.name] += 1
        self._shapes = {one.name: one.type.tensor_type.shape.dim for one in self.proto.value_info}

    def quantizers(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Yield the QuantizeLinear nodes with a constant scale, and the scale."""
        for node in list(self.proto.node):
            if node.op_type == "QuantizeLinear" and node.input[1] in self.values:
                yield node, self.values[node.input[1]]

    def maker(self, name: str, kind: str) -> Any:
        """Return the node of type ``kind`` that makes a tensor for one reader alone, or None."""
        node = self.makers.get(name)
        return node if node and node.op_type == kind and self._counts[name] == 1 else None

    def behind_reshapes(self, name: str) -> tuple[str, list[Any]]:
        """Return the tensor before the Reshape nodes that make a tensor, and these nodes."""
        nodes: list[Any] = []
        while node := self.maker(name, "Reshape"):
            nodes.insert(0, node)
            name = node.input[0]
        return name, nodes

    def constant(self, node: Any) -> np.ndarray | None:
        """Return the second input of a node if it is constant and the first is not."""
        return None if node.input[0] in self.values else self.values.get(node.input[1])

    def linear(self, name: str) -> Linear | None:
        """Return the linear layer whose output is the tensor ``name``, or None."""
        add = self.maker(name, "Add")
        factor = self.maker(add.input[0], "Mul") if add else None
        matmul = self.maker(factor.input[0], "MatMul") if factor else None
        if matmul is None:
            return None
        rows, bias = self.constant(factor), self.constant(add)
        if rows is None or bias is None or bias.ndim != 1 or rows.shape != (1, rows.size, 1):
            return None
        return Linear(matmul, factor, add, rows, bias)

    def size(self, name: str) -> int:
        """Return the size of a tensor along its last dimension, or 0."""
        dims = self._shapes.get(name)
        return dims[-1].dim_value if dims else 0

    def store(self, like: str, array: np.ndarray) -> str:
        """Add an initializer, named after the tensor ``like``; return its name."""
        from onnx import numpy_helper

        number = len(self.values)
        name = f"{like.partition('.folded')[0]}.folded{number}"
        self.values[name] = np.asarray(array, order="C")
        self.proto.initializer.append(numpy_helper.from_array(self.values[name], name))
        return name

    def requantize(self, node: Any, scale: np.ndarray) -> None:
        """Give a QuantizeLinear node one scale, or one per index of axis 1. Its zeros are equal."""
        from onnx import helper

        zeros = np.broadcast_to(self.values[node.input[2]].flat[0], scale.shape)
        scale = np.asarray(scale, dtype=np.float32)
        names = [self.store(node.input[1], scale), self.store(node.input[2], zeros)]
        node.input[1], node.input[2] = names
        del node.attribute[:]
        if scale.ndim:
            node.attribute.append(helper.make_attribute("axis", 1))

    def move_up(self, node: Any, source: str, between: list[Any]) -> None:
        """Let a node read ``source``, before the nodes ``between`` that lead to its input."""
        if between:
            last = node.output[0]
            node.output[0] = f"{last}.before"
            between[0].input[0] = node.output[0]
            for one, following in pairwise(between):
                one.output[0] = following.input[0] = f"{one.output[0]}.codes"
            between[-1].output[0] = last
        node.input[0] = source


def speed_up(model: Any) -> None:
    """Run all passes on an ``onnx.ModelProto`` with shapes, in place; its shapes are removed."""
    for change in (merge_factors, quantize_before_joining, fold_channels, fold_rows):
        change(Graph(model))
    graph = model.graph
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output}
    order = TopologicalSorter(
        {
            index: [makers[name] for name in node.input if name in makers]
            for index, node in enumerate(graph.node)
        }
    )
    nodes = [graph.node[index] for index in order.static_order()]
    used = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, kept in (("node", nodes), ("initializer", tensors)):
        kept = [copy.deepcopy(one) for one in kept]
        graph.ClearField(field)
        getattr(graph, field).extend(kept)
    graph.ClearField("value_info")


def _behind(graph: Graph, name: str) -> tuple[Any, Any, np.ndarray] | None:
    """Return the Mul node behind a product, the Mul of its scales, and the first of these."""
    factor = graph.maker(name, "Mul")
    scales = graph.maker(factor.input[1], "Mul") if factor else None
    if scales is None or scales.input[0] not in graph.values:
        return None
    return factor, scales, graph.values[scales.input[0]]


def merge_factors(graph: Graph) -> None:
    """Multiply a number behind a product into its scales: ``(x * (a * b)) * number``."""
    for outer in list(graph.proto.node):
        number = graph.constant(outer) if outer.op_type == "Mul" else None
        if number is None or number.size != 1:
            continue
        if found := _behind(graph, outer.input[0]):
            factor, scales, values = found
            scales.input[0] = graph.store(scales.input[0], values * number.reshape(()))
            factor.output[0] = outer.output[0]
            graph.proto.node.remove(outer)


def quantize_before_joining(graph: Graph) -> None:
    """Quantize the output (n, heads, tokens, d) of an attention before its heads are joined.

    The scales per token divide the scales behind the product.
    """
    for node, scale in graph.quantizers():
        source, between = graph.behind_reshapes(node.input[0])
        turn = graph.maker(source, "Transpose")
        if turn is None or len(between) != 1 or list(turn.attribute[0].ints) != _JOINED:
            continue
        if not (found := _behind(graph, turn.input[0])):
            continue
        factor, scales, rows = found
        if rows.ndim == 4 and rows.shape[2] == scale.size and scale.ndim == 1:
            scales.input[0] = graph.store(scales.input[0], rows / scale[:, None])
            graph.requantize(node, np.ones(()))
            graph.move_up(node, factor.output[0], [turn, *between])


def fold_channels(graph: Graph) -> None:
    """Fold the division by one scale per channel, before a quantizer, into the layer before it.

    The quantizer, which has one scale, then stands directly behind the layer.
    """
    for node, scale in graph.quantizers():
        divide = graph.maker(node.input[0], "Div")
        divisor = graph.constant(divide) if divide else None
        if divisor is None or scale.size != 1:
            continue
        source, between = graph.behind_reshapes(divide.input[0])
        linear = graph.linear(source)
        if linear is None or linear.bias.size != divisor.size:
            continue
        weight = graph.maker(linear.matmul.input[1], "DequantizeLinear")
        if weight is None or graph.values[weight.input[1]].size != divisor.size:
            continue
        channels = divisor.reshape(-1) * scale.reshape(())
        weight.input[1] = graph.store(weight.input[1], graph.values[weight.input[1]] / channels)
        linear.add.input[1] = graph.store(linear.add.input[1], linear.bias / channels)
        graph.proto.node.remove(divide)
        graph.requantize(node, np.ones(linear.rows.size))
        graph.move_up(node, source, between)


def fold_rows(graph: Graph) -> None:
    """Fold the scales per token behind a linear layer into the quantizer of its output.

    ``(y * rows + bias) / scale`` is ``(y + bias / rows) / (scale / rows)``.
    """
    from onnx import helper

    for node, scale in graph.quantizers():
        source, _ = graph.behind_reshapes(node.input[0])
        linear = graph.linear(source)
        if linear is None or scale.ndim != 1 or scale.size % linear.rows.size:
            continue
        if scale.size * graph.size(node.input[0]) != linear.rows.size * linear.bias.size:
            continue
        rows = linear.rows.reshape(-1, 1)
        graph.requantize(node, (scale.reshape(len(rows), -1) / rows).reshape(-1))
        # Runtimes compute this table once, when they load the file.
        table = f"{linear.add.output[0]}.table"
        names = [linear.add.input[1], graph.store(linear.factor.input[1], 1 / linear.rows)]
        graph.proto.node.append(helper.make_node("Mul", names, [table]))
        linear.add.input[0], linear.add.input[1] = linear.matmul.output[0], table
        graph.proto.node.remove(linear.factor)
