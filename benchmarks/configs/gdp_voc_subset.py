# The same with gates: 40 % of the multiply-adds are to be left.
_base_ = './voc_subset.py'
model = dict(
    type='gdp_mmseg.GDPModel', gdp=dict(target=0.4, phases=(0.1, 0.5, 0.4)))
default_hooks = dict(gdp=dict(type='gdp_mmseg.GDPHook'))
