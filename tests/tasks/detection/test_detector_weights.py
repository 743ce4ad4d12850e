"""Weights of detectors: every format they come in, key by key, and what does not fit."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file
from small_models import randomise
from torch import Tensor, nn
from torch.nn import functional

from fimaq_core.checkpoint import state_sha256
from fimaq_core.errors import ModelError, NumericsError
from tasks.common.hashing import file_sha256
from tasks.common.models.weights import read_weights
from tasks.common.request import ModelRequest
from tasks.detection.configs import build, published_config
from tasks.detection.models import adapted, load_model, merging_order, of_mmdet

pytestmark = pytest.mark.slow

#: Settings that make a published model small; all kinds of layers are left.
SMALL: dict[str, Any] = {
    "embed_dims": 8,
    "depths": (2, 1, 2, 1),
    "num_heads": (1, 2, 2, 4),
    "window_size": 3,
    "channels": 8,
    "fc_channels": 12,
    "classes": 3,
}
NAMES = ("mask_rcnn_swin_tiny", "cascade_mask_rcnn_swin_tiny")


def small(name: str = NAMES[0], **changes: Any) -> nn.Module:
    model = randomise(build(published_config(name, **{**SMALL, **changes})))
    for index, (key, value) in enumerate(model.state_dict().items()):
        if "running_" in key:
            value.copy_(
                torch.rand(value.shape, generator=torch.Generator().manual_seed(index)) + 0.5
            )
    return model


def position_index(window: int) -> Tensor:
    """Row of the bias table for each pair of positions in a window, by their distances."""
    places = [(row, column) for row in range(window) for column in range(window)]
    return torch.tensor(
        [
            [(a - c + window - 1) * (2 * window - 1) + b - d + window - 1 for c, d in places]
            for a, b in places
        ]
    )


def original(state: dict[str, Tensor], window: int = 3) -> dict[str, Tensor]:
    """Convert mmdet's weights to the layout of the Swin repository, element by element."""
    result = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "backbone":
            if parts[1:3] == ["patch_embed", "projection"]:
                parts[2] = "proj"
            if parts[1] == "stages":
                parts[1] = "layers"
                if "w_msa" in parts:
                    parts.remove("w_msa")
                if "ffn" in parts:
                    at = parts.index("ffn")
                    parts[at:-1] = ["mlp", "fc1" if parts[at + 2 : -1] == ["0", "0"] else "fc2"]
                if parts[-1] == "relative_position_index":
                    value = position_index(window)
                if "downsample" in parts:
                    width = value.shape[-1] // 4
                    old = torch.empty_like(value)
                    for row in range(2):
                        for column in range(2):
                            for channel in range(width):
                                # x[:, row::2, column::2]: (0, 0), (1, 0), (0, 1), (1, 1)
                                place = [(0, 0), (1, 0), (0, 1), (1, 1)].index((row, column))
                                old[..., place * width + channel] = value[
                                    ..., channel * 4 + row * 2 + column
                                ]
                    value = old
        result[".".join(parts)] = value
    return result


