# The paper's setting on a subset of Pascal VOC 2012, for a GPU: crops of 512,
# output stride 8 and a head of 512 channels, as in mmsegmentation's config.
_base_ = '../../configs/deeplabv3plus_voc.py'
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    pretrained=None,
    backbone=dict(type='ResNet', norm_cfg=norm_cfg),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg))
optim_wrapper = dict(
    type='gdp_mmseg.BFloat16OptimWrapper',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.01),
    # The backbone is pretrained, the head is not.
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.15))))
param_scheduler = [
    dict(type='PolyLR', eta_min=1e-6, power=0.9, begin=0, by_epoch=False)
]
train_dataloader = dict(batch_size=8)
default_hooks = dict(logger=dict(interval=20))
