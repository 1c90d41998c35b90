# DeepLabV3Plus-ResNet50, trained from scratch on the drawn shapes of
# `make demo` in a few minutes on a CPU. The output stride of 16 and the 256
# channels of the head are those of the DeepLabV3+ paper.
_base_ = [
    './_base_/models/deeplabv3plus_r50-d8.py',
    './_base_/datasets/pascal_voc12.py',
    './_base_/schedules/schedule_20k.py',
    './_base_/default_runtime.py',
]
crop_size = (96, 96)
max_iters = 500

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    backbone=dict(
        strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), norm_cfg=norm_cfg),
    decode_head=dict(
        channels=256,
        dilations=(1, 6, 12, 18),
        num_classes=4,
        norm_cfg=norm_cfg),
    auxiliary_head=dict(num_classes=4, norm_cfg=norm_cfg))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='Pad', size=crop_size),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
# PascalVOCDataset accepts only its own classes, so the base class is used.
dataset = dict(
    type='BaseSegDataset',
    data_root='work_dirs/demo/data',
    img_suffix='.jpg',
    seg_map_suffix='.png',
    metainfo=dict(
        classes=('background', 'disc', 'ring', 'cross'),
        palette=[[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]))
train_dataloader = dict(
    batch_size=6,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

optim_wrapper = dict(
    type='gdp_mmseg.BFloat16OptimWrapper',
    # fused: one pass over the weights; on a CPU half the time of a step.
    optimizer=dict(
        _delete_=True, type='AdamW', lr=1e-3, weight_decay=0.01, fused=True))
param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=1e-5,
        power=0.9,
        begin=0,
        end=max_iters,
        by_epoch=False),
]
randomness = dict(seed=0)
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=max_iters))
