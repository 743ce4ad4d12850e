"""Share of the multiply-adds that a runtime computes with integers, read from its own graph."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fimaq_core.export.facts import LayerFacts

#: Operators that multiply integers.
_INTEGER = re.compile("MatMulInteger(ToFloat)?|QLinearMatMul|QGemm|ConvInteger|QLinearConv")
#: Operators that multiply two tensors, with integers or not.
_PRODUCT = re.compile("MatMul|Gemm|Conv|Attention|Einsum")
#: Operators that change neither the codes nor what they stand for.
_MOVES = re.compile(
    "DequantizeLinear|Transpose|Reshape|Flatten|Squeeze|Unsqueeze|Identity|Cast|Expand|Pad|Reorder.*"
)


@dataclass(frozen=True)
class Coverage:
    """Multiply-adds of one sample by how a runtime computes them.

    Attributes:
        integer_macs: those in integer operators.
        quantized_macs: those of layers with two quantized operands, which integers can compute.
        macs: those of all quantizable layers.
        rest: name of each layer that does not run in integers, and the reason.
    """

    integer_macs: int
    quantized_macs: int
    macs: int
    rest: list[tuple[str, str]]

    @property
    def percent(self) -> float:
        """Percentage of ``quantized_macs`` in integers; 0 if there are none."""
        return 100 * self.integer_macs / max(self.quantized_macs, 1)

    def text(self) -> str:
        """Return the shares in one line, with the layers that do not run in integers."""
        whole = 100 * self.integer_macs / max(self.macs, 1)
        layers: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.rest:
            layers[reason].append(name)
        rest = [
            f"{', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)} ({reason})"
            for reason, names in layers.items()
        ]
        return (
            f"{self.percent:.1f} % of the multiply-adds with two quantized operands run in integers"
            f", {whole:.1f} % of all" + (f"; not in integers: {'; '.join(rest)}" if rest else "")
        )


def coverage_of(layers: Iterable[LayerFacts], file: Any, optimised: Any) -> Coverage:
    """Find how each layer of a file is computed.

    Args:
        layers: layers of the file, whose code tensors are named ``LAYER.OPERAND.codes``.
        file: onnx.ModelProto of the file.
        optimised: onnx.ModelProto that the runtime made of it.
    """
    known, found = _Graph(file), _Graph(optimised)
    integer = quantized = macs = 0
    rest: list[tuple[str, str]] = []
    for layer in layers:
        macs += layer.macs
        if not layer.quantized:
            rest.append((layer.name, "an operand is in full precision"))
            continue
        quantized += layer.macs
        # The runtime may have merged code tensors of several layers; then names of nodes are left.
        nodes = found.products(layer) or found.named(known.products(layer))
        others = sorted({node.op_type for node in nodes if not _INTEGER.fullmatch(node.op_type)})
        if nodes and not others:
            integer += layer.macs
        else:
            reason = f"runs in float: {', '.join(others)}" if nodes else "its product was not found"
            rest.append((layer.name, reason))
    return Coverage(integer, quantized, macs, rest)


class _Graph:
    """Nodes of a graph by the tensors that they read."""

    def __init__(self, model: Any) -> None:
        self.nodes = list(model.graph.node)
        self._readers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            for name in node.input:
                self._readers[name].append(index)

    def products(self, layer: LayerFacts) -> list[Any]:
        """Return the nodes that multiply the codes of a layer's operands."""
        operands = ("a", "b") if layer.kind == "product" else ("input", "weight")
        reached = [self._reached(f"{layer.name}.{operand}.codes") for operand in operands]
        present = [indices for indices in reached if indices]
        return (
            [self.nodes[index] for index in sorted(set.intersection(*present))] if present else []
        )

    def named(self, nodes: list[Any]) -> list[Any]:
        """Return the nodes that took the place of ``nodes`` of another graph, by their names."""
        names = {node.name for node in nodes if node.name}
        return [node for node in self.nodes if node.name.partition("/")[0] in names]

    def _reached(self, name: str) -> set[int]:
        """Return the indices of products that read a tensor, also through moved copies of it."""
        found: set[int] = set()
        names, seen = [name], {name}
        while names:
            for index in self._readers.get(names.pop(), []):
                node = self.nodes[index]
                if _PRODUCT.search(node.op_type):
                    found.add(index)
                elif _MOVES.fullmatch(node.op_type):
                    names += [out for out in node.output if out not in seen]
                    seen.update(node.output)
        return found
