"""Exported files run with the values of their graph, and say what ran in integers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from onnx import ModelProto
from small_models import images, vit
from small_onnx import GRAPH, small_onnx, written
from torch import Tensor
from torch.nn import functional as F

from fimaq_core import quantize
from fimaq_core.errors import ModelError
from fimaq_core.export.runtime import OnnxModel

HEAD = '["" : 21]>\nmodel'
# fmt: off
PATCH = torch.tensor([
    0.5, -0.5, 0.25, 1, -1, 0.5, 0.75, -0.25, 1, 0.5, -0.5, -1,
    0.25, 0.5, -1, 1, 0.5, -0.75, 1, 0.25, -0.5, 0.5, 1, -1,
]).view(2, 3, 2, 2)
# fmt: on
FC = torch.tensor([[1.0, -8, 7], [0, 2, -3], [5, 4, -6], [-1, 3, 6]])
LAST = torch.tensor([[2.0, -8, 7], [1, 2, -4], [5, -7, 6]])
SCALE = torch.tensor([0.125, 0.25, 0.5])


def small(x: Tensor) -> Tensor:
    """The graph of the small export, in torch."""
    tokens = F.conv2d(x, PATCH, stride=2).flatten(2)
    normed = F.layer_norm(tokens, [4]) * torch.tensor([1, 2, 0.5, 1])
    rounded = (normed / 0.25).round().clamp(-8, 7) * 0.25
    soft = (rounded @ (FC * SCALE))[:, 0].softmax(-1)
    logits: Tensor = (soft / 0.25).round() * 0.25 @ (LAST * SCALE) + torch.tensor([0.5, -0.5, 0])
    return logits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(small_onnx(), tmp_path / "model.onnx")


@pytest.mark.parametrize(("optimised", "threads"), [(True, None), (False, None), (True, 2)])
def test_the_graph_is_computed(path: Path, optimised: bool, threads: int | None) -> None:
    model = OnnxModel(path, threads, optimised)
    x = torch.randn(50, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    # A value next to a rounding tie may go either way, and moves one logit by 2 at most.
    close = (model(x) - small(x)).abs().amax(1) < 1e-5
    assert close.sum() >= 48
    torch.testing.assert_close(model(x[:1]), model(x)[:1])
    assert not model.training


def test_integers_in(tmp_path: Path) -> None:
    graph = GRAPH.replace("float[batch, 3, 4, 4] images", "uint8[batch, 4, 4, 3] bytes").replace(
        "{\n    patches",
        "{\n    real = Cast <to = 1> (bytes)\n    images = Transpose <perm = [0, 3, 1, 2]> (real)\n"
        "    patches",
    )
    model = OnnxModel(written(small_onnx(graph, normalised=False), tmp_path / "model.onnx"))
    x = torch.randint(0, 256, (1, 4, 4, 3), dtype=torch.uint8)
    torch.testing.assert_close(model(x), small(x.permute(0, 3, 1, 2).float()), atol=2, rtol=0)


def test_several_outputs(tmp_path: Path) -> None:
    graph = f"""<ir_version: 10, opset_import: {HEAD} (int64[batch, 5] tokens)
        => (float[batch, 5] one, float[batch, 5] two)
        {{ one = Cast <to = 1> (tokens) two = Neg (one) }}"""
    export = small_onnx(graph, part="text", class_names=None, layers=[])
    one, two = OnnxModel(written(export, tmp_path / "model.onnx"))(torch.arange(10).view(2, 5))
    assert one.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert two.tolist() == (-one).tolist()


def test_inputs_that_do_not_fit(path: Path) -> None:
    model = OnnxModel(path)
    for x in (torch.ones(1, 3, 4, 5), torch.ones(1, 3, 4, 4).double(), torch.ones(4)):
        with pytest.raises(ModelError, match=r"onnxruntime does not run .*\.onnx: .*(images|type)"):
            model(x)
    assert model(torch.ones(1, 3, 4, 4)).shape == (1, 3)


def test_graphs_that_do_not_load(tmp_path: Path) -> None:
    graph = GRAPH.replace("Reshape (patches, shape)", "Reshape (patches, first)")
    with pytest.raises(ModelError, match=r"onnxruntime does not load .*\.onnx: ") as error:
        OnnxModel(written(small_onnx(graph), tmp_path / "model.onnx"))
    assert "\n" not in str(error.value)


# Memory

#: Graph of a hundred bytes that makes a tensor of any number of float32 values.
BOMB = """<ir_version: 10, opset_import: ["" : 21]>
model (float[batch, 3, 4, 4] x) => (float y) <int64[1] size = {%d}> {
    large = ConstantOfShape (size)
    y = ReduceSum <keepdims = 0> (large)
}"""


def bomb(size: int, path: Path) -> Path:
    return written(small_onnx(BOMB % size, class_names=None, layers=[]), path)


def test_a_petabyte(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="it needs more memory than is free"):
        OnnxModel(bomb(2**48, tmp_path / "model.onnx"))(torch.zeros(1, 3, 4, 4))


def test_memory_has_a_bound(tmp_path: Path) -> None:
    """A gibibyte is refused with half of it as the bound, in loading and in running."""
    small, large = bomb(2**22, tmp_path / "small.onnx"), bomb(2**28, tmp_path / "large.onnx")
    code = """
