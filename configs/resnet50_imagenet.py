# Dense model: mmpretrain's resnet50_8xb32_in1k.
_base_ = [
    './_base_/datasets/imagenet.py',
    './_base_/schedules/imagenet_100e.py',
    './_base_/classification_runtime.py',
]
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(3, ),
        style='pytorch'),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2048,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1, 5)))
