"""Passes over exported graphs: fewer operators on floats, and the same codes."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from fimaq_core.export.passes import speed_up

#: (n, 4 tokens, 6 channels in 2 heads of 3); scales per token, or per token and head.
LINEAR = """
    w = DequantizeLinear <axis: int = 1> (codes, scale, none)
    y = MatMul (x, w)
    scaled = Mul (y, rows)
    added = Add (scaled, bias)
"""
GRAPHS = {
    "rows": (
        "float[n, 4, 6] x",
        "uint8[n, 4, 2, 3] out",
        f"""{LINEAR}
        flat = Reshape (added, groups)
        q = QuantizeLinear <axis: int = 1> (flat, per_head, zeros8)
        out = Reshape (q, heads)
        """,
        "float[n, 8, 3] flat",
        ["Add", "Reshape", "QuantizeLinear", "Reshape"],
    ),
    "channels": (
        "float[n, 4, 6] x",
        "uint8[n, 4, 2, 3] out",
        f"""{LINEAR}
        flat = Reshape (added, heads)
        divided = Div (flat, per_channel)
        out = QuantizeLinear (divided, one, zero)
        """,
        "float[n, 4, 6] added",
        ["Add", "QuantizeLinear", "Reshape"],
    ),
    "joining": (
        "float[n, 2, 4, 3] x",
        "uint8[n, 4, 6] out",
        """
        y = MatMul (x, square)
        both = Mul (a_scale, b_scale)
        scaled = Mul (y, both)
        turned = Transpose <perm: ints = [0, 2, 1, 3]> (scaled)
        joined = Reshape (turned, tokens)
        out = QuantizeLinear <axis: int = 1> (joined, per_token, zeros4)
        """,
        "float[n, 4, 6] joined",
        ["Mul", "QuantizeLinear", "Transpose", "Reshape"],
    ),
    "factors": (
        "float[n, 2, 4, 3] x",
        "uint8[n, 2, 4, 3] out",
        """
        y = MatMul (x, square)
        both = Mul (a_scale, b_scale)
        scaled = Mul (y, both)
        less = Mul (scaled, quarter)
        out = QuantizeLinear (less, one, zero)
        """,
        "float[n, 2, 4, 3] less",
        ["Mul", "QuantizeLinear"],
    ),
}


def _model(inputs: str, outputs: str, nodes: str, value: str) -> Any:
    rng = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return rng.uniform(0.02, 0.1, shape).astype(np.float32)

    values = {
        "codes": rng.integers(-8, 8, (6, 6), np.int8), "scale": some(6), "rows": some(1, 4, 1),
        "none": np.zeros(6, np.int8), "bias": some(6), "per_head": some(8) / 30,
        "per_channel": some(1, 1, 2, 3) / 30, "per_token": some(4), "a_scale": some(1, 2, 4, 1),
        "b_scale": 30 * some(1, 2, 1, 3), "square": 20 * some(3, 3), "quarter": np.float32(0.25),
        "one": np.float32(1 / 64), "zero": np.uint8(90), "zeros4": np.full(4, 90, np.uint8),
        "zeros8": np.full(8, 90, np.uint8), "groups": np.array([-1, 8, 3]),
        "heads": np.array([-1, 4, 2, 3]), "tokens": np.array([-1, 4, 6]),
    }  # fmt: skip
    header = '<ir_version: 10, opset_import: ["": 21]>'
    text = f"{header} g ({inputs}) => ({outputs}) <{value}> {{ {nodes} }}"
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name)
        for name, array in values.items()
        if name in used
    )
    return model


def _codes(model: Any, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (codes,) = session.run(None, {"x": x})
    return np.asarray(codes, dtype=np.int32)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_pass_saves_operators_and_keeps_the_codes(name: str) -> None:
    inputs, outputs, nodes, value, wanted = GRAPHS[name]
    model = _model(inputs, outputs, nodes, value)
    sizes = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    x = np.random.default_rng(1).standard_normal((50, *sizes)).astype(np.float32)
    before = _codes(model, x)
    speed_up(model)
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    after_product = [
        node.op_type
        for node in model.graph.node[kinds.index("MatMul") + 1 :]
        if any(one not in _constants(model) for one in node.input)
    ]
    assert after_product == wanted
    after = _codes(model, x)
    assert len(np.unique(before)) > 10
    # Rounding may move a value over a tie.
    assert np.abs(after - before).max() <= 1
    assert (after != before).sum() <= 2


def _constants(model: Any) -> set[str]:
    """Return the names of tensors that do not depend on the input."""
    names = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if all(name in names for name in node.input):
            names.update(node.output)
    return names


def test_scales_that_others_read_stay() -> None:
    """The output of a layer that leaves the graph keeps its scale."""
    inputs, outputs, nodes, value, _ = GRAPHS["rows"]
    model = _model(inputs, f"{outputs}, float[n, 4, 6] added", nodes, value)
    count = len(model.graph.node)
    speed_up(model)
    assert len(model.graph.node) == count
