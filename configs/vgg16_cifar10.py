# VGG-16 with batch norms and one linear layer, as usual on CIFAR-10.
_base_ = [
    './_base_/datasets/cifar10.py',
    './_base_/schedules/cifar10_200e.py',
    './_base_/classification_runtime.py',
]
model = dict(
    type='ImageClassifier',
    backbone=dict(type='VGG', depth=16, norm_cfg=dict(type='BN')),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=512,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0)))
optim_wrapper = dict(optimizer=dict(weight_decay=0.0005))
