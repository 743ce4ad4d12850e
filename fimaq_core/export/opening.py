"""Opening of ONNX files, which may come from anyone; nothing else opens them.

An accepted file is an export of fimaq that is complete in itself: it has standard operators without
inner graphs, and all its tensors have the size that they state. So it cannot read other files, run
code of its own or repeat anything. Its facts are claims of whoever wrote the file.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fimaq_core.documents import parse_json, shown, validate
from fimaq_core.errors import ModelError
from fimaq_core.export import require_export
from fimaq_core.export.facts import KEY, OnnxFacts
from fimaq_core.files import cause_of, open_regular
from fimaq_core.recipe import Recipe
from fimaq_core.terminal import one_line

#: Bounds in bytes on a file, which is protobuf's, and on all of it except the values of weights.
#: Parsed, the second part may take 50 times as much memory. Exports have about a megabyte of it.
_MOST_BYTES, _MOST_BESIDE = 2**31 - 1, 2**23
#: Oldest version of the operators.
_OLDEST = 21
#: Protobuf fields on the way to the values of a weight: graph, initializer, raw data.
_WEIGHTS = (7, 5, 9)
#: Bounds on tensors: number of dimensions, and numbers in one sample of the input.
_MOST_DIMENSIONS, _MOST_VALUES = 16, 2**26
#: Messages of the file format that an export does not have, and what they hold.
_REFUSED = {
    "FunctionProto": "functions of its own",
    "SparseTensorProto": "sparse tensors",
    "TrainingInfoProto": "training steps",
}
_INNER = "an inner graph (If, Loop, Scan)"
#: Operators of networks for images and text. Others draw random numbers, loop or read texts.
_OPERATORS = re.compile(
    "Abs|Add|And|ArgMax|ArgMin|Attention|AveragePool|BatchNormalization|BitShift|Bitwise.*|Cast|Ceil"
    "|Clip|Concat|Constant|ConstantOfShape|Conv|ConvInteger|ConvTranspose|Cos|CumSum|DepthToSpace"
    "|DequantizeLinear|Div|Einsum|Elu|Equal|Erf|Exp|Expand|Flatten|Floor|Gather|GatherElements"
    "|GatherND|Gelu|Gemm|GlobalAveragePool|GlobalMaxPool|Greater|GreaterOrEqual|GridSample"
    "|GroupNormalization|HardSigmoid|HardSwish|Identity|InstanceNormalization|IsInf|IsNaN"
    "|LayerNormalization|LeakyRelu|Less|LessOrEqual|Log|LogSoftmax|LpNormalization|MatMul|Max|MaxPool"
    "|Mean|Min|Mish|Mod|Mul|Neg|Not|Or|PRelu|Pad|Pow|QuantizeLinear|RMSNormalization|Range"
    "|Reciprocal|Reduce.*|Relu|Reshape|Resize|Round|ScatterElements|ScatterND|Selu|Shape|Sigmoid|Sign"
    "|Sin|Size|Slice|Softmax|Softplus|Softsign|SpaceToDepth|Split|Sqrt|Squeeze|Sub|Sum|Tan|Tanh|Tile"
    "|TopK|Transpose|Trilu|Unsqueeze|Where|Xor"
)
#: Bits of a value, by the name of its type.
_BITS = {
    **dict.fromkeys(("INT2", "UINT2"), 2),
    **dict.fromkeys(("INT4", "UINT4"), 4),
    **dict.fromkeys(("BOOL", "INT8", "UINT8"), 8),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64"), 64),
}
_ADVICE = "export the checkpoint with `python -m tasks.TASK export`"


@dataclass(frozen=True)
class OnnxFile:
    """Checked content of an ONNX file.

    Attributes:
        path: the file.
        model: onnx.ModelProto without external data, functions or inner graphs.
        facts: facts that the file states about itself.
        sha256: sha256 (hex) of the file.
        bytes: size of the file.
    """

    path: Path
    model: Any
    facts: OnnxFacts
    sha256: str
    bytes: int


def open_onnx(path: Path) -> OnnxFile:
    """Open an export of fimaq, and check everything in it before anything runs.

    Raises:
        ModelError: the file is missing, damaged or no export of fimaq, holds something that an
            export does not have, or the packages of the extra are not installed.
    """
    require_export()
    try:
        with open_regular(path, _MOST_BYTES) as file:
            content = file.read()
    except FileNotFoundError as error:
        raise ModelError(f"There is no file {path}.") from error
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {cause_of(error, path)}.") from error
    try:
        model = _parsed(content)
        facts = _facts(model, path)
        _check_versions(model)
        _check_messages(model)
        if others := foreign_operators(model):
            raise _Fault(f"has the operator {shown(others[0])}, which an export does not have")
        _check_ports(model.graph, facts)
        _check_structure(model)
    except _Fault as fault:
        raise ModelError(f"{path} {fault}: {fault.advice}.") from fault
    return OnnxFile(path, model, facts, hashlib.sha256(content).hexdigest(), len(content))


def foreign_operators(model: Any) -> list[str]:
    """Return the operators of an onnx.ModelProto that an export may not have."""
    return sorted(
        {
            f"{node.domain}.{node.op_type}".lstrip(".")
            for node in model.graph.node
            if node.domain or not _OPERATORS.fullmatch(node.op_type)
        }
    )


class _Fault(Exception):
    """Fault of a file, as the end of a sentence about it, and what to do."""

    def __init__(self, text: str, advice: str = _ADVICE) -> None:
        super().__init__(text)
        self.advice = advice


def _parsed(content: bytes) -> Any:
    """Return the onnx.ModelProto in the bytes of a file, without unknown fields."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        beside = _bytes_beside(content, 0, len(content), 0)
        if beside > _MOST_BESIDE:
            raise _Fault(f"has more than {_MOST_BESIDE:,} bytes beside its weights")
        model = onnx.load_model_from_string(content)
    except (IndexError, ValueError, DecodeError) as error:
        raise _Fault("is damaged or no ONNX file", "copy or export it again") from error
    # The runtime could understand fields that this version of onnx does not know.
    model.DiscardUnknownFields()
    return model


