"""Fuzzing of ONNX files: one clear error or a result, in a gigabyte and ten seconds."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from google.protobuf import json_format
from hypothesis import given, reject
from mutations import contents, documents, tried
from onnx import ModelProto
from small_onnx import small_onnx

from fimaq_core.export.opening import open_onnx
from fimaq_core.export.runtime import OnnxModel

#: Imported before any child process starts, so that not each of them has to: it counts as a use.
IMPORTED = onnxruntime
SMALL = small_onnx()


def open_and_run(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    model = OnnxModel(open_onnx(path), threads=1)
    model(torch.ones(2, 3, 4, 4))
    model.coverage()


@given(contents([SMALL.SerializeToString()]))
def test_bytes(tmp_path: Path, content: bytes) -> None:
    tried(open_and_run, tmp_path / "model.onnx", content)


@given(documents([json_format.MessageToDict(SMALL.graph)]))
def test_graphs(tmp_path: Path, graph: Any) -> None:
    """The message stays one, so that changes reach the graph itself."""
    model = ModelProto()
    model.CopyFrom(SMALL)
    model.graph.Clear()
    try:
        json_format.ParseDict(graph, model.graph)
    except Exception:  # noqa: BLE001 (of the conversion, which is no part of the gate)
        reject()
    tried(open_and_run, tmp_path / "model.onnx", model.SerializeToString())


@given(documents([json.loads(SMALL.metadata_props[0].value)]))
def test_metadata(tmp_path: Path, facts: Any) -> None:
    model = ModelProto()
    model.CopyFrom(SMALL)
    model.metadata_props[0].value = json.dumps(facts)
    tried(open_and_run, tmp_path / "model.onnx", model.SerializeToString())
