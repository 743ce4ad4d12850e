"""Retrieval from images and captions to outcomes: by hand, with ties, with damaged images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fimaq_core.errors import DataError, ModelError, NumericsError
from fimaq_core.progress import OnProgress, Progress, silent
from tasks.common.data.images import DamagedImage, Images
from tasks.common.task import Evaluation
from tasks.retrieval.captions import PairSource
from tasks.retrieval.evaluate import Encoders, evaluate_pairs, normalised, truncated

CPU = torch.device("cpu")


def pairs(captions: Sequence[str], image_of: np.ndarray, ids: Sequence[str] = ()) -> PairSource:
    """Pairs whose images are their own positions."""
    names = ids or [f"i{n}.jpg" for n in range(image_of.max() + 1)]
    listed = [
        (name, [text for text, owner in zip(captions, image_of, strict=True) if owner == place])
        for place, name in enumerate(names)
    ]
    return PairSource("table", "test", listed, lambda index: index)


class Book:
    """A tokenizer of texts to numbers, encoders that look up embeddings, a list of queries."""

    def __init__(self, images: Tensor, captions: Tensor, source: PairSource) -> None:
        self.images, self.captions = images, captions
        self.number = {text: index for index, text in enumerate(source.captions)}
        self.asked: list[int] = []

    def tokenize(self, texts: list[str]) -> Tensor:
        return torch.tensor([[self.number[text]] for text in texts])

    def encoders(self) -> Encoders:
        return Encoders(self.encode_image, self.encode_text, self.tokenize, CPU)

    def encode_image(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def encode_text(self, ids: Tensor) -> Tensor:
        self.asked += ids[:, 0].tolist()
        return self.captions[ids[:, 0]]


@dataclass(frozen=True)
class Counting:
    """A tokenizer that knows the number of tokens of each text."""

    tokenize: Callable[[list[str]], Tensor]
    known: dict[str, int]

    def __call__(self, texts: list[str]) -> Tensor:
        return self.tokenize(texts)

    def lengths(self, texts: list[str]) -> list[int]:
        return [self.known[text] for text in texts]


def make(images: int = 12, seed: int = 0, noise: float = 1.0) -> tuple[PairSource, Book]:
    """Pairs with one to four captions per image, with embeddings near it, of any length."""
    generator = torch.Generator().manual_seed(seed)
    image_of = np.repeat(np.arange(images), np.random.default_rng(seed).integers(1, 5, images))
    source = pairs([f"text {n}" for n in range(len(image_of))], image_of)
    x = torch.randn(images, 8, generator=generator)
    y = x[image_of] + noise * torch.randn(len(image_of), 8, generator=generator)
    return source, Book(3 * x, y * torch.linspace(0.1, 9, len(y))[:, None], source)


def measure(
    source: PairSource,
    book: Book,
    batch: int = 5,
    broken: tuple[int, ...] = (),
    on_progress: OnProgress = silent,
) -> Evaluation:
    def read(index: int) -> int:
        if index in broken:
            raise DamagedImage("truncated")
        return index

    def transform(index: int) -> Tensor:
        return book.images[index].view(1, 1, -1)

    images = Images(source.image_ids, [0] * len(source.image_ids), read, transform, bool(broken))
    return evaluate_pairs(book.encoders(), images, source, batch, 0, on_progress)


def hits(scores: Tensor, correct: Tensor, cut: int) -> float:
    """Percentage of rows (queries) with a correct column among the first ``cut``."""
    order = scores.argsort(dim=1, descending=True)[:, :cut]
    return 100 * float(correct.gather(1, order).any(1).double().mean())


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_metrics_by_hand(batch: int) -> None:
    source, book = make()
    result = measure(source, book, batch)
    scores = F.cosine_similarity(
        book.images.double()[:, None], book.captions.double()[None], dim=-1
    )
    correct = torch.from_numpy(source.image_of)[None] == torch.arange(12)[:, None]
    expected = {}
    for cut in (1, 5, 10):
        expected[f"i2t_R@{cut}"] = hits(scores, correct, cut)
        expected[f"t2i_R@{cut}"] = hits(scores.T, correct.T, cut)
    expected["mean_recall"] = sum(expected.values()) / 6
    expected["R@1"] = (expected["i2t_R@1"] + expected["t2i_R@1"]) / 2
    assert 0 < expected["t2i_R@1"] < expected["t2i_R@5"] < 100
    assert 0 < expected["i2t_R@1"] < 100
    values = {name: metric.value for name, metric in result.metrics.items()}
    assert {name: value for name, value in values.items() if "median" not in name} == pytest.approx(
        expected
    )
    assert next(iter(values)) == "R@1"
    assert result.metrics["R@1"].stderr > 0
    assert result.n == 12
    assert result.skipped == []
    assert result.dataset.count == 12
    assert result.dataset.captions == len(source.captions)


def test_outcomes_agree_with_metrics() -> None:
    source, book = make(40, 3, 2.0)
    result = measure(source, book)
    rows = result.outcomes
    captions = len(source.captions)
    assert {len(row) for row in rows.values()} == {40 + captions}
    for direction, name in enumerate(("i2t", "t2i")):
        rank = rows["rank"][rows["direction"] == direction]
        for cut in (1, 5, 10):
            assert result.metrics[f"{name}_R@{cut}"].value == pytest.approx(
                100 * (rank < cut).mean()
            )
        assert result.metrics[f"{name}_median_rank"].value == np.median(rank) + 1
    assert np.array_equal(rows["correct"], rows["rank"] == 0)
    assert rows["sample"][:2].tolist() == ["image:i0.jpg", "image:i1.jpg"]
    assert rows["cluster"].tolist() == [*range(40), *source.image_of.tolist()]
    seen: dict[int, int] = {}
    for caption, image in enumerate(source.image_of.tolist()):
        number = seen.get(image, 0)
        assert rows["sample"][40 + caption] == f"caption:i{image}.jpg#{number}"
        seen[image] = number + 1
    assert len(set(rows["sample"])) == 40 + captions
    best_right = np.concatenate(
        [source.image_of[rows["best"][:40]] == np.arange(40), rows["best"][40:] == source.image_of]
    )
    assert np.array_equal(best_right, rows["correct"])
    assert {rows["rank"].dtype, rows["best"].dtype, rows["cluster"].dtype} == {np.dtype(np.int32)}


def test_weights_make_the_mean_of_outcomes_the_main_metric() -> None:
    """The spread of weighted sums over clusters is its error, as a comparison of methods needs."""
    source, book = make(400, 5, 0.5)
    result = measure(source, book, 64)
    weight, correct = result.outcomes["weight"], result.outcomes["correct"]
    main = result.metrics["R@1"]
    assert weight.dtype == np.float32
    assert weight.mean() == pytest.approx(1, abs=1e-5)
    mean = np.average(correct, weights=weight)
    assert 100 * mean == pytest.approx(main.value, rel=1e-6)
    assert 100 * correct.mean() != pytest.approx(main.value, abs=0.1)
    sums = np.bincount(result.outcomes["cluster"], weights=weight * (correct - mean))
    error = 100 * math.sqrt(400 / 399 * (sums**2).sum()) / weight.sum()
    assert main.stderr == pytest.approx(error, rel=0.09)
    independent = 100 * math.sqrt((weight**2 * (correct - mean) ** 2).sum()) / weight.sum()
    assert main.stderr > 1.2 * independent


@pytest.mark.parametrize("broken", [(0,), (3, 11), (4, 5, 6, 7, 8, 9)])
def test_damaged_images_take_their_captions_along(broken: tuple[int, ...]) -> None:
    """Results equal those without these images; only indices stay those of the source."""
    source, book = make()
    result = measure(source, book, 3, broken)
    rest = [index for index in range(12) if index not in broken]
    texts = [index for index, image in enumerate(source.image_of) if image in rest]
    image_of = np.array([rest.index(source.image_of[index]) for index in texts])
    ids = [source.image_ids[index] for index in rest]
    smaller = pairs([source.captions[index] for index in texts], image_of, ids)
    expected = measure(smaller, Book(book.images[rest], book.captions[texts], smaller), 3)
    assert result.metrics == expected.metrics
    assert result.n == len(rest)
    assert result.skipped == [f"i{index}.jpg" for index in broken]
    assert result.dataset.count == 12
    for name in ("sample", "direction", "rank", "correct", "weight"):
        assert np.array_equal(result.outcomes[name], expected.outcomes[name]), name
    split = len(rest)
    assert result.outcomes["best"][:split].tolist() == [
        texts[index] for index in expected.outcomes["best"][:split]
    ]
    assert result.outcomes["best"][split:].tolist() == [
        rest[index] for index in expected.outcomes["best"][split:]
    ]
    assert result.outcomes["cluster"].tolist() == [
        rest[index] for index in expected.outcomes["cluster"]
    ]


def test_damaged_images_are_an_error_unless_skipped() -> None:
    source, book = make()

    def read(index: int) -> Image.Image:
        raise DamagedImage("truncated")

    for skip, message in (
        (False, r"i0.jpg is damaged"),
        (True, "None of the images could be read"),
    ):
        images = Images(source.image_ids, [0] * 12, read, lambda _: torch.zeros(1, 1, 8), skip)
        with pytest.raises(DataError, match=message):
            evaluate_pairs(book.encoders(), images, source, 4, 0, silent)


def test_constant_embeddings_do_not_score() -> None:
    source, book = make(30)
    book.images, book.captions = (
        book.images[:1].expand(30, -1),
        book.captions[:1].expand(len(source.captions), -1),
    )
    result = measure(source, book)
    recalls = [metric.value for name, metric in result.metrics.items() if "median" not in name]
    assert len(recalls) == 8
    assert set(recalls) == {0.0}
    assert result.metrics["t2i_median_rank"].value == 30


def test_embeddings_that_agree_score_everything() -> None:
    source, book = make(30, noise=0)
    result = measure(source, book)
    assert {metric.value for name, metric in result.metrics.items() if "median" not in name} == {
        100.0
    }
    assert {metric.stderr for metric in result.metrics.values()} == {0.0}
    assert result.metrics["i2t_median_rank"].value == 1


def test_equal_tokens_are_encoded_once_and_tie() -> None:
    """Captions 0 and 3 of different images are equal to the model: neither finds its image."""
    source = pairs(("a dog", "a cat", "a car", "A dog"), np.arange(4), "abcd")
    book = Book(torch.eye(4), torch.eye(4), source)
    book.number["A dog"] = book.number["a dog"]
    result = measure(source, book, 3)
    assert sorted(book.asked) == [0, 1, 2]
    assert result.outcomes["rank"].tolist() == [1, 0, 0, 3, 0, 0, 0, 3]


@pytest.mark.parametrize("tower", ["images", "captions"])
def test_embeddings_without_a_direction_are_refused(tower: str) -> None:
    for value, message in (
        (0.0, "is zero"),
        (math.nan, "NaN or infinite"),
        (math.inf, "NaN or infinite"),
    ):
        source, book = make()
        getattr(book, tower)[7] = value
        with pytest.raises(NumericsError, match=message):
            measure(source, book)


def test_normalised() -> None:
    torch.manual_seed(0)
    x = (100 * torch.randn(20, 7)).bfloat16()
    found = normalised(x)
    assert found.dtype == torch.float32
    expected = x.double() / x.double().square().sum(-1, keepdim=True).sqrt()
    assert torch.allclose(found.double(), expected, atol=1e-7)


def test_inputs_that_do_not_fit_are_explained() -> None:
    source, book = make()
    book.encode_image = torch.nn.Conv2d(3, 4, 1)  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"does not take images of shape \(1, 1, 8\)"):
        measure(source, book)
    source, book = make()
    book.captions = book.captions[:3]
    with pytest.raises(ModelError, match=r"does not take tokens of shape \(1,\)"):
        measure(source, book)


def test_progress_counts_images_then_captions() -> None:
    source, book = make(6)
    total = 6 + len(source.captions)
    seen: list[Progress] = []
    measure(source, book, 4, on_progress=seen.append)
    assert [event.done for event in seen] == [4, 6, *range(10, total, 4), total]
    assert {(event.stage, event.total) for event in seen} == {("evaluate", total)}
    seen.clear()
    measure(source, book, 4, broken=(1,), on_progress=seen.append)
    done = [event.done for event in seen]
    assert done == sorted(done)
    assert done[-1] == total


def test_captions_beyond_the_context_are_counted() -> None:
    lengths = {"abc": 3, "abcd": 4, "abcde": 5}
    tokenizer = Counting(lambda texts: torch.zeros(len(texts), 4), lengths)
    assert truncated(tokenizer, tuple(lengths), 4) == 1
    assert truncated(tokenizer, ("abc",), None) is None
    assert truncated(lambda texts: torch.zeros(len(texts), 4), ("abcde",), 4) is None
    source, book = make()
    images = Images(
        source.image_ids, [0] * 12, lambda i: i, lambda i: book.images[i].view(1, 1, -1), False
    )  # type: ignore[arg-type, return-value]
    lengths = dict.fromkeys(source.captions, 3) | dict.fromkeys(source.captions[:2], 5)
    tokenizer = Counting(book.tokenize, lengths)
    encoders = replace(book.encoders(), tokenize=tokenizer, context_length=4)
    result = evaluate_pairs(encoders, images, source, 4, 0, silent)
    assert result.dataset.truncated_captions == 2
