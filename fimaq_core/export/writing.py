"""Writing of a quantized model as an ONNX file (opset 21, standard operators only)."""

import copy
import logging
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core import __version__
from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.export import packing, require_export
from fimaq_core.export.facts import KEY, LayerFacts, OnnxFacts
from fimaq_core.export.forms import integer_chain, layers_of
from fimaq_core.export.inputs import OPSET
from fimaq_core.export.opening import foreign_operators
from fimaq_core.export.passes import speed_up
from fimaq_core.export.recipes import check_exportable
from fimaq_core.files import replaced_whole
from fimaq_core.layers import QuantMatMul, set_quantized
from fimaq_core.recipe import Recipe

#: Version of the file format that belongs to the operators.
_IR_VERSION = 10
#: Tensor of a form: path of the layer in the chain, and the tensor's name in the form.
_TENSOR = re.compile(
    r"(?:^|\.)(segments\.\d+\.block(?:\..+?)??)\.((?:(?:input|weight|a|b|parts\.\d+)\.)?\w+)$"
)
_PATH = re.compile(r"(?:^|\.)(segments\.\d+\.block(?:\..+)?)$")


class Normalise(nn.Module):
    """Normalisation of images in the graph: uint8 (n, H, W, C) to float32 (n, C, H, W)."""

    factor: Tensor
    shift: Tensor

    def __init__(self, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        means, deviations = (torch.tensor(tuple(values)) for values in (mean, std))
        self.register_buffer("factor", 1 / (255 * deviations))
        self.register_buffer("shift", -means / deviations)

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() * self.factor + self.shift).permute(0, 3, 1, 2)

    def undo(self, images: Tensor) -> Tensor:
        """Return the uint8 images (n, H, W, C) of normalised images (n, C, H, W)."""
        values = (images.permute(0, 2, 3, 1) - self.shift) / self.factor
        return values.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Outputs:
    """Names of a file's input and outputs, and sizes of the input."""

    input: str = "images"
    outputs: tuple[str, ...] = ("logits",)
    sides: int = 0  # height and width may be any multiple of this; 0 fixes them


def layer_facts(chain: BlockChain, example: Tensor) -> list[LayerFacts]:
    """Count the multiply-adds of each quantizable layer for one sample; ``example`` is (n, ...)."""
    facts: list[LayerFacts] = []

    def note(name: str) -> Any:
        def hook(layer: Any, operands: tuple[Tensor, ...], out: Tensor) -> None:
            if isinstance(layer, QuantMatMul):
                kind, off = "product", layer.a_quantizer.off or layer.b_quantizer.off
                inner = operands[0].shape[-1]
            else:
                kind = "linear" if isinstance(layer, nn.Linear) else "convolution"
                off = layer.weight_quantizer.off or layer.input_quantizer.off
                inner = layer.weight[0].numel()
            macs = out.numel() * inner
            if isinstance(layer, nn.ConvTranspose2d):
                macs = operands[0].numel() * layer.weight.shape[0] * layer.weight[0, 0].numel()
            entry = {"name": name, "kind": kind, "macs": macs // len(example), "quantized": not off}
            facts.append(LayerFacts.model_validate(entry))

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, _, layer in layers_of(chain)]
    try:
        with torch.no_grad():
            chain(example)
    finally:
        for hook in hooks:
            hook.remove()
    return facts


def export_onnx(
    chain: BlockChain,
    example: Tensor,
    path: Path,
    facts: OnnxFacts,
    *,
    around: Any = None,
    names: Outputs = Outputs(),
) -> None:
    """Write a quantized chain to ``path``, with ``facts`` in its metadata.

    Args:
        chain: chain with decided roundings, on the CPU; it stays as it is.
        example: inputs (n >= 2, ...) of the file; the number n is free in the file.
        facts: ``packed`` and ``signed`` choose the form; ``layers`` are filled in if empty.
        around: function that makes the module to export from the chain with integer forms, such
            as one with a normalisation before it; None exports the chain itself. ``example`` is an
            input of that module.
        names: names of input and outputs.

    Raises:
        RecipeError: a quantizer of the recipe has no integer form.
        ModelError: the extra is not installed, the model has a part that cannot be exported, or
            codes do not fit 8 bits.
        CheckpointError: the file cannot be written.
    """
    require_export()
    check_exportable(Recipe.model_validate(facts.recipe))
    import onnx

    whole = chain if around is None else around(chain)
    inner = _first_input(whole, chain, example)
    twin = integer_chain(chain, inner, facts.signed)
    model = _traced(twin if around is None else around(twin), example, names)
    _rename(model, {path: name for name, path, _ in layers_of(chain)})
    speed_up(model)
    if facts.packed:
        for name, _, layer in layers_of(chain):
            if not isinstance(layer, QuantMatMul) and layer.weight_quantizer.bits <= 4:
                packing.pack(model, f"{name}.weight.codes", layer)
    _strip(model)
    if others := foreign_operators(model):
        raise ModelError(
            f"This model cannot be exported to ONNX: it has the operators {', '.join(others)}, "
            "which files of fimaq may not have."
        )
    if not facts.layers:
        facts = facts.model_copy(update={"layers": layer_facts(chain, inner)})
    model.metadata_props.add(key=KEY, value=facts.model_dump_json())
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:
        raise ModelError(f"The exported graph is not valid ONNX: {error}") from error
    write_model(model, path)


