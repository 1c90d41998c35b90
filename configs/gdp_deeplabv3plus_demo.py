_base_ = './deeplabv3plus_demo.py'
model = dict(type='gdp_mmseg.GDPModel', gdp=dict(target=0.4))
default_hooks = dict(gdp=dict(type='gdp_mmseg.GDPHook'))
