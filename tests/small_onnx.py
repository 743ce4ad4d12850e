"""A small export written by hand: all that an exported file has, and made in a millisecond."""

from pathlib import Path
from typing import Any

import onnx
from onnx import numpy_helper

from fimaq_core.export.facts import KEY, LayerFacts, OnnxFacts
from fimaq_core.recipe import make_recipe

#: Two quantized layers after a convolution; images (n, 3, 4, 4) in, three logits out.
GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
model (float[batch, 3, 4, 4] images) => (float[batch, 3] logits)
<
    float[2, 3, 2, 2] "patch.weight" = {
        0.5, -0.5, 0.25, 1, -1, 0.5, 0.75, -0.25, 1, 0.5, -0.5, -1,
        0.25, 0.5, -1, 1, 0.5, -0.75, 1, 0.25, -0.5, 0.5, 1, -1},
    int64[3] shape = {0, 2, 4}, float[4] "norm.weight" = {1, 2, 0.5, 1},
    float scale = {0.25}, uint8 zero = {8}, uint8 low = {0}, uint8 high = {15},
    int8[4, 3] "fc.weight.codes" = {1, -8, 7, 0, 2, -3, 5, 4, -6, -1, 3, 6},
    float[3] "fc.weight.scale" = {0.125, 0.25, 0.5}, int8[3] "fc.weight.zeros" = {0, 0, 0},
    int8[3, 3] "head.weight.codes" = {2, -8, 7, 1, 2, -4, 5, -7, 6},
    int64 first = {0}, float[3] "head.bias" = {0.5, -0.5, 0}
>
{
    patches = Conv <strides = [2, 2]> (images, "patch.weight")
    tokens = Reshape (patches, shape)
    normed = LayerNormalization <axis = -1> (tokens, "norm.weight")
    rounded = QuantizeLinear (normed, scale, zero)
    "fc.input.codes" = Clip (rounded, low, high)
    a = DequantizeLinear ("fc.input.codes", scale, zero)
    b = DequantizeLinear <axis = 1> ("fc.weight.codes", "fc.weight.scale", "fc.weight.zeros")
    [fc] hidden = MatMul (a, b)
    turned = Transpose <perm = [0, 2, 1]> (hidden)
    chosen = Gather <axis = 2> (turned, first)
    soft = Softmax <axis = -1> (chosen)
    "head.input.codes" = QuantizeLinear (soft, scale, zero)
    c = DequantizeLinear ("head.input.codes", scale, zero)
    d = DequantizeLinear <axis = 1> ("head.weight.codes", "fc.weight.scale", "fc.weight.zeros")
    [head] product = MatMul (c, d)
    logits = Add (product, "head.bias")
}
"""


def small_onnx(graph: str = GRAPH, **facts: Any) -> onnx.ModelProto:
    """Return the export, or that of another graph; ``facts`` replace those in its metadata."""
    model = onnx.parser.parse_model(graph)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    recipe = make_recipe("rtn", {"w_bits": 4, "a_bits": 4})
    layers = [("patch", "convolution", 96, False), ("fc", "linear", 24, True)]
    layers.append(("head", "linear", 9, True))
    known: dict[str, Any] = {
        "task": "classification",
        "model": "small",
        "weights_sha256": "0" * 64,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_digest": recipe.digest(),
        "class_names": ["one", "two", "three"],
        "layers": [
            LayerFacts(name=name, kind=kind, macs=macs, quantized=quantized)
            for name, kind, macs, quantized in layers
        ],
    }
    text = OnnxFacts.model_validate(known | facts).model_dump_json()
    model.metadata_props.add(key=KEY, value=text)
    return model


def written(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path
