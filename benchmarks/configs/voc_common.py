# A subset of Pascal VOC 2012 with crops of 193 for two CPU cores, and a
# DeepLabV3Plus head of 256 channels at output stride 16. The configs of the
# networks add a backbone; benchmarks/accuracy.py sets data_root, the weights
# of the backbone (ImageNet) and the length of the training.
_base_ = '../../configs/deeplabv3plus_voc.py'
crop_size = (193, 193)

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    backbone=dict(norm_cfg=norm_cfg),
    decode_head=dict(
        channels=256, dilations=(1, 6, 12, 18), norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomResize',
        scale=(965, 193),
        ratio_range=(0.75, 2.0),
        keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
dataset_train = _base_.dataset_train
dataset_aug = _base_.dataset_aug
dataset_train.pipeline = train_pipeline
dataset_aug.pipeline = train_pipeline
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(965, 193), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(datasets=[dataset_train, dataset_aug]))
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    type='gdp_mmseg.BFloat16OptimWrapper',
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-3, weight_decay=0.01),
    # The backbone is pretrained, the head is not.
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.15))))
param_scheduler = [
    dict(type='PolyLR', eta_min=1e-6, power=0.9, begin=0, by_epoch=False)
]
default_hooks = dict(logger=dict(interval=20))
