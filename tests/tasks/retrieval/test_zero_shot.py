"""Zero-shot classification against open_clip's classifier and brute force; class names."""

from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from torch import Tensor

from fimaq_core.errors import DataError, NumericsError
from fimaq_core.progress import Progress, silent
from tasks.common.data.folders import Source
from tasks.common.data.imagenet import wordnet_ids
from tasks.common.data.images import Images
from tasks.common.top_k import evaluate
from tasks.retrieval.evaluate import Encoders
from tasks.retrieval.zero_shot import TEMPLATES, ZeroShotClassifier, class_embeddings, class_names

CPU = torch.device("cpu")
NAMES = (
    "tench",
    "goldfish",
    "great white shark",
    "tiger shark",
    "hammerhead shark",
    "electric ray",
    "stingray",
)


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16)
    text = CLIPTextCfg(context_length=24, width=32, heads=2, layers=2)
    return open_clip.CLIP(16, vision, text).eval()


@pytest.fixture(scope="module")
def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=24)


def encoders(model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer) -> Encoders:
    return Encoders(model.encode_image, model.encode_text, tokenizer, CPU)


@pytest.mark.parametrize("batch", [1, 8, 1000])
@pytest.mark.parametrize("classes_at_a_time", [2, 50])
def test_class_embeddings_are_open_clips(
    monkeypatch: pytest.MonkeyPatch,
    model: open_clip.CLIP,
    tokenizer: open_clip.SimpleTokenizer,
    batch: int,
    classes_at_a_time: int,
) -> None:
    monkeypatch.setattr("tasks.retrieval.zero_shot._CLASSES", classes_at_a_time)
    seen: list[Progress] = []
    found = class_embeddings(encoders(model, tokenizer), NAMES, batch, seen.append, TEMPLATES[:5])
    expected = open_clip.build_zero_shot_classifier(
        model, tokenizer, NAMES, open_clip.OPENAI_IMAGENET_TEMPLATES[:5]
    ).T
    assert found.shape == (7, 16)
    assert not found.requires_grad
    assert torch.allclose(found, expected, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    assert [event.done for event in seen] == sorted(event.done for event in seen)
    assert (seen[-1].done, seen[-1].total) == (35, 35)


def test_all_templates_are_the_default(
    model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer
) -> None:
    assert len(TEMPLATES) == 80
    found = class_embeddings(encoders(model, tokenizer), NAMES[:1], 80, silent)
    expected = open_clip.build_zero_shot_classifier(
        model, tokenizer, NAMES[:1], open_clip.OPENAI_IMAGENET_TEMPLATES
    ).T
    assert torch.allclose(found, expected, atol=1e-5)


def test_logits_are_the_models(model: open_clip.CLIP, tokenizer: open_clip.SimpleTokenizer) -> None:
    """Logits with one template equal the model's own comparison of images with texts."""
    torch.manual_seed(1)
    images = torch.randn(4, 3, 16, 16)
    embeddings = class_embeddings(
        encoders(model, tokenizer), NAMES, 8, silent, [lambda name: f"a {name}"]
    )
    with torch.no_grad():
        found = ZeroShotClassifier(model.encode_image, embeddings, model.logit_scale)(images)
        expected, _ = model.get_logits(images, tokenizer([f"a {name}" for name in NAMES]))
    assert torch.allclose(found, expected, atol=1e-4)
    assert expected.std() > 0.1


def test_top_1_by_brute_force() -> None:
    torch.manual_seed(2)
    pixels, classes = torch.randn(50, 6), torch.randn(9, 6)
    targets = [
        min(range(9), key=lambda c: float((pixels[i] - classes[c]).square().sum()))
        for i in range(50)
    ]
    classifier = ZeroShotClassifier(
        lambda x: x.flatten(1), classes / classes.norm(dim=1, keepdim=True), torch.tensor([2.0])
    )
    source = Source(
        "table", "val", [f"s{i}" for i in range(50)], targets, 9, lambda _: Image.new("L", (1, 1))
    )
    images = Images(source.ids, targets, lambda i: i, lambda i: pixels[i].view(1, 1, -1), False)
    result = evaluate(classifier, images, source, CPU, 7, 0, silent)
    right = five = 0
    for image, target in zip(pixels.tolist(), targets, strict=True):
        cosines = []
        for name in classes.tolist():
            length = sum(a * a for a in name) ** 0.5 * sum(a * a for a in image) ** 0.5
            cosines.append(sum(a * b for a, b in zip(image, name, strict=True)) / length)
        place = sorted(cosines, reverse=True).index(cosines[target])
        right, five = right + (place == 0), five + (place < 5)
    assert 0 < right < 50
    assert result.metrics["top1"].value == 2 * right
    assert result.metrics["top5"].value == 2 * five


@pytest.mark.parametrize("width", [7, 64, 512])
def test_classes_with_equal_embeddings_tie(width: int) -> None:
    """A collapsed text encoder must not score, for any rounding of a product."""
    torch.manual_seed(width)
    one, pixels = (
        torch.nn.functional.normalize(torch.randn(1, width), dim=-1),
        torch.randn(10, width),
    )
    classifier = ZeroShotClassifier(lambda x: x, one.repeat(17, 1), torch.tensor(4.6))
    logits = torch.cat([classifier(pixels), classifier(pixels[:1])])
    assert (logits == logits[:, :1]).all()


def test_embeddings_of_zero_are_refused() -> None:
    classifier = ZeroShotClassifier(torch.zeros_like, torch.eye(3), torch.tensor(0.0))
    with pytest.raises(NumericsError, match="is zero"):
        classifier(torch.ones(2, 3))

    def opposite(ids: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0], [-1.0, 0.0]])[ids[:, 0] % 2]

    with pytest.raises(NumericsError, match="is zero"):
        class_embeddings(
            Encoders(
                lambda x: x,
                opposite,
                lambda texts: torch.tensor([[len(text)] for text in texts]),
                CPU,
            ),
            ["x"],
            4,
            silent,
            [lambda name: name, lambda name: name + "s"],
        )


