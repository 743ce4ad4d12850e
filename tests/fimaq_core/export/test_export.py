"""Exported files: their codes are those of the simulated model, in several engines."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from small_models import deit, images, randomise, swin, vit
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionTransformer

from fimaq_core import QuantizedModel, quantize
from fimaq_core.errors import ModelError, RecipeError
from fimaq_core.export import packing
from fimaq_core.export.check import check_codes
from fimaq_core.export.facts import OnnxFacts
from fimaq_core.export.recipes import check_exportable
from fimaq_core.export.writing import Normalise
from fimaq_core.layers import QuantLinear
from fimaq_core.recipe import METHODS, make_recipe

FEW: dict[str, Any] = {
    "range_candidates": 32,
    "range_rounds": 1,
    "steps": 4,
    "fisher_k": 2,
    "lr_alpha": 0.05,
    "lr_scale": 1e-3,
    "mlp_steps": 2,
    "progress": False,
}


MIXED = {"blocks.0.mlp.fc1": {"w": 2, "a": 3}, "blocks.0.attn.query_key": {"a": 8, "b": 3}}


def _quantized(model: nn.Module, x: Tensor, **settings: Any) -> QuantizedModel:
    return quantize(model, x, **FEW, **settings)


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    """A ViT with scales per token and per head, 4 bits."""
    return _quantized(vit(), images(12), w_bits=4, a_bits=4)


@pytest.fixture(scope="module")
def exported(quantized: QuantizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    quantized.export(path, images=images(12))
    return path


def _own_model(x: Tensor) -> QuantizedModel:
    model = TorchvisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64,
        num_classes=10,
    )  # fmt: skip
    randomise(model)
    return _quantized(model, x, blocks=model.encoder.layers, head=model.heads, w_bits=4, a_bits=4)


def _rtn(bits: int, **settings: Any) -> Callable[[Tensor], QuantizedModel]:
    def make(x: Tensor) -> QuantizedModel:
        return _quantized(vit(1), x, **{"method": "rtn", "w_bits": bits, "a_bits": bits} | settings)

    return make


def _swin(x: Tensor) -> QuantizedModel:
    return _quantized(swin(), images(12, 40), w_bits=3, a_bits=3)


def _rotated(x: Tensor) -> QuantizedModel:
    model = vit(1, pre_norm=True, init_values=0.1)
    return _quantized(model, x, w_bits=4, a_bits=4, rotate="hadamard")


#: Model and options of an export: each form of weights, inputs and operands occurs.
CASES: dict[str, tuple[Callable[[Tensor], QuantizedModel], dict[str, Any]]] = {
    "2 bits in planes": (_rtn(2), {"packed": True}),
    "3 bits in planes": (_rtn(3), {"packed": True}),
    "4 bits, signed": (_rtn(4), {"signed": True}),
    "5 bits, softmax and head of 8, some layers of 2 and 3": (
        _rtn(5, s_bits=8, head_bits=8, bits_map=MIXED),
        {"packed": True},
    ),
    "8 bits, zero points far apart": (_rtn(8, patch_input_bits=8), {}),
    "8 bits": (_rtn(8), {}),
    "weights alone": (_rtn(4, a_bits=32), {}),
    "ranges beside zero": (_rtn(4, method="repq", softmax_quantizer="uniform"), {}),
    "two heads": (lambda x: _quantized(deit(1), x, method="qdrop", w_bits=4, a_bits=4), {}),
    "pooling by attention": (
        lambda x: _quantized(vit(1, global_pool="map", class_token=False), x, w_bits=4, a_bits=4),
        {},
    ),
    "own model": (_own_model, {}),
    "Swin": (_swin, {}),
    "rotated behind a norm": (_rotated, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_codes_and_answers_are_those_of_the_simulated_model(case: str, tmp_path: Path) -> None:
    """Without a fault, nearly no code differs, and the answers agree within rounding."""
    make, options = CASES[case]
    x = images(12)
    q = make(x)
    x = images(12, 40) if case == "Swin" else x
    path = tmp_path / "model.onnx"
    found = q.export(path, images=x, **options)
    assert not found.wrong
    assert found.weights > 5000
    assert found.ties <= 1e-4 * found.codes
    outputs = _run(path, x)
    if not found.ties:  # else a code beside a tie may have changed an answer
        assert np.allclose(outputs, q(x).numpy(), atol=1e-3)


def _run(path: Path, x: Tensor, optimised: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimised:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return outputs


def test_other_engines_give_the_same_answers(quantized: QuantizedModel, exported: Path) -> None:
    """ONNX's slow reference and onnxruntime without optimisations agree with the model."""
    x = images(3, seed=9)
    wanted = quantized(x).numpy()
    (reference,) = ReferenceEvaluator(str(exported)).run(None, {"images": x.numpy()})
    answers = [reference, _run(exported, x, optimised=False), _run(exported, x)]
    for outputs in answers:
        assert np.allclose(outputs, wanted, atol=1e-3)


