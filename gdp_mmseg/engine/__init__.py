"""Everything that knows mmengine: model, hook, checkpoints, configs."""
from .safe_types import allow_mmengine_types

# The stock tools load a checkpoint by mmengine. A config that names a model or
# a hook of this package imports this folder before that.
allow_mmengine_types()
