"""Example predictions of retrieval and zero-shot against plain loops, and their images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caption_fakes import colour_of, loaded, write_csv, write_images, write_karpathy
from PIL import Image
from torch import Tensor, nn

from fimaq_core.errors import DataError
from fimaq_core.progress import silent
from fimaq_core.recipe import make_recipe
from tasks.common import registry
from tasks.common.cell.prediction_samples import CAPTIONS, CaptionSample, read_examples
from tasks.common.cell.run import run_cell
from tasks.common.data.images import DamagedImage, Images
from tasks.common.record import read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.common.task import Evaluation
from tasks.retrieval.captions import PairSource
from tasks.retrieval.evaluate import Encoders, evaluate_pairs
from tasks.retrieval.task import TASK, TwoTowers

CPU = torch.device("cpu")
DEMO = ModelRequest("demo_clip")


def source_of(counts: list[int], texts: list[str] | None = None) -> PairSource:
    """Images with ``counts`` captions each, taken from ``texts`` in turn."""
    numbers = iter(range(sum(counts)))
    listed = []
    for image, count in enumerate(counts):
        own = [next(numbers) for _ in range(count)]
        listed.append((f"i{image}.jpg", [texts[n] if texts else f"text {n}" for n in own]))
    return PairSource("table", "test", listed, lambda index: index)


def measure(source: PairSource, x: Tensor, y: Tensor, broken: tuple[int, ...] = ()) -> Evaluation:
    """Embeddings are looked up: of images by index, of captions by the first equal text."""
    first = {text: source.captions.index(text) for text in source.captions}

    def read(index: int) -> int:
        if index in broken:
            raise DamagedImage("truncated")
        return index

    images = Images(
        source.image_ids, [0] * len(x), read, lambda index: x[index].view(1, 1, -1), True
    )  # type: ignore[arg-type, return-value]

    def tokens(texts: list[str]) -> Tensor:
        return torch.tensor([[first[text]] for text in texts])

    encoders = Encoders(lambda a: a.flatten(1), lambda ids: y[ids[:, 0]], tokens, CPU)
    return evaluate_pairs(encoders, images, source, 5, 0, silent)


def by_hand(
    source: PairSource, x: Tensor, y: Tensor, image: int, gone: tuple[int, ...] = ()
) -> list[tuple[str, float, bool]]:
    """The three captions most similar to an image; of equal ones wrong ones first."""
    rows = []
    for number, text in enumerate(source.captions):
        owner, one, other = (
            int(source.image_of[number]),
            x[image].double(),
            y[source.captions.index(text)].double(),
        )
        if owner not in gone:
            rows.append(
                (text, float((one * other).sum() / (one.norm() * other.norm())), owner == image)
            )
    return sorted(rows, key=lambda row: (-round(row[1], 5), row[2]))[:3]


@pytest.mark.parametrize("scores_at_a_time", [1, 700, 2**24])
def test_captions_against_a_loop(monkeypatch: pytest.MonkeyPatch, scores_at_a_time: int) -> None:
    monkeypatch.setattr("tasks.retrieval.ranks._SCORES", scores_at_a_time)
    generator = torch.Generator().manual_seed(0)
    source = source_of(np.random.default_rng(0).integers(1, 6, 60).tolist())
    x = torch.randn(60, 8, generator=generator)
    y = x[source.image_of] + 2 * torch.randn(len(source.captions), 8, generator=generator)
    broken = (0, 20, 21)
    result = measure(source, 3 * x, y, broken)
    shown = [1, 5, 10, 15, 22, *range(25, 60, 5)]
    assert [entry["sample"] for entry in result.examples] == [f"i{image}.jpg" for image in shown]
    kept = [image for image in range(60) if image not in broken]
    for image, entry in zip(shown, result.examples, strict=True):
        assert entry["truth"] == [
            text
            for text, owner in zip(source.captions, source.image_of, strict=True)
            if owner == image
        ]
        expected = by_hand(source, x, y, image, broken)
        assert [(answer["caption"], answer["correct"]) for answer in entry["top"]] == [
            (text, own) for text, _, own in expected
        ]
        assert [answer["score"] for answer in entry["top"]] == pytest.approx(
            [score for _, score, _ in expected], abs=1e-5
        )
        assert entry["top"][0]["correct"] == result.outcomes["correct"][kept.index(image)]
    assert {answer["correct"] for entry in result.examples for answer in entry["top"]} == {
        True,
        False,
    }


def test_equal_captions_of_other_images_come_first() -> None:
    """Equal captions count as wrong, as in ranks: otherwise a model looks right by chance."""
    source = source_of([1, 2, 2], ["a cat", "a cat", "a dog", "a dog", "a bus"])
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    y = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    result = measure(source, x, y)
    tops = [
        [(answer["caption"], answer["correct"]) for answer in entry["top"]]
        for entry in result.examples
    ]
    assert tops[0] == [("a cat", False), ("a cat", True), ("a dog", False)]
    assert tops[1] == [("a cat", False), ("a cat", True), ("a dog", False)]
    assert tops[2] == [("a bus", True), ("a dog", False), ("a dog", True)]
    assert (
        [top[0][1] for top in tops]
        == result.outcomes["correct"][:3].tolist()
        == [False, False, True]
    )


def test_many_and_long_captions() -> None:
    source = source_of([14], ["long " * 1000 + str(n) for n in range(14)])
    (entry,) = measure(source, torch.ones(1, 2), torch.rand(14, 2) + 0.1).examples
    assert len(entry["truth"]) == CAPTIONS
    assert (
        {len(text) for text in entry["truth"]}
        == {1000}
        == {len(answer["caption"]) for answer in entry["top"]}
    )
    CaptionSample.model_validate(entry)


@pytest.mark.slow
def test_every_cell_of_the_demo_shows_the_same_samples(tmp_path: Path) -> None:
    data, files = DataRequest(limit=40), {}
    quick = {
        "calibration_images": 4,
        "range_images": 4,
        "range_candidates": 16,
        "range_rounds": 1,
        "divergence_batch": 4,
    }
    for method in ("rtn", "repq"):
        recipe = make_recipe(method, quick)
        path = run_cell(CellRequest("retrieval", DEMO, data, recipe, results=tmp_path / "runs"))
        files[method] = read_examples(path.parent, read_record(path).examples or "")
    (whole,) = (tmp_path / "runs").glob("*/*/fp/**/examples.json")
    files["fp"] = read_examples(whole.parent, whole.name)
    ids = [entry.sample for entry in files["fp"].samples]
    assert len(set(ids)) == 12
    assert all([entry.sample for entry in file.samples] == ids for file in files.values())
    assert files["rtn"] != files["fp"] != files["repq"] != files["rtn"]

    model, pictures = TASK.load(DEMO), registry.originals("retrieval", DEMO, data, ids)
    assert {(image.mode, image.size) for image in pictures.values()} == {("RGB", (48, 48))}
    from tasks.retrieval.captions import demo_scenes

    captions = demo_scenes("test").head(40).captions
    assert model.tokenizer is not None
    with torch.no_grad():
        x = model.model.encode_image(
            torch.stack([model.eval_transform(image.convert("L")) for image in pictures.values()])
        )
        y = model.model.encode_text(model.tokenizer(list(captions)))
    scores = (x / x.norm(dim=1, keepdim=True)) @ (y / y.norm(dim=1, keepdim=True)).T
    for entry, row in zip(files["fp"].samples, scores.tolist(), strict=True):
        assert isinstance(entry, CaptionSample)
        order = sorted(range(40), key=lambda index: -row[index])[:3]
        assert [answer.caption for answer in entry.top] == [captions[index] for index in order]
        assert [answer.score for answer in entry.top] == pytest.approx(
            [row[index] for index in order], abs=1e-5
        )
        assert [answer.correct for answer in entry.top] == [
            answer.caption in entry.truth for answer in entry.top
        ]
        assert entry.truth == [captions[int(entry.sample[5:10])]]


class Colours(nn.Module):
    """Encoders without training: an image is its mean colour, a text a direction by its length."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)

    def encode_text(self, ids: Tensor) -> Tensor:
        length = (ids > 0).sum(1, keepdim=True).float()
        return torch.cat([length.sin(), length.cos(), (2 * length).sin()], dim=1)


