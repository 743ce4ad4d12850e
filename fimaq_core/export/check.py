"""Proof that an exported file computes with the codes of the simulated model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain
from fimaq_core.errors import ModelError
from fimaq_core.export import require_export
from fimaq_core.export.facts import OnnxFacts
from fimaq_core.export.forms import layers_of
from fimaq_core.export.inputs import is_shifted
from fimaq_core.export.writing import Normalise, Outputs, export_onnx
from fimaq_core.files import remove
from fimaq_core.layers import QuantMatMul
from fimaq_core.progress import OnProgress, Progress, silent
from fimaq_core.quantizers.affine import AffineQuantizer

#: Largest distance from a rounding tie, in steps, at which a code may differ by one: sums of
#: floating-point products depend on their order.
NEAR = 0.01
#: Largest difference of outputs relative to their standard deviation, if all codes are equal.
_OUTPUT_ERROR = 1e-3


@dataclass
class CodeCheck:
    """Comparison of the codes in a file with those of the simulated model."""

    weights: int = 0  # weight codes that were compared
    codes: int = 0  # activation codes that were compared
    ties: int = 0  # activation codes that differ by one, next to a rounding tie
    distance: float = 0.0  # largest distance of these from the tie, in steps
    error: float = 0.0  # largest difference of outputs, in standard deviations of the output
    wrong: list[str] = field(default_factory=list)  # sentences about what differs otherwise

    def text(self) -> str:
        """Return the result in one line."""
        state = "equal" if not self.wrong else "different"
        return (
            f"{self.weights:,} weight codes and {self.codes:,} activation codes are {state}, but "
            f"for {self.ties:,} next to a rounding tie"
        )

    def require(self) -> None:
        """Raise ModelError if codes differ away from a tie."""
        if self.wrong:
            found = "; ".join(self.wrong[:5])
            raise ModelError(f"The exported file computes otherwise than the model: {found}.")


@torch.no_grad()
def check_codes(
    chain: BlockChain,
    path: Path,
    inputs: Tensor,
    *,
    whole: nn.Module | None = None,
    batch: int = 8,
    on_progress: OnProgress = silent,
) -> CodeCheck:
    """Compare all codes in an exported file with those of the simulated model.

    Each quantizer of the simulated model gives its codes for an input that all earlier codes of the
    file determine: behind each quantizer, the file's codes replace the model's. So a code that
    differs has no consequences, and each layer is compared on equal inputs.

    Args:
        chain: the simulated chain, quantized, on the CPU.
        path: file of :func:`fimaq_core.export.writing.export_onnx`.
        inputs: (n, ...) inputs of the file.
        whole: module with the file's input and outputs, which runs ``chain``; None is ``chain``.
        batch: samples per run.
    """
    require_export()
    names = [*_code_names(chain)]
    session, zeros = _session(path, [name for name, _, _ in names])
    outputs = [one.name for one in session.get_outputs()]
    own = len(outputs) - len(names)
    result = CodeCheck()
    # One sample comes first: a file that takes only the number it was traced with is found.
    done, parts = 0, [inputs[:1], *(torch.split(inputs[1:], batch) if len(inputs) > 1 else ())]
    for part in parts:
        try:
            found = session.run(outputs, {session.get_inputs()[0].name: part.numpy()})
        except Exception as error:
            raise ModelError(f"onnxruntime does not run {path}: {error!s:.300}") from error
        codes = dict(zip(outputs[own:], found[own:], strict=True))
        if not done:
            _compare_weights(chain, codes, zeros, result)
        with _forced(chain, codes, zeros, result):
            wanted = (chain if whole is None else whole)(part)
        _compare_outputs(wanted, found[:own], result)
        done += len(part)
        on_progress(Progress("check codes", done, len(inputs)))
    return result


def checked_export(
    chain: BlockChain,
    inputs: Tensor,
    path: Path,
    facts: OnnxFacts,
    *,
    normalise: tuple[Sequence[float], Sequence[float]] | None = None,
    names: Outputs = Outputs(),
) -> CodeCheck:
    """Write a quantized chain to ``path``, and compare all codes; see the functions for each.

    ``inputs`` (n, ...) are inputs of the chain. ``normalise`` holds means and standard deviations
    to put in front of it. No file is left if codes differ.
    """
    start = None if normalise is None else Normalise(*normalise)
    around = None if start is None else (lambda inner: nn.Sequential(start, inner))
    inputs = inputs if start is None else start.undo(inputs)
    # Two samples at least, since a traced batch of one would stay one.
    example = inputs[:2] if len(inputs) > 1 else inputs.repeat(2, *[1] * (inputs.ndim - 1))
    export_onnx(chain, example, path, facts, around=around, names=names)
    try:
        result = check_codes(chain, path, inputs, whole=None if around is None else around(chain))
        result.require()
    except BaseException:
        remove(path)
        raise
    return result


def _code_names(chain: BlockChain) -> Iterator[tuple[str, Any, Any]]:
    """Yield name of the code tensor, layer and quantizer of each quantized operand."""
    for name, _, layer in layers_of(chain):
        if isinstance(layer, QuantMatMul):
            parts = {"a": layer.a_quantizer, "b": layer.b_quantizer}
        else:
            parts = {"weight": layer.weight_quantizer, "input": layer.input_quantizer}
        for operand, quantizer in parts.items():
            if not quantizer.off:
                yield f"{name}.{operand}.codes", layer, quantizer


def _session(path: Path, names: list[str]) -> tuple[Any, dict[str, np.ndarray]]:
    """Open a file with further outputs ``names``; return zero points of code tensors too."""
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    model = onnx.load(path, load_external_data=False)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = {node.input[0]: node for node in model.graph.node if node.op_type != "Transpose"}
    readers |= {node.input[1]: node for node in model.graph.node if node.op_type == "ConvInteger"}
    kinds = {info.name: info.type.tensor_type.elem_type for info in model.graph.value_info}
    zeros: dict[str, np.ndarray] = {}
    for name in names:
        if name not in readers:
            raise ModelError(f"{path} has no codes {name}: it was made by another version.")
        reader = readers[name]
        # The zero point is 0 if the input is in full precision, or the weight is cut into parts.
        zero = np.zeros((), np.int8)
        if reader.op_type == "ConvInteger":
            place = 2 if name.endswith(".input.codes") else 3
            zero = numpy_helper.to_array(values[reader.input[place]])
        elif reader.op_type == "DequantizeLinear":
            zero = numpy_helper.to_array(values[reader.input[2]])
        elif reader.op_type == "Cast" and (following := readers[reader.output[0]]).op_type == "Sub":
            # The exporter may have computed the cast of a constant zero point.
            cast = following.input[1]
            zero = numpy_helper.to_array(values[cast if cast in values else makers[cast].input[0]])
        zeros[name] = zero.astype(np.int32)
        kind = kinds.get(name) or helper.np_dtype_to_tensor_dtype(zero.dtype)
        model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session, zeros


def _compare_weights(
    chain: BlockChain, codes: dict[str, np.ndarray], zeros: dict[str, np.ndarray], result: CodeCheck
) -> None:
    for name, layer, quantizer in _code_names(chain):
        if not name.endswith(".weight.codes"):
            continue
        found, zero = torch.from_numpy(codes[name].astype(np.int32)), torch.from_numpy(zeros[name])
        if isinstance(layer, nn.Linear | nn.ConvTranspose2d):
            found = found.transpose(0, 1)
        rows = found.flatten(1) - zero.reshape(-1, 1)
        wanted = quantizer.codes.int() - quantizer.zero_point.int()
        result.weights += wanted.numel()
        if rows.shape != wanted.shape or (count := int((rows != wanted).sum())):
            result.wrong.append(
                f"{count} codes of the weight of {name.removesuffix('.weight.codes')}"
            )


@contextmanager
def _forced(
    chain: BlockChain, codes: dict[str, np.ndarray], zeros: dict[str, np.ndarray], result: CodeCheck
) -> Iterator[None]:
    """Replace the output of each activation quantizer by the file's codes, and compare them."""

    def compare(name: str) -> Any:
        integers = torch.from_numpy(codes[name].astype(np.int32))

        def hook(quantizer: AffineQuantizer, args: Any, kwargs: Any, _: Tensor) -> Any:
            x, scale, zero = args[0], quantizer.scale.detach(), quantizer.zero_point
            if kwargs.get("transposed"):
                scale, zero = scale.mT, zero.mT
            found = integers.mT if kwargs.get("transposed") else integers
            found = found - (zero if is_shifted(quantizer) else int(zeros[name]))
            if found.shape != x.shape:
                result.wrong.append(f"{name} has the shape {tuple(found.shape)}")
                return x
            ratio = x / scale
            own = torch.round(ratio).clamp(-zero, quantizer.levels - 1 - zero)
            differs = own != found
            result.codes += own.numel()
            if bool(differs.any()):
                # The tie lies half-way between both codes.
                tie = (own[differs] + found[differs]) / 2
                distance = (ratio.expand_as(own)[differs] - tie).abs()
                near = ((own - found)[differs].abs() == 1) & (distance <= NEAR)
                result.ties += int(near.sum())
                if bool(near.any()):
                    result.distance = max(result.distance, float(distance[near].max()))
                if count := int((~near).sum()):
                    result.wrong.append(f"{count} of {own.numel()} codes of {name[:-6]}")
            replaced: Tensor = found * scale
            return replaced

        return hook

    hooks = [
        quantizer.register_forward_hook(compare(name), with_kwargs=True)
        for name, _, quantizer in _code_names(chain)
        if not name.endswith(".weight.codes")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _compare_outputs(wanted: Any, found: list[np.ndarray], result: CodeCheck) -> None:
    for own, other in zip([wanted] if isinstance(wanted, Tensor) else wanted, found, strict=True):
        error = float((torch.from_numpy(other) - own).abs().max()) / max(float(own.std()), 1e-30)
        result.error = max(result.error, error)
        if not error <= _OUTPUT_ERROR:
            result.wrong.append(
                f"outputs differ by {error:.2g} standard deviations for equal codes"
            )
