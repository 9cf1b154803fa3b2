"""Layer-wise decay of the learning rate, for detectors, segmentors and classifiers alike."""

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mmvmamba.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with learning rates that fall towards the image.

    A parameter's rate is multiplied by `layer_decay_rate` to the power of its distance from the
    model's head in blocks of the backbone, which the backbone's `get_layer_depth` tells. All else
    in `paramwise_cfg` (`custom_keys`, `norm_decay_mult`, ...) works as mmengine documents it.
    (mmpretrain's constructor asks the model for depths, which detectors and segmentors do not
    know; mmdet's and mmseg's know the names of ConvNeXt's parameters and of few others.)

    Args:
        optim_wrapper_cfg: As mmengine's.
        paramwise_cfg: As mmengine's, and `layer_decay_rate`, in (0, 1].

    Raises:
        ValueError: If `layer_decay_rate` is missing or outside (0, 1], or the optimizer has no
            learning rate.
        TypeError: If the model's backbone does not tell depths.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get("layer_decay_rate")
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(
                f"paramwise_cfg needs layer_decay_rate, a number in (0, 1]; it has {rate!r}."
            )
        if self.base_lr is None:
            raise ValueError("layer-wise decay needs the optimizer's lr in the config.")

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = "",
        is_dcn_module: int | float | None = None,
    ) -> None:
        """Adds a module's parameters to the groups; the whole model's rates are then decayed."""
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:
            return
        backbone = getattr(module, "backbone", None)
        if not hasattr(backbone, "get_layer_depth"):
            raise TypeError(
                f"layer-wise decay needs a backbone with get_layer_depth, such as mmvmamba.VMamba; "
                f"{type(module).__name__} has {type(backbone).__name__}."
            )
        names = {parameter: name for name, parameter in module.named_parameters()}
        for group in params:
            (parameter,) = group["params"]
            depth, depths = backbone.get_layer_depth(names[parameter], "backbone.")
            scale = self.paramwise_cfg["layer_decay_rate"] ** (depths - 1 - depth)
            group["lr"] = group.get("lr", self.base_lr) * scale