def test_zero_shot_shares(tmp_path: Path) -> None:
    """Class names are those of the texts; equal names get the names of their folders."""
    for part in ("train", "val"):
        write_images(
            tmp_path / part, [f"{folder}/{folder}{n}.png" for folder in "abc" for n in range(5)]
        )
    (tmp_path / "classnames.txt").write_text("crane\nowl, the bird\ncrane\n", encoding="utf-8")
    model = replace(loaded(24), model=Colours())
    data = DataRequest(tmp_path, evaluation="zero-shot")
    towers = TwoTowers(model.model, {})
    result = TASK.evaluate(towers, model, data, CPU, 4, 0, silent)
    assert result.dataset.name == "folder-3-classes"
    ids = [entry["sample"] for entry in result.examples]
    assert len(ids) == 12
    pictures = registry.originals("retrieval", ModelRequest("ViT-B-32"), data, ids)
    from tasks.retrieval.zero_shot import TEMPLATES

    names = ("crane (a)", "owl, the bird", "crane (c)")
    assert model.tokenizer is not None
    means = []
    for name in ("crane", "owl, the bird"):
        one = model.model.encode_text(model.tokenizer([template(name) for template in TEMPLATES]))
        mean = (one / one.norm(dim=1, keepdim=True)).mean(0)
        means.append(mean / mean.norm())
    for entry in result.examples:
        x = model.model.encode_image(model.eval_transform(pictures[entry["sample"]])[None])[0]
        cosines = [float(x / x.norm() @ mean) for mean in (means[0], means[1], means[0])]
        powers = [np.exp(np.exp(2.0) * value) for value in cosines]
        shares = dict(zip(names, (power / sum(powers) for power in powers), strict=True))
        assert entry["truth"] == names["abc".index(entry["sample"][4])]
        assert {answer["name"]: answer["share"] for answer in entry["top"]} == pytest.approx(
            shares, abs=1e-5
        )
        found = [answer["share"] for answer in entry["top"]]
        assert found == sorted(found, reverse=True)
        cranes = [answer["name"] for answer in entry["top"] if "crane" in answer["name"]]
        assert cranes == (
            ["crane (c)", "crane (a)"]
            if entry["truth"] == "crane (a)"
            else ["crane (a)", "crane (c)"]
        )