def _bytes_beside(content: bytes, at: int, end: int, depth: int) -> int:
    """Count the bytes of a protobuf message except values of weights; stop above the bound.

    Raises ValueError or IndexError for bytes that are no message. ``depth`` is the number of fields
    of ``_WEIGHTS`` on the way to the message.
    """
    beside = 0
    while at < end and beside <= _MOST_BESIDE:
        start = at
        key, at = _number(content, at)
        number, kind = key >> 3, key & 7
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 0:
            _, at = _number(content, at)
        elif kind == 2:
            size, at = _number(content, at)
        elif not size:
            raise ValueError(kind)
        beside += at - start
        if size > end - at:
            raise ValueError(size)
        if kind != 2 or number != _WEIGHTS[depth]:
            beside += size
        elif depth + 1 < len(_WEIGHTS):
            beside += _bytes_beside(content, at, at + size, depth + 1)
        at += size
    return beside


def _number(content: bytes, at: int) -> tuple[int, int]:
    """Return a number of protobuf at a place, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(value)


def _messages(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all messages in it. Raises _Fault."""
    yield message
    for field, value in message.ListFields():
        alone = isinstance(value, str | bytes) or hasattr(value, "ListFields")
        values = [value] if alone else value
        if field.message_type is not None:
            for inner in values:
                yield from _messages(inner)
        elif field.type == field.TYPE_STRING and bytes in map(type, values):
            raise _Fault("is damaged (a text is not UTF-8)", "copy or export it again")


def _facts(model: Any, path: Path) -> OnnxFacts:
    """Return the facts in the metadata of a file. Raises ModelError and _Fault."""
    texts = [entry.value for entry in model.metadata_props if entry.key == KEY]
    if len(texts) != 1:
        raise _Fault("is not an export of fimaq")
    where = f"The metadata '{KEY}' of {path}"
    facts = validate(OnnxFacts, parse_json(texts[0], where, ModelError), where, ModelError)
    recipe = validate(Recipe, facts.recipe, f"{where}, recipe", ModelError)
    if recipe.digest() != facts.recipe_digest:
        raise ModelError(f"{where} states another recipe_digest than its recipe has: {_ADVICE}.")
    return facts


