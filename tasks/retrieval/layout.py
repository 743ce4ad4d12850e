"""Files that make a folder an image-caption data set. Imports nothing: messages and checks ahead of a run need them too."""

from pathlib import Path

COCO_FILE, FLICKR30K_FILE, FREE_FILE = "dataset_coco.json", "dataset_flickr30k.json", "captions.json"

#: Kinds of caption files; a folder holds one kind.
KINDS = (
    (COCO_FILE,),
    (FLICKR30K_FILE,),
    (FREE_FILE,),
    ("captions.csv",),
    ("captions.jsonl",),
    ("train.csv", "test.csv"),
    ("train.jsonl", "test.jsonl"),
)

LAYOUT = (
    f"A folder with images and one of these is expected: {COCO_FILE} (MS-COCO) or {FLICKR30K_FILE} (Flickr30k), Karpathy's "
    f"splits; {FREE_FILE} of the same format; captions.csv or captions.jsonl (image, caption, split); train.csv and test.csv, or "
    "train.jsonl and test.jsonl (image, caption)"
)


def caption_files(root: Path) -> list[tuple[str, ...]]:
    """The kinds of caption files of which a folder holds at least one file."""
    return [kind for kind in KINDS if any((root / name).is_file() for name in kind)]
