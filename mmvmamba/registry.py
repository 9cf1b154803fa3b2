"""mmvmamba's registries: children of mmengine's, in the scope 'mmvmamba'.

mmengine imports `<scope>.registry` when a config names a type of that scope, so that
`type='mmvmamba.VMamba'` builds from any project without `custom_imports`.
"""

import mmengine.registry as mmengine_registry
from mmengine.registry import Registry

SCOPE = "mmvmamba"


def _child(name: str, *modules: str) -> Registry:
    parent = getattr(mmengine_registry, name)
    # mmengine wants a module to import even where nothing is registered.
    locations = list(modules) or ["mmvmamba.models"]
    return Registry(parent.name, parent=parent, scope=SCOPE, locations=locations)


MODELS = _child("MODELS")
RUNNERS = _child("RUNNERS", "mmvmamba.engine.runner")
STRATEGIES = _child("STRATEGIES", "mmvmamba.engine.fsdp")
LOOPS = _child("LOOPS", "mmvmamba.engine.loops")
HOOKS = _child("HOOKS", "mmvmamba.engine.checkpoint_hook", "mmvmamba.engine.invalid_loss_hook")
OPTIM_WRAPPERS = _child("OPTIM_WRAPPERS", "mmvmamba.engine.optim")
OPTIM_WRAPPER_CONSTRUCTORS = _child("OPTIM_WRAPPER_CONSTRUCTORS", "mmvmamba.engine.optim")

# A config inherited as `mmvmamba::...` looks its schedulers, data sets and so on up in this scope
# first. Without a child to look into, mmengine warns of an incorrect scope before it finds its own.
EMPTY = tuple(
    _child(name)
    for name, registry in vars(mmengine_registry).items()
    if isinstance(registry, Registry) and registry.parent is None and name not in globals()
)
