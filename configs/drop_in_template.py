# Copy this file to the folder of your config and set the name of your config.
_base_ = './deeplabv3plus_voc.py'

# All other keys of `model` are inherited from your config. `target` is the
# share of the multiply-adds (FLOPs) to keep.
model = dict(
    type='gdp_mmseg.GDPModel',
    # `type` is used by GDPModel, so `base` names the class of a model that is
    # not an EncoderDecoder:
    # base=_base_.model.type,
    gdp=dict(target=0.4))

# `default_hooks` is merged with yours. A list `custom_hooks` would replace it.
default_hooks = dict(gdp=dict(type='gdp_mmseg.GDPHook'))
