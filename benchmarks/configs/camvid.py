# DeepLabV3Plus-ResNet18 on CamVid, for two CPU cores: output stride 16, 256
# channels, crops of 192. benchmarks/accuracy.py sets data_root, the weights of
# the backbone (ImageNet, stages 1 to 3) and the length of the training.
_base_ = [
    '../../configs/_base_/models/deeplabv3plus_r50-d8.py',
    '../../configs/_base_/datasets/pascal_voc12.py',
    '../../configs/_base_/schedules/schedule_20k.py',
    '../../configs/_base_/default_runtime.py',
]
crop_size = (192, 192)

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    backbone=dict(
        type='ResNet',
        depth=18,
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=512,
        channels=256,
        c1_in_channels=64,
        dilations=(1, 6, 12, 18),
        num_classes=11,
        norm_cfg=norm_cfg),
    auxiliary_head=dict(
        in_channels=256, channels=64, num_classes=11, norm_cfg=norm_cfg),
    # As large as in training: the branches of dilation 12 and 18 hardly look
    # beyond the centre of such maps, and would of larger ones.
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(144, 144)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomResize',
        scale=(480, 360),
        ratio_range=(0.5, 1.5),
        keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
# PascalVOCDataset takes no classes but its own.
dataset = dict(
    type='BaseSegDataset',
    img_suffix='.jpg',
    seg_map_suffix='.png',
    metainfo=dict(
        classes=('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign',
                 'fence', 'car', 'pedestrian', 'bicyclist'),
        palette=[[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128],
                 [60, 40, 222], [128, 128, 0], [192, 128, 128], [64, 64, 128],
                 [64, 0, 128], [64, 64, 0], [0, 128, 192]]))
train_dataloader = dict(
    batch_size=8,
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
    optimizer=dict(_delete_=True, type='AdamW', lr=5e-4, weight_decay=0.01))
param_scheduler = [
    dict(type='PolyLR', eta_min=1e-6, power=0.9, begin=0, by_epoch=False)
]
default_hooks = dict(logger=dict(interval=20))
