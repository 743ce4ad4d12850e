"""Exported files give the same answers in onnxruntime, in OpenVINO and in the simulated model."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from small_models import images, vit

from fimaq_core import quantize

#: Recipe and options of an export. OpenVINO treats each case in another way.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # The input of a layer behind ReLU has a zero point of 0.
    "scales per token and head, ReLU": ({"method": "fimaq-mlp", "w_bits": 4, "a_bits": 4}, {}),
    "scales per head, 3 bits in planes": (
        {"method": "qdrop", "w_bits": 3, "a_bits": 3},
        {"packed": True},
    ),
    "signed": ({"method": "rtn", "w_bits": 4, "a_bits": 4}, {"signed": True}),
}
#: Settings for tenths of a second, and a rate at which the scales of tokens become different.
FEW: dict[str, Any] = {
    "range_candidates": 32,
    "range_rounds": 1,
    "steps": 4,
    "fisher_k": 2,
    "lr_scale": 0.05,
    "mlp_steps": 2,
    "progress": False,
}
#: Largest difference of logits, in standard deviations, of a sample whose codes are equal.
SAME = 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_engines_agree(case: str, tmp_path: Path) -> None:
    """A code beside a rounding tie may differ and change its sample. A fault changes them all."""
    settings, options = CASES[case]
    # Two blocks: the answer reads one token of the last, the others are seen through its attention.
    q = quantize(vit(2), images(12), **FEW, **settings)
    path, x = tmp_path / "model.onnx", images(32, seed=5)
    q.export(path, **options)
    with torch.no_grad():
        wanted = q(x).numpy()
    for engine in (_onnxruntime, _onnxruntime_not_optimised, _openvino):
        found = engine(path, x.numpy())
        errors = np.abs(found - wanted).max(1) / wanted.std()
        assert np.mean(errors < SAME) >= 0.75, (engine.__name__, errors)
        assert np.mean(found.argmax(1) == wanted.argmax(1)) >= 0.9, engine.__name__


def _onnxruntime(path: Path, x: np.ndarray, optimised: bool = True) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimised:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": x})
    return np.asarray(logits)


def _onnxruntime_not_optimised(path: Path, x: np.ndarray) -> np.ndarray:
    return _onnxruntime(path, x, optimised=False)


def _openvino(path: Path, x: np.ndarray) -> np.ndarray:
    # Without "ACCURACY" it computes in bfloat16 where the processor can, which moves codes.
    settings = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": 1}
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(path, "CPU", settings)
    return np.asarray(model(x)[0])
