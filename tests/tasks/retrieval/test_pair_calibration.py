"""Calibration pairs: equal for equal seeds, each image with an own caption, equal texts apart."""

import dataclasses
import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caption_fakes import ByteTokenizer, colour_of, loaded, write_csv, write_images
from PIL import Image

from fimaq_core.errors import DataError, ModelError
from fimaq_core.recipe import Recipe, make_recipe
from tasks.common.request import DataRequest
from tasks.common.task import CalibrationSet
from tasks.retrieval.calibration import calibration_set, drawn_caption, in_rounds, training_pairs
from tasks.retrieval.captions import PairSource, open_pairs


def recipe(count: int = 6, **changes: object) -> Recipe:
    return make_recipe("fimaq", {"calibration_images": count, **changes})


def draw(
    root: Path, count: int = 6, seed: int = 0, transform: str = "eval", **changes: Any
) -> CalibrationSet:
    return calibration_set(
        loaded(),
        DataRequest(root, **changes),
        recipe(count, seed=seed, calibration_transform=transform),
    )


def pictures(images: int) -> PairSource:
    """Images with three captions each, all distinct."""
    listed = [
        (f"{number}.png", [f"{number} {turn}" for turn in range(3)]) for number in range(images)
    ]
    return PairSource(
        "data", "train", listed, lambda index: Image.new("RGB", (8, 8), colour_of(f"{index}.png"))
    )


@pytest.mark.parametrize("transform", ["train", "eval"])
def test_same_seed_same_pairs(tmp_path: Path, transform: str) -> None:
    write_csv(tmp_path)
    first = draw(tmp_path, transform=transform)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    second = draw(tmp_path, transform=transform)
    assert (first.ids, first.captions, first.fingerprint) == (
        second.ids,
        second.captions,
        second.fingerprint,
    )
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.inputs["text"], second.inputs["text"])
    assert first.images.shape == (6, 3, 24, 24)
    assert first.images.dtype == torch.float32
    assert first.inputs.keys() == {"vision", "text"}
    assert first.inputs["vision"] is first.images
    assert (first.inputs["text"].shape, first.inputs["text"].dtype) == ((6, 16), torch.int64)
    assert first.transform == transform
    others = [draw(tmp_path, seed=seed, transform=transform) for seed in range(1, 4)]
    assert len({other.fingerprint for other in [first, *others]}) == 4
    assert len({tuple(other.ids) for other in [first, *others]}) == 4


def test_a_larger_sample_begins_with_the_smaller_one(tmp_path: Path) -> None:
    write_csv(tmp_path)
    whole = draw(tmp_path, 9, transform="train")
    assert len(set(whole.ids)) == 9
    for count in (1, 4, 8):
        part = draw(tmp_path, count, transform="train")
        assert (part.ids, part.captions) == (whole.ids[:count], whole.captions[:count])
        assert torch.equal(part.images, whole.images[:count])
        assert torch.equal(part.inputs["text"], whole.inputs["text"][:count])


def test_images_captions_and_tokens_belong_together(tmp_path: Path) -> None:
    captions = write_csv(tmp_path)
    model = loaded()
    found = draw(tmp_path, 9)
    assert found.captions is not None
    for position, (name, caption) in enumerate(zip(found.ids, found.captions, strict=True)):
        assert caption in captions[name]
        expected = model.eval_transform(Image.new("RGB", (30, 26), colour_of(Path(name).name)))
        assert torch.equal(found.images[position], expected)
        assert torch.equal(found.inputs["text"][position], ByteTokenizer(16)([caption])[0])
    assert all(int(name[4:-4]) >= 3 for name in found.ids)  # images 0 to 2 are the test part
    turns = {caption.split()[0] for caption in found.captions}
    assert turns == {"first", "second"}


