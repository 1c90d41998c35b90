# ResNet-20 on JPEG images of CIFAR-10, trained as ResNet-56.
_base_ = './cifar10_resnet56.py'
model = dict(backbone=dict(depth=20))
