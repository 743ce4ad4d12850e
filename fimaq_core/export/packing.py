"""Weights of 2 to 4 bits in 2 to 4 bits; the graph unpacks them, which runtimes do on loading.

Codes of 4 bits lie in uint4. Codes of 2 and 3 bits lie as bit planes in uint8: plane i has bit i of
each code, eight codes per byte, the first in the highest bit.
"""

from typing import Any

import numpy as np
from torch import nn

from fimaq_core.layers import QuantConvTranspose2d, WeightLayer


def pack(model: Any, name: str, layer: WeightLayer) -> None:
    """Replace the int8 initializer ``name`` of a model by packed codes, in place."""
    from onnx import TensorProto, helper, numpy_helper

    quantizer, graph = layer.weight_quantizer, model.graph
    codes = quantizer.codes.view(layer.weight.shape).numpy()
    zeros = quantizer.zero_point.flatten().numpy().astype(np.int32)
    zeros = zeros.reshape(-1, *[1] * (codes.ndim - 1))
    if isinstance(layer, nn.Linear | QuantConvTranspose2d):
        codes, zeros = codes.swapaxes(0, 1), zeros.swapaxes(0, 1)
    codes = np.ascontiguousarray(codes)
    nodes: list[Any] = []

    def constant(array: Any, suffix: str) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(array), f"{name}.{suffix}"))
        return f"{name}.{suffix}"

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], f"{output}/{kind}", **attributes))
        return output

    if quantizer.bits == 4:
        flat = np.append(codes.flatten(), np.zeros(codes.size % 2, np.uint8))
        raw = (flat[::2] | flat[1::2] << 4).astype(np.uint8).tobytes()
        packed = f"{name}.packed"
        graph.initializer.append(
            helper.make_tensor(packed, TensorProto.UINT4, codes.shape, raw, raw=True)
        )
        wide = add("Cast", [packed], f"{name}.wide", to=TensorProto.INT32)
    else:
        shifts = np.arange(quantizer.bits).reshape(-1, 1)
        planes = np.packbits(codes.flatten() >> shifts & 1, axis=1)[:, :, None]
        masks = constant((1 << np.arange(8))[::-1].astype(np.uint8), "masks")
        bits = add("BitwiseAnd", [constant(planes, "packed"), masks], f"{name}.masked")
        bits = add("Cast", [bits], f"{name}.bools", to=TensorProto.BOOL)
        bits = add("Cast", [bits], f"{name}.bits", to=TensorProto.INT32)
        values = constant((1 << shifts)[:, :, None].astype(np.int32), "values")
        axis, one = (
            constant(np.array([0], np.int64), "axis"),
            constant(np.array([-1], np.int64), "one"),
        )
        wide = add("Mul", [bits, values], f"{name}.weighted")
        wide = add("ReduceSum", [wide, axis], f"{name}.sums", keepdims=0)
        wide = add("Reshape", [wide, one], f"{name}.flat")
        size = constant(np.array([codes.size], np.int64), "size")
        wide = add("Slice", [wide, axis, size], f"{name}.cut")
        shape = constant(np.array(codes.shape, np.int64), "shape")
        wide = add("Reshape", [wide, shape], f"{name}.wide")
    moved = add("Sub", [wide, constant(zeros, "zeros")], f"{name}.moved")
    add("Cast", [moved], name, to=TensorProto.INT8)
    for tensor in list(graph.initializer):
        if tensor.name == name:
            graph.initializer.remove(tensor)
    for node in reversed(nodes):
        graph.node.insert(0, node)
