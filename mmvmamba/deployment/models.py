"""Whole models as they are deployed: from pixels to results, in operations that can be exported.

What OpenMMLab does around its networks (normalisation, padding, resizing of logits, anchors, NMS)
looks at numbers, lists and files on its way; here it is tensors alone. Networks are called as they
are.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mmvmamba.deployment.deployable import Deployable, require
from mmvmamba.engine.errors import UsageError


class Classifier(Deployable):
    """A classifier of mmpretrain: to the classes' probabilities, (B, classes)."""

    outputs = ("probabilities",)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features = self.model.extract_feat(self.normalised(images))
        return F.softmax(self.model.head(features), dim=1)


class Segmentor(Deployable):
    """A segmentor of mmseg: to the label of each pixel, (B, H, W), int64."""

    outputs = ("labels",)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        size, x = images.shape[2:], self.normalised(images)
        head = self.model.decode_head
        logits = head(self.model.extract_feat(x))
        logits = F.interpolate(
            logits, x.shape[2:], mode="bilinear", align_corners=head.align_corners
        )
        return logits[:, :, : size[0], : size[1]].argmax(1)


def deployable(scope: str, model: nn.Module) -> Deployable:
    """Makes a model's deployable form.

    Args:
        scope: Its package: mmpretrain, mmdet or mmseg.
        model: The model.

    Raises:
        UsageError: If it cannot be exported; the message names what is in the way.
    """
    if scope == "mmpretrain":
        return Classifier(_classifier(model))
    if scope == "mmseg":
        return Segmentor(_segmentor(model))
    if scope == "mmdet":
        from mmvmamba.deployment.detection import detector

        return detector(model)
    raise UsageError(
        f"models of {scope!r} cannot be exported; those of mmpretrain, mmdet, mmseg can."
    )


def _classifier(model: nn.Module) -> nn.Module:
    from mmpretrain.models.classifiers import ImageClassifier
    from mmpretrain.models.heads import ClsHead

    require(model, ImageClassifier, "forward", "ImageClassifier")
    require(model.head, ClsHead, "_get_predictions", "heads of one label an image")
    return model


def _segmentor(model: nn.Module) -> nn.Module:
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.models.segmentors import EncoderDecoder

    require(model, EncoderDecoder, "predict", "EncoderDecoder")
    require(model.decode_head, BaseDecodeHead, "predict", "heads of one logit a class and pixel")
    if model.test_cfg.get("mode", "whole") != "whole":
        raise UsageError(
            "model.test_cfg.mode='slide' cuts images into windows, which is not exported: cut them "
            "where the model runs, or add --cfg-options model.test_cfg.mode=whole."
        )
    if model.decode_head.out_channels == 1:
        raise UsageError("a decode_head with one output channel and a threshold is not exported.")
    return model
