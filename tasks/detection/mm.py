# ruff: noqa: F401 - the other modules import these names from here
"""All names of mmdet and mmengine that this package uses; import them from here.

The import takes seconds, so only code that needs a model imports this module. Operators that
``mmcv-lite`` lacks are registered first (``ops.py``).
"""

import io
import logging
import warnings
from contextlib import ExitStack, redirect_stdout

from mmengine.logging import MMLogger

from tasks.detection import ops


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


with ExitStack() as quiet:
    # The import hints at optional packages that nothing here uses.
    logger = MMLogger.get_current_instance()
    logger.addFilter(_is_error)
    quiet.callback(logger.removeFilter, _is_error)
    quiet.enter_context(redirect_stdout(io.StringIO()))
    quiet.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    ops.install()
    from mmcv.cnn.bricks.transformer import FFN
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import PackDetInputs, Resize
    from mmdet.evaluation import CocoMetric
    from mmdet.models.backbones.swin import SwinBlock, SwinBlockSequence, SwinTransformer, WindowMSA
    from mmdet.models.dense_heads import RPNHead
    from mmdet.models.detectors import CascadeRCNN, MaskRCNN, TwoStageDetector
    from mmdet.models.layers import PatchEmbed, PatchMerging
    from mmdet.models.necks import FPN
    from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
    from mmdet.models.roi_heads.bbox_heads import ConvFCBBoxHead, Shared2FCBBoxHead
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import bbox2roi
    from mmdet.structures.mask import BitmapMasks
    from mmengine.config import ConfigDict
    from mmengine.registry import DefaultScope
    from mmengine.structures import InstanceData