def _karpathy(root: Path, file: str, folder: str = "") -> str:
    entries: list[dict[str, Any]] = write_karpathy(root, file, folder)
    entry = next(entry for entry in entries if entry["split"] == "test")
    return (
        f"{entry['filepath']}/{entry['filename']}"
        if "filepath" in entry
        else str(entry["filename"])
    )


def _csv(root: Path) -> str:
    write_csv(root)
    return "img/1.png"


def _jsonl(root: Path) -> str:
    write_images(root, ["img/é.png"])
    for part in ("train", "test"):
        (root / f"{part}.jsonl").write_text(
            '{"image": "img/é.png", "caption": "x"}', encoding="utf-8"
        )
    return "img/é.png"


FOLDERS = {
    "coco": lambda root: _karpathy(root, "dataset_coco.json"),
    "flickr": lambda root: _karpathy(root, "dataset_flickr30k.json", "flickr30k-images"),
    "flickr, plain": lambda root: _karpathy(root, "dataset_flickr30k.json"),
    "own": lambda root: _karpathy(root, "captions.json"),
    "csv": _csv,
    "jsonl": _jsonl,
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_pictures_of_folders(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    name = FOLDERS[kind](root)
    data, model = DataRequest(root), ModelRequest("ViT-B-32")
    found = registry.originals("retrieval", model, data, [name])
    assert list(found) == [name]
    assert (found[name].mode, found[name].size) == ("RGB", (30, 26))
    assert found[name].getpixel((29, 25)) == colour_of(Path(name).name)
    Image.new("RGB", (3, 3)).save(tmp_path / "secret.png")
    up = "../" * (3 if kind == "flickr" else 2)
    for bad in (
        "../secret.png",
        f"img/{up}secret.png",
        (tmp_path / "secret.png").as_posix(),
        f"./{name}",
        "9.png",
        "",
        "captions.csv",
    ):
        with pytest.raises(DataError):
            registry.originals("retrieval", model, data, [name, bad])


def test_missing_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample 'test/1' in the demo's scenes"):
        TASK.originals(DEMO, DataRequest(), ["test/1"])
    with pytest.raises(DataError, match=r"ViT-B-32 brings no data along: .*captions\.csv"):
        TASK.originals(ModelRequest("ViT-B-32"), DataRequest(), ["a.png"])
    with pytest.raises(DataError, match="Zero-shot evaluation brings no data along"):
        TASK.originals(DEMO, DataRequest(evaluation="zero-shot"), ["val/a/1.png"])
    with pytest.raises(DataError, match="There is no folder"):
        TASK.originals(DEMO, DataRequest(tmp_path / "nowhere"), ["a.png"])
    with pytest.raises(DataError, match="holds no captions"):
        TASK.originals(DEMO, DataRequest(tmp_path), ["a.png"])
