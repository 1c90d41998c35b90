"""Networks and data sets that benchmarks/accuracy.py compares methods on."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A network, its data, and the training that all runs start from.

    The config is ``benchmarks/configs/NAME.py``, with the key in ``TASKS`` as
    the name.

    Args:
        title (str): Network and data set.
        weights (str): Data of the pretrained weights.
        train (str): Images of the training.
        test (str): Images of the evaluation.
        metric (str): Key under which the evaluation logs the score.
        metric_name (str): Name of the score in tables and plots.
        scope (str): Default scope of the config.
        start (int): Length of the dense training that all runs start from,
            in iterations.
        lr_after_start (float): Learning rate of all parameters after it.
    """

    title: str
    weights: str
    train: str
    test: str
    metric: str = 'mIoU'
    metric_name: str = 'mIoU'
    scope: str = 'mmseg'
    start: int = 3000
    lr_after_start: float = 2e-4


_VOC_TRAIN = ('Pascal VOC 2012, a subset: 330 images of train.txt and 600 of '
              'aug.txt')
_PRODUCT_QUANTISED = 'ImageNet, a product-quantised ResNet (72.2 % top-1)'
TASKS = dict(
    camvid=Task(
        'DeepLabV3Plus-ResNet18 on CamVid',
        weights='ImageNet, stages 1 to 3; stage 4 is random',
        train='CamVid, the 367 images of ImageSets/Segmentation/train.txt',
        test='the 101 images of val.txt, 480 x 360, in windows of 192'),
    voc=Task(
        'DeepLabV3Plus-MobileNetV2 on a subset of Pascal VOC 2012',
        weights='ImageNet',
        train=_VOC_TRAIN,
        test='173 images of val.txt, short side 193'),
    voc_r50=Task(
        'DeepLabV3Plus-ResNet50 on a subset of Pascal VOC 2012',
        weights=_PRODUCT_QUANTISED,
        train=_VOC_TRAIN,
        test='173 images of val.txt, short side 193'),
    voc_r50_512=Task(
        'DeepLabV3Plus-ResNet50 on a subset of Pascal VOC 2012, crops of 512',
        weights=_PRODUCT_QUANTISED,
        train=_VOC_TRAIN,
        test='173 images of val.txt, short side 512',
        lr_after_start=1e-4))
