"""Commands of the detection task."""

from tasks.common.cli.commands import build_group
from tasks.common.cli.options import TaskOptions
from tasks.detection.tags import SCOPES

OPTIONS = TaskOptions(
    scope="scope",
    scopes=SCOPES,
    calibration_data=True,
    class_order=False,
    keep_outputs="Keep all detections beside the record, as detections.json in COCO's format of "
    "results.",
    exif="Turn images as their EXIF orientation tags say, or read them as stored. Give this if the "
    "annotated sizes do not tell.",
    data="COCO 2017 (a folder with annotations/, train2017/ and val2017/), or an annotation file "
    "in COCO's format (.json); demo models bring their own data.",
    preprocessing=(),
)

SUMMARY = "Quantize detectors of mmdet, measure COCO's average precisions, export to ONNX."
group = build_group("detection", SUMMARY, OPTIONS)
