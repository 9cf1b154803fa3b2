"""Systems that VMamba is compared with and OpenMMLab has not."""

from mmvmamba.models.compared.vision_mamba import VisionMamba

__all__ = ["VisionMamba"]