WORDNET, THREE = list(wordnet_ids()), ["a", "b", "c"]


def test_class_names(tmp_path: Path) -> None:
    imagenet = class_names(tmp_path, WORDNET)
    assert len(imagenet) == 1000
    assert (imagenet[0], imagenet[999]) == ("tench", "toilet paper")
    with pytest.raises(
        DataError, match=r"names of the 3 classes: write them into .*classnames\.txt"
    ):
        class_names(tmp_path, THREE)
    with pytest.raises(DataError, match="names of the 1000 classes"):
        class_names(tmp_path, [f"n{n:08d}" for n in range(1000)])  # ids, but of other classes
    turned = class_names(tmp_path, WORDNET[::-1])
    assert (turned[0], turned[999]) == ("toilet paper", "tench")
    file = tmp_path / "classnames.txt"
    file.write_text("rot\ngrün \n藍\n", encoding="utf-8")
    assert class_names(tmp_path, THREE) == ("rot", "grün", "藍")
    with pytest.raises(DataError, match=r"has 3 lines for 1000 classes"):
        class_names(tmp_path, WORDNET)
    file.write_text("\n".join(f"thing {n}" for n in range(1000)))
    assert class_names(tmp_path, WORDNET)[999] == "thing 999"
    file.write_text("a\n\nb\n")
    with pytest.raises(DataError, match=r"Line 2 of .* is empty"):
        class_names(tmp_path, THREE)
    file.write_bytes("grün".encode("latin-1"))
    with pytest.raises(DataError, match=r"classnames\.txt is not UTF-8 text"):
        class_names(tmp_path, THREE[:1])
    file.write_text("a\n" + "b" * 5001 + "\nc\n")
    with pytest.raises(DataError, match=r"line 2: the class name .{100} has 5,001 characters"):
        class_names(tmp_path, THREE)
