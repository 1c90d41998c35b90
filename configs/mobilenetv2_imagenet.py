# Dense model: mmpretrain's mobilenet-v2_8xb32_in1k.
_base_ = './resnet50_imagenet.py'
model = dict(
    backbone=dict(_delete_=True, type='MobileNetV2', widen_factor=1.0),
    head=dict(in_channels=1280))
optim_wrapper = dict(optimizer=dict(lr=0.045, weight_decay=0.00004))
param_scheduler = dict(
    _delete_=True, type='StepLR', by_epoch=True, step_size=1, gamma=0.98)
train_cfg = dict(max_epochs=300)
