"""Networks and data sets that benchmarks/accuracy.py compares methods on."""
from __future__ import annotations

from dataclasses import dataclass, replace

# How the settings of segmentation were chosen.
_CHOSEN = ('The learning rate of all rows was chosen on these images. The '
           'phases of GDP, whose first is also the time at which the '
           'alternatives prune, are the default; no other setting of the '
           'alternatives was chosen.')
# The same with a learning rate that is held.
HELD = ('The learning rate of all rows and its schedule were chosen on a '
        'quarter of the training images of CamVid. The phases of GDP are the '
        'default; no other setting of the alternatives was chosen.')


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
        notes (tuple[str, ...]): Further sentences on the comparison.
        metric (str): Key under which the evaluation logs the score.
        metric_name (str): Name of the score in tables and plots.
        scope (str): Default scope of the config.
        head (str): Module of the pretrained weights that is the linear layer
            of a classifier's head; empty if the head is not pretrained.
        whole (tuple[str, ...]): Names or patterns of convolutions whose
            outputs the alternatives to gates do not prune.
        workers (int): Processes that load images beside a training on a GPU.
        start (int): Length of the dense training that all runs start from,
            in iterations.
        lr_after_start (float): Learning rate of all parameters after it.
        hold (float): Share of the training after the start that keeps this
            learning rate, which then falls linearly; 0 for the decay of the
            config.
    """

    title: str
    weights: str
    train: str
    test: str
    notes: tuple[str, ...] = (_CHOSEN, )
    metric: str = 'mIoU'
    metric_name: str = 'mIoU'
    scope: str = 'mmseg'
    head: str = ''
    whole: tuple[str, ...] = ()
    workers: int = 3
    start: int = 3000
    lr_after_start: float = 2e-4
    hold: float = 0.


_VOC_TRAIN = ('Pascal VOC 2012, a subset: 330 images of train.txt and 600 of '
              'aug.txt')
_PRODUCT_QUANTISED = 'ImageNet, a product-quantised ResNet (72.2 % top-1)'
_CIFAR10 = Task(
    'ResNet-20 on JPEG images of CIFAR-10',
    weights='CIFAR-10, the original images',
    train='CIFAR-10 as lossy JPEG images, 50,000, padded by 4 pixels, cropped '
    'and flipped',
    test='the 10,000 test images, lossy JPEG images too: accuracies are lower '
    'than on the original images',
    notes=('Phases are those of the segmentation networks; no setting was '
           'chosen on the test images.',
           'Torch-Pruning cannot remove channels of a sum with padded ones. '
           'The alternatives remove channels within the blocks only.'),
    metric='accuracy/top1',
    metric_name='accuracy',
    scope='mmpretrain',
    head='linear',
    whole=('backbone.conv1', 'backbone.layer*.conv2'),
    workers=0,
    start=7800,
    lr_after_start=0.02)
TASKS = dict(
    camvid=Task(
        'DeepLabV3Plus-ResNet18 on CamVid',
        weights='ImageNet, a product-quantised ResNet (66.7 % top-1)',
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
        test='173 images of val.txt, short side 193',
        notes=(HELD, ),
        lr_after_start=5e-4,
        hold=0.6),
    voc_r50_512=Task(
        'DeepLabV3Plus-ResNet50 on a subset of Pascal VOC 2012, crops of 512',
        weights=_PRODUCT_QUANTISED,
        train=_VOC_TRAIN,
        test='173 images of val.txt, short side 512',
        notes=(HELD, ),
        lr_after_start=5e-4,
        hold=0.6),
    cifar10_resnet20=_CIFAR10,
    cifar10_resnet56=replace(
        _CIFAR10, title='ResNet-56 on JPEG images of CIFAR-10'))
