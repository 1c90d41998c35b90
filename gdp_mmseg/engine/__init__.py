"""Everything that knows mmengine: model, hook, checkpoints, configs."""
