__version__ = "0.1.0"

import logging as _logging

# transformers says twice that it has no torchvision when diffusers imports image processors that nothing
# here uses.
_logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

# `import ddpo_nb` loads nothing else: names and modules are imported when they are first used (PEP 562).
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.modeling_sd_base import (DDPOPipelineOutput, DDPOSchedulerOutput,
                                          DDPOStableDiffusionPipeline, DefaultDDPOStableDiffusionPipeline)
    from .trainer import (AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer, RWRConfig,
                          RWRTrainer)

_home = dict.fromkeys(
    ("AlignPropConfig", "AlignPropTrainer", "DDPOConfig", "DDPOTrainer", "RWRConfig", "RWRTrainer"), "trainer"
)
_home |= dict.fromkeys(
    (
        "DDPOPipelineOutput", "DDPOSchedulerOutput", "DDPOStableDiffusionPipeline",
        "DefaultDDPOStableDiffusionPipeline"
    ),
    "models.modeling_sd_base",
)
__all__ = [*_home]

def __getattr__(name):
    if name in _home:
        globals()[name] = res = getattr(_import_module(f"{__name__}.{_home[name]}"), name)
        return res
    if name.startswith("_"): raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try: return _import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as e:
        if e.name != f"{__name__}.{name}": raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

def __dir__():
    from pkgutil import iter_modules
    return sorted(
        {*globals(), *_home, *(o.name for o in iter_modules(__path__) if not o.name.startswith("_"))}
    )