def export_float(
    chain: BlockChain,
    example: Tensor,
    path: Path,
    *,
    around: Any = None,
    names: Outputs = Outputs(),
) -> None:
    """Write the full-precision form of a chain, for comparison; see :func:`export_onnx`.

    Raises ModelError or CheckpointError.
    """
    require_export()
    plain = copy.deepcopy(chain)
    set_quantized(plain, False)
    model = _traced(plain if around is None else around(plain), example, names)
    _strip(model)
    write_model(model, path)


def write_model(model: Any, path: Path) -> None:
    """Write an ONNX model whole or not at all. Raises CheckpointError."""
    with replaced_whole(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def with_facts(path: Path, facts: OnnxFacts) -> None:
    """Replace the facts in an exported file. Raises CheckpointError."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == KEY:
            entry.value = facts.model_dump_json()
    write_model(model, path)


def _first_input(whole: nn.Module, chain: BlockChain, example: Tensor) -> Tensor:
    """Return the chain's own input for an ``example`` of the module ``whole``."""
    seen: list[Tensor] = []
    hook = chain.segment(0).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with torch.no_grad():
            whole(example)
    finally:
        hook.remove()
    return seen[0]


def _traced(module: nn.Module, example: Tensor, names: Outputs) -> Any:
    """Export a module with a free batch dimension, and return the ONNX model."""
    from onnxscript.optimizer import optimize_ir

    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=2**16)}
    for dim, name in ((2, "rows"), (3, "columns")) if names.sides else ():
        free[dim] = names.sides * torch.export.Dim(name, min=2, max=2**8)
    loud = [
        logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
    ]
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(free,),
                input_names=[names.input],
                output_names=list(names.outputs),
                verbose=False,
                optimize=False,
            )
            assert program is not None
            # The integers of weights must stay integers, and products of scales would be large.
            optimize_ir(program.model, should_fold=lambda node: False if _reads(node) else None)
    except Exception as error:
        first = str(error.__cause__ or error).strip().split("\n")[0]
        raise ModelError(f"This model cannot be exported to ONNX: {first:.300}") from error
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)
    return copy.deepcopy(program.model_proto)


def _reads(node: Any) -> bool:
    """Return True if a node reads the integers of a weight, or scales behind a product."""
    ends = (".integers", ".behind")
    return any(one is not None and (one.name or "").endswith(ends) for one in node.inputs)


def _rename(model: Any, layers: dict[str, str]) -> None:
    """Name tensors after layers: code tensors ``<layer>.<operand>.codes``, and initializers."""
    new: dict[str, str] = {}
    for tensor in model.graph.initializer:
        found = _TENSOR.search(tensor.name)
        if found and found[1] in layers:
            rest = found[2].replace("weight.integers", "weight.codes")
            new[tensor.name] = f"{layers[found[1]]}.{rest}"
    for node in model.graph.node:
        if node.op_type in ("DequantizeLinear", "ConvInteger"):
            layer, operand = _scope(node, layers)
            if operand != "weight" and layer:
                new[node.input[0]] = f"{layer}.{operand}.codes"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = new.get(name, name)
    for values in (model.graph.initializer, model.graph.value_info):
        for value in values:
            value.name = new.get(value.name, value.name)


def _scope(node: Any, layers: dict[str, str]) -> tuple[str, str]:
    """Return layer and operand of a node, from the names of modules around it."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = re.findall(r"'([^']*)'", entry.value)
            whole = scopes[-2] if len(scopes) > 1 else ""
            path, _, operand = whole.rpartition(".")
            for place, name in ((path, operand), (whole, "input")):
                if (found := _PATH.search(place)) and found[1] in layers:
                    return layers[found[1]], name
    return "", ""


def _strip(model: Any) -> None:
    """Remove everything from a model that tells of the machine: traces, paths, names of modules."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    for tensor in graph.initializer:
        tensor.ClearField("metadata_props")
        tensor.ClearField("doc_string")
    graph.name, model.ir_version = "model", _IR_VERSION
    model.producer_name, model.producer_version = "fimaq", __version__
    used = {node.domain for node in graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in used | {""}]
    del model.opset_import[:]
    model.opset_import.extend(kept)
