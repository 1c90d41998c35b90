# ResNet-56 with 16, 32 and 64 channels and shortcuts without parameters, as in
# section 4.2 of the paper of ResNet; mmpretrain has no such network.
_base_ = [
    './_base_/datasets/cifar10.py',
    './_base_/schedules/cifar10_200e.py',
    './_base_/classification_runtime.py',
]
model = dict(
    type='ImageClassifier',
    backbone=dict(type='gdp_mmseg.CIFARResNet', depth=56),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
