"""Systems that VMamba is compared with and OpenMMLab has not."""

from mmvmamba.models.compared.nat import NAT
from mmvmamba.models.compared.s4nd import S4ND, S4NDViT
from mmvmamba.models.compared.vision_mamba import SimpleFeaturePyramid, VisionMamba

__all__ = ["NAT", "S4ND", "S4NDViT", "SimpleFeaturePyramid", "VisionMamba"]
