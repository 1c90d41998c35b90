_base_ = './mobilenetv2_imagenet.py'
model = dict(
    type='gdp_mmseg.GDPModel', gdp=dict(target=0.5, input_shape=(224, 224)))
default_hooks = dict(gdp=dict(type='gdp_mmseg.GDPHook'))
