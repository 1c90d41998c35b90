# Copy this file beside your config and name your config here.
_base_ = './deeplabv3plus_voc.py'

# Everything else of `model` stays as your config has it. `target` is the share
# of the multiply-adds to keep.
model = dict(
    type='gdp_mmseg.GDPModel',
    # A segmentor other than EncoderDecoder (CascadeEncoderDecoder ...) is
    # named here, since `type` is taken:
    # base=_base_.model.type,
    gdp=dict(target=0.4))

# Not `custom_hooks`: that list would replace yours.
default_hooks = dict(gdp=dict(type='gdp_mmseg.GDPHook'))
