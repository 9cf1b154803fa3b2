"""VMamba in timm's registry: `timm.create_model("vmamba_tiny", features_only=True)`."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

REGISTRY = "timm.models"


def offer_models() -> None:
    """Registers the backbones with timm, as soon as something imports it.

    It takes seconds to import and may be missing, and nothing here needs it.
    """
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(MetaPathFinder):
    """Lets others find timm's models, and registers ours once these are imported."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        finds = (getattr(finder, "find_spec", None) for finder in others)
        specs = (find(name, path, target) for find in finds if find is not None)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    from timm.models import is_model, register_model

    from mmvmamba.models import VMamba

    for arch in (*VMamba.arch_aliases, *VMamba.arch_settings):
        function = _entrypoint(arch)
        if not is_model(function.__name__):
            # Which adds the name to this module's `__all__`.
            globals()[function.__name__] = register_model(function)


def _entrypoint(arch: str) -> Callable:
    """What `timm.create_model` calls for an arch of `VMamba`."""
    name = f"vmamba_{arch.replace('-', '_')}"

    def create(
        pretrained: bool = False,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        in_chans: int = 3,
        pretrained_cfg: object = None,
        pretrained_cfg_overlay: object = None,
        cache_dir: object = None,
        **arguments,
    ):
        """Makes the backbone, a `VMamba` whose `feature_info` is timm's.

        Args:
            pretrained: Only False.
            features_only: Only True.
            out_indices: Stages whose maps are returned, or how many of the last ones; None for all.
            in_chans: Channels of the images.
            pretrained_cfg, pretrained_cfg_overlay, cache_dir: Only None.
            **arguments: As `VMamba`'s.

        Raises:
            ValueError: If anything else than maps of random weights is asked for.
        """
        from timm.models import FeatureInfo

        from mmvmamba.models import VMamba

        if pretrained or pretrained_cfg or pretrained_cfg_overlay or cache_dir:
            raise ValueError(
                f"{name} has no weights at timm: make it without `pretrained` and call "
                "`load_pretrained(FILE)` of the model with an official file (docs/checkpoints.md)."
            )
        if not features_only:
            raise ValueError(
                f"{name} is a backbone without a classifier: give features_only=True. The "
                "classifiers are configs of mmpretrain, in configs/vmamba."
            )
        if isinstance(out_indices, int):
            out_indices = range(-out_indices, 0)
        model = VMamba(arch, in_channels=in_chans, out_indices=out_indices, **arguments)
        model.feature_info = FeatureInfo(model.feature_info, model.out_indices)
        return model

    create.__name__ = create.__qualname__ = name
    return create