class Original:
    """The backbone of the Swin repository from its weights, slowly: window by window."""

    def __init__(
        self, state: dict[str, Tensor], depths: tuple[int, ...], heads: tuple[int, ...], window: int
    ) -> None:
        self.state = {
            name.removeprefix("backbone."): value
            for name, value in state.items()
            if name.startswith("backbone.")
        }
        self.depths, self.heads, self.window = depths, heads, window

    def linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(
            x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        )

    def attention(self, name: str, x: Tensor, heads: int, shift: int) -> Tensor:
        window, (height, width, channels) = self.window, x.shape
        x = functional.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = ((torch.arange(size) + shift) % size for size in x.shape[:2])
        out = torch.zeros_like(x)
        bias = self.state[f"{name}.relative_position_bias_table"][
            self.state[f"{name}.relative_position_index"]
        ].permute(2, 0, 1)
        for top in range(0, len(rows), window):
            for left in range(0, len(columns), window):
                r = rows[top : top + window].repeat_interleave(window)
                c = columns[left : left + window].repeat(window)
                q, k, v = (
                    self.linear(f"{name}.qkv", x[r, c])
                    .reshape(window**2, 3, heads, -1)
                    .permute(1, 2, 0, 3)
                )
                logits = q @ k.mT / math.sqrt(channels // heads) + bias
                region = (r < shift) * 2 + (
                    c < shift
                )  # what the shift has brought over from the other side
                logits = logits - 100.0 * (region[:, None] != region[None])
                out[r, c] = (logits.softmax(-1) @ v).transpose(0, 1).reshape(window**2, channels)
        return self.linear(f"{name}.proj", out)[:height, :width]

    def merging(self, name: str, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
        pixels = [x[row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.linear(f"{name}.reduction", self.norm(f"{name}.norm", torch.cat(pixels, -1)))

    def __call__(self, image: Tensor) -> list[Tensor]:
        x = functional.conv2d(
            image,
            self.state["patch_embed.proj.weight"],
            self.state["patch_embed.proj.bias"],
            stride=4,
        )
        x = self.norm("patch_embed.norm", x[0].permute(1, 2, 0))
        outputs = []
        for i, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            for j in range(depth):
                block = f"layers.{i}.blocks.{j}"
                shift = self.window // 2 if j % 2 else 0
                x = x + self.attention(
                    f"{block}.attn", self.norm(f"{block}.norm1", x), heads, shift
                )
                hidden = functional.gelu(
                    self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x))
                )
                x = x + self.linear(f"{block}.mlp.fc2", hidden)
            outputs.append(self.norm(f"norm{i}", x).permute(2, 0, 1)[None])
            if i < len(self.depths) - 1:
                x = self.merging(f"layers.{i}.downsample", x)
        return outputs


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in one.items()
    )


def write(content: dict[str, Any], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in content.items()}, path)
    else:
        torch.save(content, path)
    return path


# Conversion


def test_weights_of_the_swin_repository_compute_in_mmdet_what_they_compute_there() -> None:
    model = small()
    state = original(model.state_dict())
    # values of their own, not those that the inverse brought along
    generator = torch.Generator().manual_seed(7)
    state = {
        name: torch.randn(value.shape, generator=generator) / 3
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }
    model.load_state_dict(adapted(state, model, "a file"))
    image = torch.randn(
        1, 3, 52, 76, generator=generator
    )  # 13 x 19 tokens: windows of 3 and merging pad, in both directions
    with torch.no_grad():
        ours = model.backbone(image)
        theirs = Original(state, SMALL["depths"], SMALL["num_heads"], 3)(image)
    assert [tuple(output.shape[2:]) for output in ours] == [(13, 19), (7, 10), (4, 5), (2, 3)]
    for output, expected in zip(ours, theirs, strict=True):
        assert float(output.std()) > 0.1
        assert torch.allclose(output, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_conversion_inverts_the_layout_key_by_key(name: str) -> None:
    model = small(name)
    state = model.state_dict()
    theirs = original(state)
    assert len(theirs) == len(state)
    assert "backbone.layers.0.blocks.1.mlp.fc2.bias" in theirs
    assert not torch.equal(
        theirs["backbone.layers.0.downsample.norm.weight"],
        state["backbone.stages.0.downsample.norm.weight"],
    )
    assert equal(of_mmdet(theirs), state)
    assert equal(adapted(theirs, model, "a file"), state)
    assert equal(of_mmdet(state), state)


def test_merging_order_of_a_numbered_vector() -> None:
    # two channels of four pixels: 10 * pixel + channel, pixels as the Swin repository takes them
    given = torch.tensor([0, 1, 10, 11, 20, 21, 30, 31])
    assert merging_order(given).tolist() == [0, 20, 10, 30, 1, 21, 11, 31]


# Formats


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "form",
    [
        "plain",
        "safetensors",
        "state_dict",
        "module.",
        "original",
        "original, safetensors",
        "averaged",
        "preprocessor",
        "half",
    ],
)
def test_every_format_loads_bit_for_bit(tmp_path: Path, form: str, name: str) -> None:
    state = small(name).state_dict()
    content: dict[str, Any] = dict(state)
    if form == "state_dict":
        content = {
            "meta": {"epoch": 36, "CLASSES": ("a", "b", "c"), "PALETTE": [(1, 2, 3)]},
            "state_dict": state,
        }
    elif form == "module.":
        content = {
            "state_dict": {f"module.{key}": value for key, value in state.items()},
            "optimizer": {"state": {}},
        }
    elif form.startswith("original"):
        content = original(state)
    elif form == "averaged":
        content = {
            **state,
            **{f"ema_{key.replace('.', '_')}": value + 1 for key, value in state.items()},
        }
    elif form == "preprocessor":
        mean, deviation = (
            torch.tensor([123.675, 116.28, 103.53]),
            torch.tensor([58.395, 57.12, 57.375]),
        )
        content = {
            **state,
            "data_preprocessor.mean": mean.view(3, 1, 1),
            "data_preprocessor.std": deviation.view(3, 1, 1),
        }
    elif form == "half":
        content = {
            key: value.half() if value.is_floating_point() else value
            for key, value in state.items()
        }
        state = {
            key: value.float() if value.is_floating_point() else value
            for key, value in content.items()
        }
    path = write(
        content, tmp_path / ("weights.safetensors" if "safetensors" in form else "weights.pth")
    )
    loaded = load_model(ModelRequest(name, SMALL, path))
    assert equal(dict(loaded.model.state_dict()), dict(state))
    assert not loaded.model.training
    assert loaded.tag == f"{name}.local-{file_sha256(path)[:12]}"
    assert (loaded.source, loaded.classes, loaded.data) == (f"file {path.name}", 3, None)
    assert loaded.sha256 == state_sha256(loaded.model)


