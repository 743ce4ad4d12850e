"""Labels of class folders: asked for where orders differ, and right in every way to give them."""

import io
import json
import shutil
import unicodedata
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from fimaq_core.errors import DataError
from tasks.classification.data import open_source
from tasks.common.cell.identity import planned_folder
from tasks.common.cli.commands import build_group, main
from tasks.common.data.class_order import known_notes, ordered, read_class_order
from tasks.common.data.folders import data_name, open_folder
from tasks.common.data.imagenet import IMAGENET, wordnet_ids
from tasks.common.record import read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.common.task import LoadedModel
from tasks.retrieval.zero_shot import LINES

NUMBERS = [str(number) for number in range(12)]
ARGUMENTS = {"patch_size": 56, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 12}
QUICK = [
    "--w-bits",
    8,
    "--a-bits",
    8,
    "--calibration-images",
    12,
    "--range-search",
    "minmax",
    "--calibration-transform",
    "eval",
]


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of the task's command line, run in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(build_group("classification", "test"), [str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def colour(label: int) -> tuple[int, int, int]:
    red, green, blue = np.random.default_rng(label).integers(0, 256, 3).tolist()
    return red, green, blue


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders 0 to 11 with images of one colour each, and a ViT fitted to them in numeric order."""
    root = tmp_path_factory.mktemp("place")
    for part in ("train", "val"):
        for label, name in enumerate(NUMBERS):
            (root / "data" / part / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), colour(label)).save(root / "data" / part / name / "a.png")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = torch.stack(
        [transform(Image.new("RGB", (40, 40), colour(label))) for label in range(12)]
    )
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True).double()
        model.head.weight.copy_(torch.linalg.pinv(features, rtol=1e-3).T)
        model.head.bias.zero_()
        assert model(images).argmax(1).tolist() == list(range(12))
    save_file(model.state_dict(), root / "weights.safetensors")
    return root


def options(place: Path) -> list[object]:
    data = ["--data", place / "data", "--weights", place / "weights.safetensors", "--threads", 1]
    return ["--model", "vit_tiny_patch16_224", "--model-args", json.dumps(ARGUMENTS), *data]


def test_a_run_asks_for_the_order_of_numbered_folders(place: Path, tmp_path: Path) -> None:
    run = ["run", *options(place), "--method", "fp", "--results", tmp_path / "runs"]
    code, _, problem = command(*run)
    assert code == 2
    assert "label 2 is '10' in text order and '2' in natural order" in problem
    for choice in ("--class-order text", "--class-order natural", "--class-order FILE"):
        assert choice in problem
    listed = tmp_path / "classes.txt"
    listed.write_text("\n".join(NUMBERS) + "\n")
    mapped = tmp_path / "classes.json"
    mapped.write_text(json.dumps({name: label for label, name in reversed([*enumerate(NUMBERS)])}))
    for order, top1, word in (
        ("natural", 100.0, "natural"),
        ("text", 100 * 2 / 12, "text"),
        (listed, 100.0, "file"),
        (mapped, 100.0, "file"),
    ):
        code, said, problem = command(*run, "--class-order", order)
        assert code == 0, problem
        record = read_record(Path(said.strip().splitlines()[-1].removeprefix("record: ")))
        assert record.metrics["top1"].value == pytest.approx(top1)
        assert record.dataset.class_order == word
    assert len(list((tmp_path / "runs").rglob("result.json"))) == 4


def test_a_run_says_once_what_the_weights_file_did_for_labels(place: Path, tmp_path: Path) -> None:
    state = load_file(place / "weights.safetensors")
    named = tmp_path / "named.pth"
    torch.save({"model": state, "classes": dict(zip(NUMBERS, range(12), strict=True))}, named)
    run = ["run", *options(place), *QUICK, "--weights", named, "--results", tmp_path / "runs"]
    code, said, problem = command(*run, "--method", "fp")
    assert code == 0, problem
    code, said, problem = command(*run, "--no-reconstruct")
    assert code == 0, problem
    record = read_record(Path(said.strip().splitlines()[-1].removeprefix("record: ")))
    assert record.fp_metrics["top1"].value == 100
    assert [note for note in record.notes if "weights file" in note] == [
        "labels follow the class names in the weights file"
    ]


def test_stages_take_the_order(place: Path, tmp_path: Path) -> None:
    ranges = tmp_path / "ranges.safetensors"
    code, _, problem = command("calibrate", *options(place), *QUICK, "--out", ranges)
    assert code == 0, problem  # labels are not used
    stage = [
        "evaluate",
        ranges,
        "--data",
        place / "data",
        "--weights",
        place / "weights.safetensors",
    ]
    code, _, problem = command(*stage)
    assert (code, "--class-order natural" in problem) == (2, True)
    found = {order: command(*stage, "--class-order", order) for order in ("natural", "text")}
    right = {order: float(said.split()[1]) for order, (code, said, _) in found.items() if code == 0}
    assert right["natural"] > 60 > 40 > right["text"]


def test_identity_holds_the_order_only_where_it_is_given(tmp_path: Path) -> None:
    def folder(order: str | None) -> Path:
        data = DataRequest(tmp_path, class_order=order)
        return planned_folder(CellRequest("classification", ModelRequest("demo_vit"), data, None))

    file = tmp_path / "order.txt"
    file.write_text("a\nb\n")
    given = [folder(order) for order in ("text", "natural", str(file))]
    file.write_text("b\na\n")
    assert len({*given, folder(str(file)), folder(None)}) == 5
    with pytest.raises(
        DataError, match=r"takes text, natural or a file.* no file natrual\. Did you mean 'natural'"
    ):
        folder("natrual")


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["1", "2", "10"], "label 1 is '10' in text order and '2' in natural"),
        (["class9", "class10"], "label 0 is 'class10' in text order and 'class9' in natural"),
        (["ant", "Bee"], "label 0 is 'Bee' in text order and 'ant' in natural"),
        (
            ["e\u0301clair", "fox"],
            "label 0 is 'fox' in text order and 'e\u0301clair' as the names are stored",
        ),
    ],
)
def test_orders_that_differ(names: list[str], label: str) -> None:
    with pytest.raises(DataError, match=label):
        ordered(names, Path("val"), None)
    assert ordered(names, Path("val"), None, labels=False)[1] == "text"
    assert ordered(names, Path("val"), "text")[1] == "text"


@pytest.mark.parametrize(
    "names", [["ant", "bee"], ["00", "07", "11"], ["n01440764", "n01443537"], ["5²", "6"]]
)
def test_orders_that_do_not_differ(names: list[str]) -> None:
    assert ordered(names[::-1], Path("val"), None) == (names, "text")


def test_what_a_checkpoint_says_is_taken_where_it_fits() -> None:
    names = ["2", "10", "1"]
    assert ordered(["1", "10", "2"], Path("val"), None, names) == (names, "checkpoint")
    assert ordered(["1", "10", "2"], Path("val"), "natural", names) == (["1", "2", "10"], "natural")
    with pytest.raises(DataError, match="--class-order"):
        ordered(["1", "10", "2"], Path("val"), None, ["tench", "goldfish", "shark"])


def test_names_of_a_checkpoint_match_but_for_case_spaces_and_underscores() -> None:
    known, folders = ["Zebra", "polar bear", "ANT"], ["ant", "polar_bear", "zebra"]
    labels = ["zebra", "polar_bear", "ant"]
    assert ordered(folders, Path("val"), None, known) == (labels, "checkpoint")
    (note,) = known_notes(labels, "checkpoint", known)
    assert note.endswith("apart from case, spaces and underscores, such as 'zebra' for 'Zebra'")
    # Names that differ in case only have to match exactly.
    assert ordered(["Ant", "ant"], Path("val"), None, ["ant", "Ant"]) == (
        ["ant", "Ant"],
        "checkpoint",
    )
    with pytest.raises(DataError, match="do not match the folders, such as 'ANT'"):
        ordered(["Ant", "ANT"], Path("val"), None, ["ant", "aNT"])


def test_names_of_a_checkpoint_that_do_not_match_are_asked_about_or_noted() -> None:
    folders = ["ant", "bee"]
    with pytest.raises(
        DataError,
        match=r"weights file \(bee, wasp\) do not match the folders, such as 'ant'.*--class-order",
    ):
        ordered(folders, Path("val"), None, ["bee", "wasp"])
    assert ordered(folders, Path("val"), None, ["bee", "wasp"], labels=False) == (folders, "text")
    ids = ["n01440764", "n01443537"]
    for names, known, why in (
        (ids, ["tench", "goldfish"], "do not match the folders"),
        (folders, ids, "do not match the folders"),
        (folders, ["a", "b", "c"], "do not match the folders"),
        (folders, (), "cannot be read"),
    ):
        assert ordered(names, Path("val"), None, known) == (names, "text")
        assert known_notes(names, "text", known) == [
            f"the class names in the weights file {why}: labels follow text order"
        ]
    assert known_notes(folders, "text", None) == known_notes(folders, "text", folders) == []
    (note,) = known_notes(folders, "text", ["Bee", "Ant"])
    assert note.endswith(
        "not the class names in the weights file: label 0 is 'ant', but 'Bee' in the weights file"
    )


def test_the_question_names_what_counts_and_a_file_to_write() -> None:
    with pytest.raises(
        DataError,
        match=r"that the weights were trained with: .*or write it to data/class_order\.txt, which",
    ):
        ordered(["1", "10", "2"], Path("data/val"), None)
    with pytest.raises(DataError, match=r"Give the order of the lines in classnames\.txt: "):
        ordered(["1", "10", "2"], Path("data/val"), None, wanted=LINES)


def test_labels_by_the_weights_file_reach_the_record(place: Path) -> None:
    model, turned = torch.nn.Identity(), tuple(NUMBERS[::-1])
    made = model, "tag", "file", "0" * 64, 12, torch.tensor, torch.tensor
    source = open_source(LoadedModel(*made, class_names=turned), DataRequest(place / "data"), "val")
    assert dict(zip(source.ids, source.targets, strict=True))["val/10/a.png"] == 1
    assert source.describe().class_order == "checkpoint"
    assert source.notes() == ["labels follow the class names in the weights file"]
    assert (
        open_source(
            LoadedModel(*made, class_names=turned), DataRequest(place / "data"), "train"
        ).notes()
        == []
    )
    with pytest.raises(DataError, match="--class-order"):
        open_source(LoadedModel(*made), DataRequest(place / "data"), "val")


def test_files_of_an_order(tmp_path: Path) -> None:
    texts = {
        "a.txt": "bee\r\nant\n\ncat\n",
        "b.json": '["bee", "ant", "cat"]',
        "c.json": '{"cat": 2, "bee": 0, "ant": 1}',
        "d.json": '{"2": "cat", "0": "bee", "1": "ant"}',
        "digits.json": '{"cat": "2", "bee": "0", "ant": "1"}',
        "e.txt": "\ufeffbee\nant\ncat",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_class_order(tmp_path / name) == ["bee", "ant", "cat"]
    for text in (
        '{"a": 0, "b": 2}',
        '{"a": 0, "b": 0}',
        '{"a": true, "b": 0}',
        '{"a": null}',
        "[1, 2]",
        "3",
        "{",
        "{}",
        '{"a": 0.0}',
        '{"classes": ["a"]}',
        '{"a": "' + "9" * 5000 + '"}',
        '{"a": ' + "9" * 5000 + "}",
        "[" * 10**5,
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(
            DataError,
            match=r"x\.json is no(t valid| class order: give .*\{\"ant\": 0, \"bee\": 1\})",
        ):
            read_class_order(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ant\nbee\ncst\n",
            r"1 name without a folder, such as 'cst' \(Did you mean 'cat'\?\); "
            r"1 folder without a name in it",
        ),
        ("ant\nbee\n", "1 folder without a name in it, such as 'cat'"),
        ("ant\nbee\ncat\ndog\n", "1 name without a folder, such as 'dog'"),
        ("ant\nbee\ncat\nbee\n", "lists the class 'bee' twice"),
        ("", "3 folders without a name in it"),
    ],
)
def test_an_order_of_other_classes_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "order.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        ordered(["ant", "bee", "cat"], tmp_path / "val", str(file))


def test_unicode_forms_of_class_names(tmp_path: Path) -> None:
    """Names in another Unicode form are the same classes, in folders and in a list."""
    names = {"train": "NFC", "val": "NFD"}
    for part, form in names.items():
        for name in ("étang", "zone"):
            folder = tmp_path / "data" / part / unicodedata.normalize(form, name)
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(folder / "a.png")
    train = open_folder(tmp_path / "data", "train")
    assert train.class_names == ("zone", "étang")
    with pytest.raises(DataError, match="decomposed Unicode"):
        open_folder(tmp_path / "data", "val")
    assert open_folder(tmp_path / "data", "val", "text").targets == [
        1,
        0,
    ]  # of étang and zone, as they are listed
    file = tmp_path / "order.txt"
    for form in ("NFC", "NFD"):
        file.write_text(unicodedata.normalize(form, "étang\nzone\n"), encoding="utf-8")
        assert open_folder(tmp_path / "data", "val", str(file)).targets == [0, 1]
    (tmp_path / "data" / "val" / "étang").mkdir()
    with pytest.raises(DataError, match="several class folders called 'étang'"):
        open_folder(tmp_path / "data", "val", "text")


def test_only_imagenets_classes_bear_its_name() -> None:
    ids = wordnet_ids()
    assert data_name("val", 50_000, ids) == data_name("train", 1_281_167, ids) == IMAGENET
    assert data_name("val", 50_000, ids[::-1]) == IMAGENET
    for part, count, classes in (
        ("val", 50_000, [str(number) for number in range(1000)]),
        ("val", 50_000, [f"n{number:08d}" for number in range(1000)]),
        ("val", 49_999, ids),
        ("train", 50_000, ids),
        ("val", 50_000, ids[:999]),
    ):
        assert data_name(part, count, classes) == f"folder-{len(classes)}-classes"


def test_an_order_needs_class_folders() -> None:
    loaded = LoadedModel(
        torch.nn.Identity(), "demo", "file", "0", 100, torch.tensor, torch.tensor, "digit-pairs"
    )
    with pytest.raises(DataError, match="--class-order is for class folders"):
        open_source(loaded, DataRequest(class_order="text"), "val")


def test_a_standing_file_gives_the_order_to_all_commands(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    model = ModelRequest("vit_tiny_patch16_224", ARGUMENTS, place / "weights.safetensors")
    request = CellRequest(
        "classification", model, DataRequest(tmp_path / "data"), None, results=tmp_path
    )
    before = planned_folder(request)
    (tmp_path / "data" / "class_order.txt").write_text("\n".join(NUMBERS))
    source = open_folder(tmp_path / "data", "val")
    assert (list(source.class_names), source.class_order) == (NUMBERS, "file")
    assert planned_folder(request) != before
    assert open_folder(tmp_path / "data", "val", "natural").class_order == "natural"
