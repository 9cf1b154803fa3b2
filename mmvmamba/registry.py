"""mmvmamba's registries: children of mmengine's, in the scope 'mmvmamba'.

mmengine imports `<scope>.registry` when a config names a type of that scope, so that
`type='mmvmamba.VMamba'` builds from any project without `custom_imports`.
"""

import mmengine.registry as mmengine_registry
from mmengine.registry import Registry

SCOPE = "mmvmamba"


def _child(parent: Registry, location: str = "mmvmamba.models") -> Registry:
    # mmengine wants a module to import even where nothing is registered.
    return Registry(parent.name, parent=parent, scope=SCOPE, locations=[location])


MODELS = _child(mmengine_registry.MODELS)
OPTIM_WRAPPER_CONSTRUCTORS = _child(
    mmengine_registry.OPTIM_WRAPPER_CONSTRUCTORS, "mmvmamba.engine.optim"
)

# A config inherited as `mmvmamba::...` looks its hooks, schedulers and so on up in this scope
# first. Without a child to look into, mmengine warns of an incorrect scope before it finds its own.
EMPTY = tuple(
    _child(registry)
    for registry in vars(mmengine_registry).values()
    if isinstance(registry, Registry)
    and registry.parent is None
    and registry not in (mmengine_registry.MODELS, mmengine_registry.OPTIM_WRAPPER_CONSTRUCTORS)
)