def test_logs_of_mmengines_training_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = small().state_dict()
    history = HistoryBuffer([0.5, 0.25], [1, 1])
    logs = {
        "log_scalars": {"train/loss": history},
        "runtime_info": {"lr": np.float64(0.1), "best": np.array([1.0, 2.0])},
    }
    path = write({"state_dict": state, "message_hub": logs}, tmp_path / "epoch_36.pth")

    def called(*_: Any) -> None:
        raise AssertionError("it was called")

    monkeypatch.setattr(HistoryBuffer, "__setstate__", called)
    before = set(torch.serialization.get_safe_globals())
    assert equal(read_weights(path).state, dict(state))
    assert set(torch.serialization.get_safe_globals()) == before


class Payload:
    """Unpickling would make a folder, by a function or by ``getattr`` on an object of the logs."""

    def __init__(self, trace: Path, through: Any = None) -> None:
        self.trace, self.through = trace, through

    def __reduce__(self) -> tuple[Any, ...]:
        return self.through or os.mkdir, (str(self.trace),)


class Found:
    """Unpickles as a numpy function that runs code, found by ``getattr``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (np.ndarray, "dumps")

    def __call__(self) -> None: ...


@pytest.mark.parametrize("through", [None, Found()])
def test_other_objects_are_refused_and_never_made(tmp_path: Path, through: Any) -> None:
    trace = tmp_path / "it ran"
    path = write(
        {"state_dict": small().state_dict(), "meta": Payload(trace, through)},
        tmp_path / "weights.pth",
    )
    with pytest.raises(ModelError, match=r"more than tensors.*Convert them to safetensors"):
        load_model(ModelRequest(NAMES[0], SMALL, path))
    assert not trace.exists()


def test_arrays_among_the_weights_are_refused(tmp_path: Path) -> None:
    path = write(
        {"state_dict": {**small().state_dict(), "extra": np.ones(3)}}, tmp_path / "weights.pth"
    )
    with pytest.raises(ModelError, match="no state dict"):
        load_model(ModelRequest(NAMES[0], SMALL, path))


# What does not fit


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            NAMES[1],
            {},
            r"Missing names: \d+ \('roi_head.mask_head.convs.*file 'roi_head.mask_head.2.",
        ),
        (
            NAMES[0],
            {"depths": (2, 1, 4, 1)},
            r"Unexpected names: \d+ \('backbone.stages.2.blocks.[23].",
        ),
        (NAMES[0], {"embed_dims": 16}, r"Shape mismatch: .* is \(16, 3, 4, 4\) in the file, \(8, "),
        (NAMES[0], {"window_size": 4}, r"Shape mismatch: .* is \(49, 1\) in the file, \(25, 1\)"),
        (NAMES[0], {"classes": 4}, r"Shape mismatch: .* is \(5, 12\) in the file, \(4, 12\)"),
        (
            NAMES[0],
            {"channels": 16},
            r"do not fit the model: Shape mismatch: \d+ \('neck\..* and more\)\.",
        ),
        (
            NAMES[0],
            {"mask_convs": 3},
            r"do not fit .* Missing names: 2 \('roi_head.mask_head.convs.3.conv.weight', ",
        ),
        (
            NAMES[0],
            {"mask_convs": 5},
            r"do not fit .* Unexpected names: 2 \('roi_head.mask_head.convs.4.conv.weight', ",
        ),
    ],
)
@pytest.mark.parametrize("layout", ["mmdet", "Swin repository"])
def test_weights_of_another_model_are_named(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str, layout: str
) -> None:
    state = small(name, **changes).state_dict()
    window = changes.get("window_size", 3)
    path = write(
        dict(state) if layout == "mmdet" else original(state, window), tmp_path / "weights.pth"
    )
    with pytest.raises(ModelError, match=f"(?s){message}") as caught:
        load_model(ModelRequest(NAMES[0], SMALL, path))
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_one_fault_of_each_kind_is_in_one_message(tmp_path: Path) -> None:
    state = dict(small().state_dict())
    state["roi_head.extra"] = state.pop("neck.fpn_convs.2.conv.bias")
    state["rpn_head.rpn_cls.bias"] = torch.zeros(7)
    path = write(state, tmp_path / "weights.pth")
    with pytest.raises(ModelError) as caught:
        load_model(ModelRequest(NAMES[0], SMALL, path))
    assert str(caught.value).startswith(
        f"The weights {path} do not fit the model: Missing names: 1 "
        "('neck.fpn_convs.2.conv.bias'). Unexpected names: 1 ('roi_head.extra'). "
        "Shape mismatch: 1 ('rpn_head.rpn_cls.bias')."
    )


def test_weights_of_no_detector_with_swin(tmp_path: Path) -> None:
    backbone = {
        name: value for name, value in small().state_dict().items() if name.startswith("backbone.")
    }
    resnet = {
        "backbone.conv1.weight": torch.ones(1),
        "roi_head.bbox_head.fc_cls.weight": torch.ones(4, 1),
    }
    for state in (backbone, resnet, {}):
        path = write(state, tmp_path / "weights.safetensors")
        with pytest.raises(ModelError, match=r"do not fit the model: Missing names: \d+"):
            load_model(ModelRequest(NAMES[0], SMALL, path))


def test_weights_in_both_layouts_or_of_odd_width_are_refused(tmp_path: Path) -> None:
    state = dict(small().state_dict())
    name = "backbone.stages.0.blocks.0.norm1.bias"
    twice = {**state, name.replace("stages", "layers"): state[name]}
    with pytest.raises(ModelError, match=f"'{name}' twice"):
        load_model(ModelRequest(NAMES[0], SMALL, write(twice, tmp_path / "twice.pth")))
    theirs = original(state)
    name = "backbone.layers.0.downsample.norm.weight"
    for odd in (torch.ones(7), torch.tensor(1.0)):
        path = write({**theirs, name: odd}, tmp_path / "odd.pth")
        with pytest.raises(ModelError, match=r"Shape mismatch: 1 .*stages.0.downsample.norm"):
            load_model(ModelRequest(NAMES[0], SMALL, path))


def test_weights_for_other_images_or_other_windows_are_refused() -> None:
    model = small()
    state = dict(model.state_dict())
    with pytest.raises(ModelError, match=r"another mean: \[0\.0, 0\.0, 0\.0\]"):
        adapted({**state, "data_preprocessor.mean": torch.zeros(3, 1, 1)}, model, "a file")
    name = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"
    with pytest.raises(ModelError, match="number the positions in a window differently"):
        adapted({**state, name: state[name].flip(0)}, model, "a file")


def test_damaged_files(tmp_path: Path) -> None:
    state = dict(small().state_dict())
    path = write(state, tmp_path / "weights.pth")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="damaged or no weights file"):
        load_model(ModelRequest(NAMES[0], SMALL, path))
    state["neck.lateral_convs.0.conv.bias"] = torch.full((8,), math.nan)
    with pytest.raises(NumericsError, match=r"neck\.lateral_convs\.0"):
        load_model(ModelRequest(NAMES[0], SMALL, write(state, tmp_path / "weights.pth")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": 3}, "Unknown key 'widths'"),
        ({"kind": "retinanet"}, "Unknown key 'kind'"),
        ({"init_cfg": {"type": "Pretrained"}}, "Unknown key 'init_cfg'"),
        ({"depths": (2, 2)}, "depths: List should have at least 4"),
        ({"num_heads": (3, 3, 3, 3)}, r"Shape mismatch: 6 .*bias_table"),
        ({"depths": (2, 2, 10_000_000, 2)}, "depths.2: Input should be less than or equal to 200"),
        ({"embed_dims": 2**19, "num_heads": (1, 1, 1, 1)}, r"would have [\d,]+ values"),
        ({"window_size": 10**9}, "window_size: Input should be less than"),
        ({"proposals": 2**40}, "proposals: Input should be less than"),
        ({"pixel_std": [0, 1, 1]}, "pixel_std.0: Input should be greater than 0"),
    ],
)
def test_arguments_that_the_model_does_not_take(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    path = write(dict(small().state_dict()), tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=message):
        load_model(ModelRequest(NAMES[0], {**SMALL, **arguments}, path))


@pytest.mark.parametrize("name", ["demo_mask_rcnn", "demo_cascade"])
def test_demo_models_are_loaded_from_half_precision(tmp_path: Path, name: str) -> None:
    from tasks.detection.demo.models import DEMO

    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in DEMO.build(name).state_dict().items()
    }
    path = write(state, tmp_path / "weights.safetensors")
    loaded = load_model(ModelRequest(name, weights=path))
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype))
        assert value.dtype in (torch.float32, torch.int64)
    assert loaded.sha256 == file_sha256(path)
    assert loaded.tag == f"{name}.local-{loaded.sha256[:12]}"
    assert loaded.classes == 10
    assert loaded.data is not None
    assert loaded.input_shape is not None
    image, meta = loaded.eval_transform(np.zeros((70, 99, 3), np.uint8))
    assert image.shape == (1, 3, 96, 128)  # padded, not resized
    assert meta["img_shape"] == (70, 99)


# Inference


@pytest.mark.parametrize(("name", "changes"), [(NAMES[0], {}), (NAMES[1], SMALL)])
def test_detectors_find_and_cut_out_on_the_cpu(name: str, changes: dict[str, Any]) -> None:
    from tasks.detection.mm import DetDataSample

    torch.manual_seed(0)
    model = build(published_config(name, proposals=50, **changes))
    heads = model.roi_head.bbox_head
    with torch.no_grad():
        for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
            head.fc_cls.weight.mul_(30)  # random weights that are sure of something
        sample = DetDataSample(
            metainfo={"img_shape": (90, 120), "ori_shape": (180, 240), "scale_factor": (0.5, 0.5)}
        )
        inputs = model.data_preprocessor(
            {"inputs": [torch.randint(256, (3, 90, 120)).to(torch.uint8)], "data_samples": [sample]}
        )
        assert inputs["inputs"].shape == (1, 3, 96, 128)
        (found,) = model.predict(inputs["inputs"], inputs["data_samples"])
    instances = found.pred_instances
    assert 0 < len(instances) <= 100
    assert instances.bboxes.shape == (len(instances), 4)
    assert instances.masks.shape == (len(instances), 180, 240)
    assert bool((instances.bboxes[:, 2] <= 240).all())
    assert bool((instances.scores > 0.05).all())


def test_what_is_said_of_a_published_model(tmp_path: Path) -> None:
    state = dict(small(NAMES[1]).state_dict())
    write(state, tmp_path / f"{NAMES[1]}.coco_3x.pth")
    loaded = load_model(ModelRequest(NAMES[1], SMALL, weights_folder=tmp_path))
    assert loaded.tag == f"{NAMES[1]}.coco_3x"
    assert loaded.input_shape == (3, 800, 1344)
    image, meta = loaded.eval_transform(np.zeros((480, 640, 3), np.uint8))
    assert image.shape == (1, 3, 800, 1088)  # 800 x 1067, padded
    assert meta["img_shape"] == (800, 1067)
    assert torch.allclose(
        image[0, :, 0, 0],
        -torch.tensor([123.675, 116.28, 103.53]) / torch.tensor([58.395, 57.12, 57.375]),
    )
    assert bool((image[..., 1067:] == 0).all())