def test_a_file_tells_nothing_of_the_machine_and_all_of_the_model(
    quantized: QuantizedModel, exported: Path
) -> None:
    content = exported.read_bytes()
    for word in (str(Path.cwd()), str(Path(torch.__file__).parent), "site-packages", ".py"):
        assert word.encode() not in content, word
    model = onnx.load(exported)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 21)]
    facts = OnnxFacts.model_validate_json(model.metadata_props[0].value)
    assert facts.recipe_digest == quantized.recipe.digest()
    assert make_recipe("fimaq", facts.recipe) == quantized.recipe
    macs = {layer.name: layer.macs for layer in facts.layers}
    assert macs["blocks.0.attn.qkv"] == 17 * 32 * 96
    assert macs["blocks.0.attn.query_key"] == 2 * 17 * 17 * 16
    assert macs["patch_embed.proj"] == 16 * 32 * 3 * 64
    quantized_layers = [layer.name for layer in facts.layers if layer.quantized]
    assert len(quantized_layers) == 13
    assert "patch_embed.proj" not in quantized_layers


def _changed(path: Path, out: Path, change: Callable[[Any], None], name: str) -> Path:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            array = numpy_helper.to_array(tensor).copy()
            change(array)
            tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, out)
    return out


def test_the_check_finds_wrong_codes_scales_and_biases(
    quantized: QuantizedModel, exported: Path, tmp_path: Path
) -> None:
    def one_more(array: np.ndarray) -> None:
        array.flat[5] += 1

    def larger(array: np.ndarray) -> None:
        array *= 1.02

    faults = {
        "blocks.1.mlp.fc1.weight.codes": (one_more, "1 codes of the weight of blocks.1.mlp.fc1"),
        "blocks.0.attn.qkv.input.scale": (larger, "codes of blocks.0.attn.qkv.input"),
        "blocks.0.mlp.fc2.bias": (one_more, "codes of blocks.1"),
        "head.bias": (one_more, "outputs differ"),
    }
    for name, (change, message) in faults.items():
        path = _changed(exported, tmp_path / "wrong.onnx", change, name)
        found = check_codes(quantized.chain, path, images(12))
        assert any(message in text for text in found.wrong), (name, found.wrong)
        with pytest.raises(ModelError, match="computes otherwise"):
            found.require()


def test_images_are_normalised_in_the_graph(quantized: QuantizedModel, tmp_path: Path) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    pixels = torch.randint(0, 256, (5, 32, 32, 3), generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(torch.uint8)
    means, deviations = torch.tensor(mean), torch.tensor(std)
    normal = ((pixels.float() / 255 - means) / deviations).permute(0, 3, 1, 2)
    step = Normalise(mean, std)
    assert torch.allclose(step(pixels), normal, atol=1e-5)
    assert torch.equal(step.undo(normal), pixels)
    path = tmp_path / "model.onnx"
    quantized.export(path, images=normal, normalise=(mean, std), packed=True)
    assert np.allclose(_run(path, pixels), quantized(normal).numpy(), atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_codes_unpack(bits: int) -> None:
    """ONNX's reference unpacks what `pack` wrote; the sizes are as promised."""
    rng = torch.Generator().manual_seed(bits)
    layer = QuantLinear.from_float(nn.Linear(7, 5), bits, 8)
    codes = torch.randint(0, 2**bits, (5, 7), generator=rng)
    zeros = torch.randint(0, 2**bits, (5, 1), generator=rng)
    layer.weight_quantizer.set_range(torch.ones(5, 1), zeros)
    layer.weight_quantizer.set_codes(codes)
    integers = (codes - zeros).t().numpy().astype(np.int8)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["w.codes"], ["out"])],
        "graph",
        [],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.INT8, [7, 5])],
        [numpy_helper.from_array(integers, "w.codes")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    packing.pack(model, "w.codes", layer)
    onnx.checker.check_model(model, full_check=True)
    (packed,) = [one for one in model.graph.initializer if one.name == "w.codes.packed"]
    assert len(packed.raw_data) == {2: 2 * 5, 3: 3 * 5, 4: 18}[bits]  # of 35 codes
    (found,) = ReferenceEvaluator(model).run(None, {})
    assert found.dtype == np.int8
    assert np.array_equal(found, integers)


def test_recipes_without_an_integer_form_are_refused_with_the_nearest() -> None:
    refused = {}
    for method in METHODS:
        try:
            check_exportable(make_recipe(method, {"w_bits": 4, "a_bits": 4}))
        except RecipeError as error:
            refused[method] = str(error)
    assert set(refused) >= {"adalog", "ptq4vit", "repq", "erq"}
    assert not set(refused) & {"rtn", "brecq", "qdrop", "fimaq", "aphq"}
    for method, text in refused.items():
        options = re.search(r"--method (\S+) (--.*): quantize", text)
        assert options, text
        names = re.findall(r"--([a-z-]+) uniform", options[2])
        fields = {name.replace("-", "_"): "uniform" for name in names}
        check_exportable(make_recipe(method, fields))
    with pytest.raises(RecipeError, match="w_bits 32"):
        check_exportable(make_recipe("rtn", {"w_bits": 32}))


def test_nothing_is_left_of_a_refused_export(tmp_path: Path) -> None:
    q = _quantized(vit(1), images(12), method="rtn", w_bits=8, a_bits=8)
    path = tmp_path / "model.onnx"
    with pytest.raises(ModelError, match="export without --signed"):
        q.export(path, signed=True)
    assert list(tmp_path.iterdir()) == []
