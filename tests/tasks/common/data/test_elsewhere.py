"""Names of data sets and corruptions, and the home of the model that is evaluated there."""

from pathlib import Path

import pytest

from fimaq_core.errors import DataError
from tasks.common.data.elsewhere import (
    CORRUPTIONS,
    TITLES,
    at_home,
    corruption_of,
    folder_of,
    missing_dataset,
    read_corruption,
    read_dataset,
    settled,
)
from tasks.common.request import DataRequest

SETS, HOME = Path("/sets/r"), Path("/imagenet")


def test_each_name_has_a_title_and_may_have_a_folder() -> None:
    assert read_dataset("imagenet-r").folder is None
    assert read_dataset("imagenet-r=/sets/r") == ("imagenet-r", SETS)
    titles = {read_dataset(name).title for name in TITLES}
    assert len(titles) == len(TITLES)
    part = read_dataset("imagenet-c:fog:3=/sets/c")
    assert (part.title, part.folder) == ("ImageNet-C, fog:3", Path("/sets/c"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagenet-q", r"no data set 'imagenet-q'. Did you mean"),
        ("imagenet-c", r"no corruption '': give NAME:SEVERITY"),
        ("imagenet-c:fog:6", r"no corruption 'fog:6'"),
    ],
)
def test_an_unknown_data_set_has_one_message(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_dataset(text)


@pytest.mark.parametrize("text", ["smog:1", "fog", "fog:0", "fog:6", "fog:x", "fog:1:2", ""])
def test_an_unknown_corruption_has_one_message_with_the_names(text: str) -> None:
    with pytest.raises(DataError, match="gaussian_noise, shot_noise") as caught:
        read_corruption(text)
    assert "\n" not in str(caught.value)


def test_names_in_records_are_split_again() -> None:
    assert corruption_of("ImageNet-1k val, fog:3") == ("ImageNet-1k val", "fog", "3")
    assert corruption_of(read_dataset("imagenet-c:snow:5").title) == ("ImageNet-C", "snow", "5")
    assert corruption_of("ImageNet-1k val, ReaL labels") is None
    assert corruption_of("ImageNet-R") is None


def test_both_ways_to_name_a_data_set_have_one_form() -> None:
    short = DataRequest(SETS, calibration_data=HOME, dataset="imagenet-r")
    whole = DataRequest(HOME, dataset="imagenet-r=/sets/r")
    assert settled(short) == settled(whole) == whole
    assert at_home(whole) == DataRequest(HOME)
    assert folder_of(whole) == SETS


def test_other_calibration_data_stays_the_models_own() -> None:
    photos = Path("/photos")
    data = DataRequest(HOME, calibration_data=photos, dataset="imagenet-r=/sets/r", corrupt="fog:1")
    assert settled(data) == data
    assert at_home(data) == DataRequest(HOME, calibration_data=photos)


def test_the_home_of_real_labels_is_their_own_folder() -> None:
    data = settled(DataRequest(HOME, dataset="imagenet-real"))
    assert data == DataRequest(HOME, dataset=f"imagenet-real={HOME}")
    assert at_home(data) == DataRequest(HOME)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    alone = settled(DataRequest(SETS, dataset="imagenet-r"))
    with pytest.raises(DataError, match="ImageNet-R has no images to calibrate on"):
        at_home(alone)
    with pytest.raises(DataError, match="ImageNet-R needs its folder"):
        folder_of(DataRequest(dataset="imagenet-r"))
    missing = missing_dataset(DataRequest(dataset=f"imagenet-r={tmp_path / 'r'}"))
    assert missing is not None
    assert missing.what == f"the folder {tmp_path / 'r'}"
    assert missing_dataset(DataRequest(dataset=f"imagenet-r={tmp_path}")) is None


def test_the_names_are_those_of_the_library() -> None:
    library = pytest.importorskip("imagecorruptions")
    assert tuple(library.get_corruption_names("all")) == CORRUPTIONS
