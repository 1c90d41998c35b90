_base_ = './vgg16_cifar10.py'
model = dict(
    type='gdp_mmseg.GDPModel', gdp=dict(target=0.5, input_shape=(32, 32)))
default_hooks = dict(gdp=dict(type='gdp_mmseg.GDPHook'))