def _check_versions(model: Any) -> None:
    import onnx

    if domains := [one.domain for one in model.opset_import if one.domain]:
        raise _Fault(f"needs operators of {shown(domains[0])}, which are not standard")
    versions = [one.version for one in model.opset_import]
    if len(versions) != 1 or versions[0] < _OLDEST:
        raise _Fault(f"does not state one version of operators from {_OLDEST} on")
    known = onnx.defs.onnx_opset_version()
    if versions[0] > known or model.ir_version > onnx.IR_VERSION:
        raise _Fault(
            f"is newer than onnx {onnx.__version__} (operators {versions[0]}, "
            f"format {model.ir_version})",
            "update it with pip install -U onnx onnxruntime",
        )


def _check_messages(model: Any) -> None:
    """Check each message in a model by its kind."""
    graphs = 0
    for message in _messages(model):
        kind = message.DESCRIPTOR.name
        graphs += kind == "GraphProto"
        if kind in _REFUSED or graphs > 1:
            raise _Fault(f"has {_REFUSED.get(kind, _INNER)}, which an export does not have")
        if kind == "TensorProto":
            _check_tensor(message)


def _check_tensor(tensor: Any) -> None:
    from onnx import TensorProto

    name = shown(tensor.name)
    if tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data):
        raise _Fault(f"keeps the values of {name} in another file, which is not read")
    kinds = {number: kind for kind, number in TensorProto.DataType.items()}
    bits = _BITS.get(kinds.get(tensor.data_type, ""), 0)
    if not bits:
        raise _Fault(f"has the tensor {name} of a type that an export does not have")
    dims = tensor.dims
    if len(dims) > _MOST_DIMENSIONS or any(size < 0 for size in dims):
        raise _Fault(f"has the tensor {name} with dimensions that cannot be")
    if len(tensor.raw_data) != -(-math.prod(dims) * bits // 8):
        raise _Fault(f"has the tensor {name} with another number of values than it states")


def _check_ports(graph: Any, facts: OnnxFacts) -> None:
    """Check input and outputs of a graph against the facts."""
    from onnx import TensorProto

    if len(graph.input) != 1 or not graph.output:
        raise _Fault("does not have one input and at least one output")
    kind, sizes = _port(graph.input[0])
    text, images = (TensorProto.INT64, 2), (TensorProto.FLOAT, 4)
    if not facts.normalised:
        images = (TensorProto.UINT8, 4)
    allowed = {"text": [text], "vision": [images], "detector": [images]}.get(facts.part)
    if allowed is None:  # modules of one's own take other shapes too
        allowed = [images] if facts.task else [text, *((images[0], rank) for rank in (2, 3, 4))]
    if (kind, len(sizes)) not in allowed or sizes[0] is not None:
        raise _Fault("has an input that its metadata do not describe")
    if math.prod(size for size in sizes if size is not None) > _MOST_VALUES:
        raise _Fault(f"takes more than {_MOST_VALUES:,} numbers per sample")
    ports = [_port(output) for output in graph.output]
    if any(one != TensorProto.FLOAT for one, _ in ports):
        raise _Fault("has outputs that are not float32")
    if facts.class_names is not None and not facts.part:
        classes = len(facts.class_names)
        if len(ports) != 1 or len(ports[0][1]) != 2 or ports[0][1][1] != classes:
            found = ports[0][1][1] if len(ports[0][1]) == 2 else "no"
            raise _Fault(f"has {found} outputs per image, but its metadata name {classes} classes")


def _port(value: Any) -> tuple[int, list[int | None]]:
    """Return type and sizes of an input or output; None is a size that may vary."""
    if value.type.WhichOneof("value") != "tensor_type":
        raise _Fault(f"has {shown(value.name)}, which is no tensor")
    kind = value.type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    if any(size is not None and size < 1 for size in sizes) or len(sizes) > _MOST_DIMENSIONS:
        raise _Fault(f"has {shown(value.name)} with dimensions that cannot be")
    return kind.elem_type, sizes


def _check_structure(model: Any) -> None:
    """Check names, operators and their inputs against the standard."""
    import onnx

    try:
        onnx.checker.check_model(model)
    except Exception as error:  # classes differ between versions
        raise _Fault(f"is not valid ONNX ({one_line(str(error), 200)})") from error
