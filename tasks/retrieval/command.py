"""Commands of the retrieval task."""

from tasks.common.cli.commands import build_group
from tasks.common.cli.options import TaskOptions
from tasks.retrieval.tags import EVALUATIONS, SCOPES

OPTIONS = TaskOptions(
    scope="towers",
    scopes=SCOPES,
    evaluations=EVALUATIONS,
    calibration_data=True,
    towers=("vision", "text"),
    data="Data folder: MS-COCO or Flickr30k with its Karpathy JSON, or a folder with captions.csv "
    "or captions.jsonl; for zero-shot a folder with train/ and val/ (demo models bring their own "
    "data).",
    preprocessing=("input_size", "mean", "std", "interpolation"),
)
SUMMARY = "Quantize CLIP models of open_clip (simulated) and measure retrieval or zero-shot."
group = build_group("retrieval", SUMMARY, OPTIONS)
