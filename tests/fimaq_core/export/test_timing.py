"""Speed of two files in turn."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fimaq_core.export.timing import speed


@pytest.mark.parametrize("kind", ["float", "int64", "uint8"])
def test_ratio_of_a_longer_and_a_shorter_file(kind: str, tmp_path: Path) -> None:
    """Inputs of all types run; the file with 40 times the work takes longer."""
    paths = []
    for number in (40, 1):
        names = ["y", *(f"y{index}" for index in range(1, number)), "out"]
        nodes = " ".join(f"{b} = MatMul ({a}, w)" for a, b in pairwise(names))
        text = f"""<ir_version: 10, opset_import: ["": 21]>
        g ({kind}[n, 256, 256] x) => (float[n, 256, 256] out) {{ y = Cast <to = 1> (x) {nodes} }}"""
        model = onnx.parser.parse_model(text)
        weight = np.eye(256, dtype=np.float32) / 2
        model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
        paths.append(tmp_path / f"{number}.onnx")
        onnx.save(model, paths[-1])
    found = speed(*paths, batch=2, threads=1, rounds=5)
    assert 1 < found.low <= found.ratio <= found.high
    assert found.float_ms > found.ms > 0
