"""Child registries: ``type='gdp_mmseg.X'`` works in any mm config.

No ``custom_imports`` is needed: mmengine imports the package of a scope that
it meets, and then the locations named here.
"""
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='gdp_mmseg',
    locations=['gdp_mmseg.engine.model', 'gdp_mmseg.engine.cifar_resnet'])
HOOKS = Registry(
    'hook',
    parent=MMENGINE_HOOKS,
    scope='gdp_mmseg',
    locations=['gdp_mmseg.engine.hook', 'gdp_mmseg.engine.resume'])
OPTIM_WRAPPERS = Registry(
    'optim_wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='gdp_mmseg',
    locations=['gdp_mmseg.engine.amp'])