def test_the_caption_depends_on_seed_and_image_only() -> None:
    few, many = pictures(20), pictures(300)
    for index in range(20):
        assert drawn_caption(few, index, 7) == drawn_caption(many, index, 7)
    counts = Counter(
        drawn_caption(many, index, seed).split()[1] for index in range(300) for seed in range(5)
    )
    for turn in "012":  # 1500 draws of probability 1/3: five standard deviations are 91
        assert abs(counts[turn] - 500) < 92
    assert [drawn_caption(many, index, 1) for index in range(50)] != [
        drawn_caption(many, index, 2) for index in range(50)
    ]


def test_truncated_captions_are_counted(tmp_path: Path) -> None:
    captions = write_csv(tmp_path)
    found = draw(tmp_path, 9)
    assert found.captions is not None
    assert found.truncated_captions == sum(len(caption) > 14 for caption in found.captions)
    assert all(len(caption) <= 14 for own in captions.values() for caption in own)
    lengths = sorted(len(caption) for caption in found.captions)
    limit = lengths[4]  # of nine
    short = calibration_set(
        loaded(limit + 2), DataRequest(tmp_path), recipe(9, seed=0, calibration_transform="eval")
    )
    assert short.truncated_captions == sum(length > limit for length in lengths)
    assert short.captions == found.captions
    assert short.fingerprint != found.fingerprint  # other tokens
    uncounted = dataclasses.replace(loaded(), tokenizer=lambda texts: ByteTokenizer(16)(texts))
    settings = recipe(9, seed=0, calibration_transform="eval")
    assert calibration_set(uncounted, DataRequest(tmp_path), settings).truncated_captions is None
    with pytest.raises(ModelError, match="has no tokenizer"):
        calibration_set(
            dataclasses.replace(loaded(), tokenizer=None), DataRequest(tmp_path), settings
        )


