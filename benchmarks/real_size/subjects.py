"""What is quantized at its published size: a model with random weights, random inputs, and what it gives for them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fimaq_core.samples import Ragged
from tasks.common.task import CalibrationSet, LoadedModel

_TEXT = "a photo of two red dogs on the green grass beside an old wooden table with some bread"

#: Height and width of a detector's image, as most photographs have them after resizing.
_IMAGE = (800, 1333)


@dataclass(frozen=True)
class Subject:
    """One model and how it is measured.

    Attributes:
        task: name of the task.
        fields: of the recipe, where the caller says nothing: small enough for two CPU cores.
        make: number of calibration images to the model and these; the same every time.
        expected: the float model, calibration set, recipe and device to the outputs of each part, by what it is asked for there.
    """

    task: str
    fields: dict[str, Any] = field(default_factory=dict)
    minutes: float = 10.0
    make: Callable[[str, int], tuple[LoadedModel, CalibrationSet]] = lambda name, images: random_clip(name, images)
    expected: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]] = lambda model, sample: clip_outputs(model, sample)


def subject_of(name: str) -> Subject:
    """What the model ``name`` is: a detector's short name, or open_clip's name of a model."""
    from tasks.detection.tags import SHORT_NAMES

    if name not in SHORT_NAMES:
        few = {"steps": 50, "calibration_images": 16, "range_images": 16, "batch_size": 4, "range_candidates": 64}
        return Subject("retrieval", {**few, "divergence_batch": 16, "scope": "both"})
    one = {"steps": 20, "calibration_images": 1, "range_images": 1, "scope": "backbone+fpn+rpn+roi"}
    return Subject("detection", one, 20.0, random_detector, detector_outputs)


def random_clip(name: str, pairs: int) -> tuple[LoadedModel, CalibrationSet]:
    """An open_clip model with random weights, and random images and captions of its sizes; the same every time."""
    import open_clip

    from tasks.retrieval.tags import full_name
    from tasks.retrieval.tokenizers import build_tokenizer

    torch.manual_seed(0)
    architecture = full_name(name).partition(".")[0]
    model: Any = open_clip.create_model(architecture, pretrained=None).eval()
    height, width = model.visual.image_size if isinstance(model.visual.image_size, tuple) else (model.visual.image_size,) * 2
    text = open_clip.get_model_config(architecture)["text_cfg"]
    tokenizer = build_tokenizer(architecture, text, None, int(open_clip.get_model_tokenize_cfg(model)["vocab_size"]))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(pairs, 3, height, width, generator=generator)
    lengths = torch.randint(4, 16, (pairs,), generator=generator).tolist()
    words = _TEXT.split()
    order = torch.randint(0, len(words), (pairs, 16), generator=generator).tolist()
    captions = [" ".join(words[index] for index in row[:length]) for row, length in zip(order, lengths, strict=True)]
    loaded = LoadedModel(
        model, f"{architecture}.random", "random", "0" * 64, 0, nn.Identity(), nn.Identity(), tokenizer=tokenizer,
        context_length=tokenizer.context_length,
    )  # fmt: skip
    inputs = {"vision": images, "text": tokenizer(captions)}
    return loaded, CalibrationSet(images, [str(index) for index in range(pairs)], "random", "0" * 64, inputs=inputs)


def clip_outputs(model: Any, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """Embeddings by the library's own model."""
    encode = {"vision": model.encode_image, "text": model.encode_text}
    return {part: encode[part](inputs) for part, inputs in sample.items()}


def random_detector(name: str, images: int) -> tuple[LoadedModel, CalibrationSet]:
    """A detector of mmdet with random weights, and smooth random images of a photograph's size, padded as mmdet pads them."""
    from tasks.detection.configs import build, published_config

    torch.manual_seed(0)
    model = build(published_config(name)).eval()
    generator = torch.Generator().manual_seed(0)
    padded = tuple(-(-side // 32) * 32 for side in _IMAGE)
    made, metas = [], []
    for _ in range(images):
        coarse = torch.randn(1, 3, 25, 42, generator=generator)
        image = torch.zeros(1, 3, *padded)
        image[:, :, : _IMAGE[0], : _IMAGE[1]] = nn.functional.interpolate(coarse, size=_IMAGE, mode="bilinear")
        made.append(image)
        metas.append({"img_shape": _IMAGE, "pad_shape": padded, "ori_shape": _IMAGE, "scale_factor": (1.0, 1.0)})
    nothing = nn.Identity()
    loaded = LoadedModel(model, f"{name}.random", "random", "0" * 64, 80, nothing, nothing, input_shape=(3, *padded))  # type: ignore[arg-type]
    ids = [str(index) for index in range(images)]
    return loaded, CalibrationSet(Ragged(made), ids, "random", "0" * 64, metas=metas)


def detector_outputs(model: Any, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """Maps of mmdet's own RPN, and what its heads give."""
    from tasks.detection.heads import roi_heads

    found = {}
    for part, inputs in sample.items():
        if part == "detector":
            classes, boxes = model.rpn_head(model.extract_feat(inputs))
            rows = [torch.cat([c.flatten(2), b.flatten(2)], 1).mT for c, b in zip(classes, boxes, strict=True)]
            found[part] = torch.cat(rows, 1)
            continue
        out = roi_heads(model)[part](inputs)
        found[part] = out if isinstance(out, Tensor) else torch.cat(out, 1)
    return found
