"TRL's `trl.models`: the pipelines, imported when they are first used."
from importlib import import_module as _import_module

__all__ = [
    "DDPOPipelineOutput", "DDPOSchedulerOutput", "DDPOStableDiffusionPipeline",
    "DefaultDDPOStableDiffusionPipeline"
]

def __getattr__(name):
    if name in __all__: return getattr(_import_module(f"{__name__}.modeling_sd_base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

def __dir__(): return sorted({*globals(), *__all__})
