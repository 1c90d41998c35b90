# The network of voc_subset.py at crops of 193 and with AdamW, for the many
# runs of benchmarks/accuracy.py.
_base_ = './voc_subset.py'
crop_size = (193, 193)
model = dict(data_preprocessor=dict(size=crop_size))

train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (965, 193)
train_pipeline[3].crop_size = crop_size
dataset_train = _base_.dataset_train
dataset_aug = _base_.dataset_aug
dataset_train.pipeline = train_pipeline
dataset_aug.pipeline = train_pipeline
train_dataloader = dict(dataset=dict(datasets=[dataset_train, dataset_aug]))
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (965, 193)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=5e-4, weight_decay=0.01))
param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=1e-6,
        power=0.9,
        begin=0,
        end=800,
        by_epoch=False)
]
