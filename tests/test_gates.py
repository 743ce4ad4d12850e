"""Foreign files are opened in few places: a walk through the source finds any other place."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase, translate
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fimaq_core", "tasks", "benchmarks", "scripts")
NOWHERE: tuple[str, ...] = ()
IMAGES = ("tasks/common/data/images.py",)
DOCUMENTS = ("fimaq_core/documents.py",)
ARRAYS = ("tasks/common/arrays.py",)
WEIGHTS = ("tasks/common/models/safe_reader.py", "tasks/common/models/pickles.py")
#: Files of our own, whose schemas bound every field.
CHECKPOINTS = ("fimaq_core/checkpoint.py",)
RECORDS = (
    "tasks/common/record.py",
    "tasks/common/cell/prediction_samples.py",
    "benchmarks/watch/events.py",
    "benchmarks/speed/results.py",
)
ONNX = ("fimaq_core/export/opening.py",)
#: Graphs that were just written, by the export or by onnxruntime.
OWN_GRAPHS = (
    "fimaq_core/export/check.py",
    "fimaq_core/export/runtime.py",
    "fimaq_core/export/writing.py",
)
#: Calls that read foreign content, and the files that may use them. A star: any characters.
ALLOWED: dict[str, tuple[str, ...]] = {
    "PIL.Image.open": IMAGES,
    "PIL.ImageFile.Parser": NOWHERE,
    "cv2.imread*": NOWHERE,
    "cv2.imdecode*": ("tasks/detection/coco.py",),  # bytes that the gate has just decoded
    "cv2.VideoCapture": NOWHERE,
    "mmcv.imread": NOWHERE,
    "mmcv.imfrombytes": NOWHERE,
    "mmengine.load": NOWHERE,
    "mmengine.runner.load_checkpoint": NOWHERE,
    "torchvision.io.*": NOWHERE,
    "imageio.*": NOWHERE,
    "json.load*": (*DOCUMENTS, "benchmarks/speed/results.py", "scripts/run_notebook.py"),  # own
    "json.JSONDecoder": NOWHERE,
    "pydantic_core.from_json": (*CHECKPOINTS, *RECORDS),
    "*.model_validate_json": (*CHECKPOINTS, *RECORDS),
    "*.validate_json": RECORDS,
    "yaml.*load*": DOCUMENTS,
    "tomllib.load*": NOWHERE,
    "xml.*parse*": NOWHERE,
    "xml.*fromstring*": ("benchmarks/report/charts.py",),  # a chart that was just drawn
    "numpy.load": NOWHERE,
    "numpy.fromfile": NOWHERE,
    "numpy.memmap": NOWHERE,
    "numpy.genfromtxt": NOWHERE,
    "numpy.loadtxt": ("tasks/common/demo/digits.py",),  # a file of the package
    "numpy.lib.format.read_*": ARRAYS,
    "zipfile.ZipFile": (*ARRAYS, *WEIGHTS, "scripts/dinov2_from_onnx.py"),  # a wheel, bounded
    "tarfile.*": NOWHERE,
    "shutil.unpack_archive": NOWHERE,
    "torch.load": WEIGHTS,
    "torch.jit.load": NOWHERE,
    "torch.hub.load*": NOWHERE,
    "safetensors.safe_open": (*CHECKPOINTS, *WEIGHTS),
    "safetensors.deserialize": NOWHERE,
    "safetensors.torch.load*": (*WEIGHTS, "scripts/demo_training/detection.py"),  # own weights
    "onnx.load*": (*ONNX, *OWN_GRAPHS, "scripts/dinov2_from_onnx.py"),
    "onnx.parser.*": NOWHERE,
    "onnx.external_data_helper.*": NOWHERE,
    "*.ParseFromString": NOWHERE,
    "*.FromString": NOWHERE,
    #: The second and the third run what the export just wrote.
    "onnxruntime.InferenceSession": (
        *("fimaq_core/export/runtime.py", "fimaq_core/export/check.py"),
        *("fimaq_core/export/timing.py", "scripts/dinov2_from_onnx.py"),
    ),
    "pickle.load*": ("benchmarks/run/child.py",),  # from the runner, through a pipe
    "pickle.Unpickler": WEIGHTS,
    "dill.*": NOWHERE,
    "joblib.load": NOWHERE,
    "marshal.load*": NOWHERE,
    "shelve.*": NOWHERE,
    "csv.reader": ("tasks/retrieval/caption_files.py",),
    #: Costs and scores that the benchmarks write or publish.
    "csv.DictReader": ("benchmarks/costs/sources.py", "benchmarks/published/table.py"),
    "pandas.read_*": ("benchmarks/compare/reference.py",),
    "pycocotools.coco.COCO": ("tasks/detection/evaluate.py",),  # without a file
    "*.loadRes": NOWHERE,
}
#: Pattern of all keys.
_ANY = re.compile("|".join(map(translate, ALLOWED)))


def names_of(tree: ast.Module) -> dict[str, str]:
    """Return the full name that each imported name of a module stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                name = one.asname or one.name.partition(".")[0]
                found[name] = one.name if one.asname else name
        elif isinstance(node, ast.ImportFrom):
            found |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
    return found


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """Return the dotted name of an expression; a part that is no name becomes ``?``."""
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def uses(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, full name and key of :data:`ALLOWED` of all that reads foreign content.

    A function that is only handed on is a use too.
    """
    tree = ast.parse(source)
    names = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = full_name(node, names)
            if _ANY.fullmatch(name):
                yield node.lineno, name, next(key for key in ALLOWED if fnmatchcase(name, key))


def all_uses(package: str) -> Iterator[tuple[str, int, str, str]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        for use in uses(path.read_text(encoding="utf-8")):
            yield path.relative_to(ROOT).as_posix(), *use


@pytest.mark.parametrize("package", PACKAGES)
def test_foreign_files_are_opened_in_their_gates_only(package: str) -> None:
    problems = [
        f"{file}:{line} uses {name}: allowed in {', '.join(ALLOWED[key]) or 'no file'}"
        for file, line, name, key in all_uses(package)
        if file not in ALLOWED[key]
    ]
    assert problems == []


def test_no_file_is_allowed_what_it_does_not_use() -> None:
    used = {(file, key) for package in PACKAGES for file, _, _, key in all_uses(package)}
    several = {*WEIGHTS, *CHECKPOINTS, *RECORDS}  # their lists are shared by several keys
    allowed = {(file, key) for key, files in ALLOWED.items() for file in {*files} - several}
    assert allowed - used == set()


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.loads(x)",
        "import json as j\nj.load(x)",
        "from json import loads\nloads(x)",
        "from json import loads as read\nmap(read, x)",
        "from PIL import Image\nwith Image.open(x) as y: pass",
        "import PIL.Image\nPIL.Image.open(x)",
        "from PIL import Image as I\nf = I.open",
        "import numpy as np\nnp.load(x)",
        "from numpy.lib import format as f\nf.read_array(x)",
        "def f():\n    import cv2\n    cv2.imread(x)",
        "import torch\ntorch.load(x)",
        "import safetensors.torch\nsafetensors.torch.load_file(x)",
        "from safetensors import safe_open\nsafe_open(x)",
        "import yaml\nyaml.safe_load(x)",
        "import pickle\npickle.loads(x)",
        "import pandas as pd\npd.read_csv(x)",
        "Model.model_validate_json(x)",
        "import tarfile\ntarfile.open(x)",
        "import zipfile\nzipfile.ZipFile(x)",
        "import onnx\nonnx.load_model_from_string(x)",
        "def f():\n    from onnx import load\n    load(x)",
        "import onnx\nonnx.ModelProto.FromString(x)",
        "from onnxruntime import InferenceSession as S\nS(x)",
    ],
)
def test_the_walk_sees_through_imports(source: str) -> None:
    assert len([*uses(source)]) == 1


@pytest.mark.parametrize("source", ["import json\njson.dumps(x)", "image.open(x)", "loads(x)"])
def test_the_walk_leaves_other_calls_alone(source: str) -> None:
    assert not [*uses(source)]
