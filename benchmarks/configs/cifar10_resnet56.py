# ResNet-56 on JPEG images of CIFAR-10. benchmarks/accuracy.py sets data_root,
# the pretrained weights and the length of the training.
_base_ = '../../configs/resnet56_cifar10.py'
custom_imports = dict(imports=['cifar10'], allow_failed_imports=False)
crop_size = (32, 32)

# Those of the training that the weights come from.
data_preprocessor = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)

loader = dict(
    num_workers=0,
    persistent_workers=False,
    collate_fn=dict(type='stack_images'))
train_dataloader = dict(
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        _delete_=True, type='PackedCIFAR10', split='train', augment=True),
    **loader)
val_dataloader = dict(
    batch_size=500,
    dataset=dict(_delete_=True, type='PackedCIFAR10', split='test'),
    **loader)
test_dataloader = val_dataloader

optim_wrapper = dict(
    type='gdp_mmseg.BFloat16OptimWrapper',
    optimizer=dict(lr=0.05, weight_decay=5e-4))
param_scheduler = [dict(type='CosineAnnealingLR', begin=0, by_epoch=False)]
train_cfg = dict(_delete_=True, by_epoch=False)
log_processor = dict(by_epoch=False)
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(by_epoch=False))
