# DeepLabV3Plus-ResNet50 on a subset of Pascal VOC 2012: the paper's network at
# output stride 16, with a head of 256 channels.
_base_ = './voc_common.py'
model = dict(
    backbone=dict(type='ResNet', strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)))