def test_rounds_against_brute_force() -> None:
    """Always take the least used text that is left, in the order of first appearance."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        texts = [f"text {letter}" for letter in generator.integers(0, 6, 20)]
        known = list(dict.fromkeys(texts))
        left = {
            text: [position for position, other in enumerate(texts) if other == text]
            for text in known
        }
        used = dict.fromkeys(known, 0)
        expected = []
        while any(left.values()):
            text = min(
                (text for text in known if left[text]),
                key=lambda text: (used[text], known.index(text)),
            )
            used[text] += 1
            expected.append(left[text].pop(0))
        assert in_rounds(texts) == expected
        again = [texts[position] for position in expected]
        assert in_rounds(again) == list(range(20))


def test_texts_that_read_the_same_are_equal() -> None:
    assert in_rounds(["A dog.", "a  dog. ", "a cat", "a dog"]) == [0, 2, 3, 1]


def test_a_repeated_caption_is_passed_over(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{number}.png" for number in range(12)])
    rows = [
        f"{number}.png,{'The same. ' if number % 2 else f'caption {number}'},train"
        for number in range(12)
    ]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption,split", *rows]))
    plain = np.random.default_rng(0).permutation(12).tolist()
    odd = [number for number in plain if number % 2]
    expected = [number for number in plain if number % 2 == 0 or number == odd[0]] + odd[1:]
    found = draw(tmp_path, 12)
    assert found.ids == [f"{number}.png" for number in expected]
    assert draw(tmp_path, 7).ids == found.ids[:7]
    assert len(set(found.captions[:7])) == 7  # type: ignore[index]


def test_classes_take_turns(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_images(
            tmp_path / part,
            [f"{name}/{number}.png" for name in "abcd" for number in range(5 if name < "d" else 2)],
        )
    (tmp_path / "classnames.txt").write_text("ant\nbee\ncat\ndog\n")
    settings = recipe(17, seed=2, calibration_transform="eval")
    found = calibration_set(loaded(64), DataRequest(tmp_path, evaluation="zero-shot"), settings)
    names = [
        caption.removeprefix("a photo of a ").removesuffix(".") for caption in found.captions or []
    ]
    assert [
        len(set(names[start:end])) for start, end in ((0, 4), (4, 8), (8, 11), (11, 14), (14, 17))
    ] == [4, 4, 3, 3, 3]
    assert names[:4] == names[4:8]  # the same order in each round keeps equal captions apart
    assert all(name[0] == image.split("/")[1] for name, image in zip(names, found.ids, strict=True))
    assert len(set(found.ids)) == 17
    assert all(image.startswith("train/") for image in found.ids)
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"calibration": {"ids": found.ids, "captions": found.captions}}))
    again = calibration_set(
        loaded(64), DataRequest(tmp_path, calibration_list=path, evaluation="zero-shot"), settings
    )
    assert again.fingerprint == found.fingerprint
    write_csv(tmp_path / "pairs")
    data = DataRequest(tmp_path, evaluation="zero-shot", calibration_data=tmp_path / "pairs")
    assert all(
        image.startswith("img/") for image in calibration_set(loaded(64), data, recipe(3)).ids
    )


def test_fewer_images_than_asked_for(tmp_path: Path) -> None:
    write_csv(tmp_path)
    assert len(draw(tmp_path, 9).ids) == 9
    with pytest.raises(DataError, match="10 calibration images are asked for, but there are 9"):
        draw(tmp_path, 10)


def test_damaged_images(tmp_path: Path) -> None:
    write_csv(tmp_path)
    whole = draw(tmp_path, 9)
    broken = whole.ids[3]
    (tmp_path / broken).write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"The image {broken} is damaged"):
        draw(tmp_path, 8)
    found = draw(tmp_path, 8, skip_corrupt=True)
    kept = [position for position in range(9) if position != 3]
    assert found.skipped == [broken]
    assert found.ids == [whole.ids[position] for position in kept]
    assert found.captions == [(whole.captions or [])[position] for position in kept]
    assert torch.equal(found.images, whole.images[kept])
    assert torch.equal(found.inputs["text"], whole.inputs["text"][kept])
    with pytest.raises(
        DataError, match="Only 8 of 9 calibration images could be read; 1 are damaged"
    ):
        draw(tmp_path, 9, skip_corrupt=True)


def test_the_fingerprint_sees_everything(tmp_path: Path) -> None:
    write_csv(tmp_path)
    found = draw(tmp_path, 9)
    content = hashlib.sha256(json.dumps(["eval", found.ids, found.captions]).encode())
    content.update(found.images.numpy().tobytes())
    content.update(found.inputs["text"].numpy().tobytes())
    assert found.fingerprint == content.hexdigest()
    Image.new("RGB", (30, 26), (1, 2, 3)).save(tmp_path / found.ids[0])
    changed = draw(tmp_path, 9)
    assert changed.ids == found.ids
    assert changed.fingerprint != found.fingerprint
    path = tmp_path / "captions.csv"
    path.write_text(path.read_text().replace("first of", "fIrst of"))
    assert draw(tmp_path, 9).fingerprint != changed.fingerprint


def test_drawing_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    write_csv(tmp_path)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    draw(tmp_path, transform="train")
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("kind", ["ids", "absolute paths", "record"])
def test_a_list_gives_the_very_same_pairs(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "data"
    write_csv(root)
    drawn = draw(root, 5, transform="train")
    path = tmp_path / "list"
    if kind == "record":
        path.write_text(
            json.dumps(
                {"schema_version": 1, "calibration": {"ids": drawn.ids, "captions": drawn.captions}}
            )
        )
    else:
        path.write_text(
            "\n".join(drawn.ids if kind == "ids" else [str(root / name) for name in drawn.ids])
            + "\n\n"
        )
    listed = draw(root, 5, transform="train", calibration_list=path)
    assert (listed.ids, listed.captions, listed.fingerprint) == (
        drawn.ids,
        drawn.captions,
        drawn.fingerprint,
    )
    assert torch.equal(listed.images, drawn.images)
    assert draw(root, 3, transform="train", calibration_list=path).ids == drawn.ids[:3]
    if kind != "record":
        path.write_text("\n".join(reversed(drawn.ids)))
        assert draw(root, 5, calibration_list=path).ids == drawn.ids[::-1]


def test_a_record_keeps_its_captions_and_its_order(tmp_path: Path) -> None:
    """A record wins over the draw: other captions of the images, equal texts side by side."""
    write_images(tmp_path, ["0.png", "1.png", "2.png"])
    rows = ["0.png,same", "0.png,other", "1.png,same", "2.png,third"]
    (tmp_path / "train.csv").write_text("\n".join(["image,caption", *rows]))
    path = tmp_path / "result.json"
    for captions in (["same", "same", "third"], ["other", "same", "third"]):
        path.write_text(
            json.dumps({"calibration": {"ids": ["0.png", "1.png", "2.png"], "captions": captions}})
        )
        found = draw(tmp_path, 3, calibration_list=path)
        assert found.ids == ["0.png", "1.png", "2.png"]
        assert found.captions == captions


def test_bad_lists_are_explained(tmp_path: Path) -> None:
    write_csv(tmp_path)
    path = tmp_path / "list"
    pairs = open_pairs(loaded(), DataRequest(tmp_path), "train")

    def refused(content: str | dict[str, Any], message: str, count: int = 1) -> None:
        path.write_text(
            content if isinstance(content, str) else json.dumps({"calibration": content})
        )
        with pytest.raises(DataError, match=message):
            draw(tmp_path, count, calibration_list=path)

    with pytest.raises(DataError, match="Cannot read the calibration list"):
        draw(tmp_path, calibration_list=path)
    refused(
        "img/3.png\nimg/99.png\nimg/0.png\n",
        r"names 2 images that are not in captions-9-images train, such as 'img/99.png'",
    )
    refused(
        "img/3.png\nimg/4.png\nimg/3.png\n", "names 1 images more than once, such as 'img/3.png'"
    )
    refused("img/3.png\n", "2 calibration images are asked for, but there are 1", 2)
    refused("", "there are 0")
    refused("{broken", r"The calibration list .* is not valid JSON")
    refused('{"calibration": {"ids": [' + "9" * 5000 + "]}}", "an integer has more than 64 bits")
    refused({"ids": "img/3.png"}, "is not a result record with calibration ids")
    refused({"ids": [3]}, "is not a result record with calibration ids")
    ids, first = list(pairs.image_ids[:2]), pairs.captions[0]
    refused({"ids": ids}, "without one caption per calibration image")
    refused({"ids": ids, "captions": None}, "without one caption per calibration image")
    refused({"ids": ids, "captions": [first]}, "without one caption per calibration image")
    foreign = (
        r"pairs 1 images with captions that they do not have in captions-9-images train, "
        r"such as 'img/4.png' with 'first of 3'"
    )
    refused({"ids": ids, "captions": [first, first]}, foreign)
    refused({"ids": ["img/0.png"], "captions": ["first of 0"]}, "names 1 images that are not in")


def test_zero_shot_names_follow_the_labels(tmp_path: Path) -> None:
    """Lines of classnames.txt have the order of labels, which numbered folders leave open."""
    folders = [str(number) for number in range(12)]
    write_images(tmp_path, [f"train/{folder}/a.png" for folder in folders])
    (tmp_path / "classnames.txt").write_text("\n".join(f"thing {folder}" for folder in folders))
    data = DataRequest(tmp_path, evaluation="zero-shot")
    with pytest.raises(DataError, match="--class-order natural"):
        training_pairs(loaded(), data)
    pairs = training_pairs(loaded(), dataclasses.replace(data, class_order="natural"))
    expected = [f"a photo of a thing {Path(name).parent.name}." for name in pairs.image_ids]
    assert list(pairs.captions) == expected
    other = training_pairs(loaded(), dataclasses.replace(data, class_order="text"))
    assert [
        caption == right for caption, right in zip(other.captions, expected, strict=True)
    ].count(True) == 2