import sys, torch
from pathlib import Path
from fimaq_core.errors import ModelError
from fimaq_core.export import runtime
runtime._MOST_MEMORY = 2**29
for path in sys.argv[1:]:
    try:
        print(runtime.OnnxModel(Path(path))(torch.zeros(1, 3, 4, 4)).tolist())
    except ModelError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, small, large], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first == "0.0"
    assert "it needs more memory than is free" in second
    assert done.stderr == ""


# Coverage


def test_coverage_of_the_small_export(path: Path) -> None:
    found = OnnxModel(path).coverage()
    # Onnxruntime joins a two-dimensional product and its bias to Gemm, which has no integer form.
    assert found.rest == [
        ("patch", "an operand is in full precision"),
        ("head", "runs in float: Gemm"),
    ]
    assert (found.integer_macs, found.quantized_macs, found.macs) == (24, 33, 129)
    assert found.percent == pytest.approx(100 * 24 / 33)
    assert found.text() == (
        "72.7 % of the multiply-adds with two quantized operands run in integers, 18.6 % of all; "
        "not in integers: patch (an operand is in full precision); head (runs in float: Gemm)"
    )


def test_a_bias_that_is_subtracted_keeps_the_integers(tmp_path: Path) -> None:
    graph = GRAPH.replace("Add (product", "Sub (product")
    found = OnnxModel(written(small_onnx(graph), tmp_path / "model.onnx")).coverage()
    assert (found.integer_macs, found.percent) == (33, 100)
    assert [name for name, _ in found.rest] == ["patch"]


def test_nothing_runs_in_integers_without_optimisation(path: Path) -> None:
    found = OnnxModel(path, optimised=False).coverage()
    assert (found.integer_macs, found.percent) == (0, 0)
    assert found.rest[1:] == [("fc", "runs in float: MatMul"), ("head", "runs in float: MatMul")]


def test_layers_whose_codes_are_shared_are_found(tmp_path: Path) -> None:
    """Onnxruntime joins equal quantizers of a tensor, so the second codes lose their name."""
    graph = """<ir_version: 10, opset_import: ["" : 21]>
model (float[batch, 4] x) => (float[batch, 3] y)
<
    float scale = {0.25}, uint8 zero = {8}, float[3] s = {0.125, 0.25, 0.5},
    int8[3] z = {0, 0, 0},
    int8[4, 3] "q.weight.codes" = {1, -8, 7, 0, 2, -3, 5, 4, -6, -1, 3, 6},
    int8[4, 3] "k.weight.codes" = {2, -8, 7, 0, 2, -3, 5, 4, -6, -1, 3, 6}
>
{
    "q.input.codes" = QuantizeLinear (x, scale, zero)
    a = DequantizeLinear ("q.input.codes", scale, zero)
    b = DequantizeLinear <axis = 1> ("q.weight.codes", s, z)
    [q] one = MatMul (a, b)
    "k.input.codes" = QuantizeLinear (x, scale, zero)
    c = DequantizeLinear ("k.input.codes", scale, zero)
    d = DequantizeLinear <axis = 1> ("k.weight.codes", s, z)
    [k] two = MatMul (c, d)
    y = Sub (one, two)
}"""
    layers = [{"name": name, "kind": "linear", "macs": 12, "quantized": True} for name in "qkv"]
    model = small_onnx(graph, task="", class_names=None, layers=layers)
    found = OnnxModel(written(model, tmp_path / "model.onnx")).coverage()
    assert (found.integer_macs, found.quantized_macs) == (24, 36)
    assert found.rest == [("v", "its product was not found")]


def test_one_float_product_of_a_layer_counts(tmp_path: Path) -> None:
    """A layer that runs twice counts only if both runs are in integers."""
    twice = (
        GRAPH.replace(
            "logits = Add (product",
            "again = MatMul (c, d)\n    other = Add (again, head_bias)\n    logits = Sub (other",
        )
        .replace('"head.bias")\n}', "product)\n}")
        .replace('"head.bias" =', "head_bias =")
    )
    found = OnnxModel(written(small_onnx(twice), tmp_path / "model.onnx")).coverage()
    assert ("head", "runs in float: Gemm") in found.rest


@pytest.mark.parametrize(("packed", "signed"), [(False, False), (True, True)])
def test_a_quantized_vit(tmp_path: Path, packed: bool, signed: bool) -> None:
    model, x = vit(depth=1), images(8)
    quantized = quantize(model, x, method="rtn", w_bits=3, a_bits=3, progress=False)
    quantized.export(tmp_path / "model.onnx", images=x, packed=packed, signed=signed)
    exported = OnnxModel(tmp_path / "model.onnx")
    with torch.no_grad():
        assert exported(x).argmax(1).tolist() == quantized(x).argmax(1).tolist()
    found = exported.coverage()
    assert {name for name, _ in found.rest} <= {"patch_embed.proj", "head"}
    assert found.percent > 99


def test_files_are_checked_first(tmp_path: Path) -> None:
    export: ModelProto = small_onnx()
    del export.metadata_props[:]
    with pytest.raises(ModelError, match="is not an export of fimaq"):
        OnnxModel(written(export, tmp_path / "model.onnx"))
