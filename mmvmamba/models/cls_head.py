"""The classification head of the official models, for mmpretrain."""

import torch
from mmpretrain.models.heads import ClsHead
from torch import Tensor, nn

from mmvmamba.models.layers import NormName, build_norm, normalize, trunc_normal_


class VMambaClsHead(ClsHead):
    """Normalises the last map, averages it over positions and classifies.

    Its parameters `norm` and `head` are the official `classifier.norm` and `classifier.head`. The
    norm stands before the average, and takes the place of the backbone's `outnorm3`.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the last map.
        norm: 'ln' or 'bn', as the backbone's.
        **kwargs: `ClsHead`'s: `loss`, `topk`, `cal_acc`, `init_cfg`.
    """

    def __init__(self, num_classes: int, in_channels: int, norm: NormName = "ln", **kwargs):
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes!r} must be at least 1.")
        self.num_classes = num_classes
        self.norm = build_norm(norm, in_channels)
        self.norm_kind = norm
        self.head = nn.Linear(in_channels, num_classes)
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """The normalised and averaged features, (B, C), of the last of the maps (B, C, H, W)."""
        x = normalize(self.norm_kind, self.norm, feats[-1].permute(0, 2, 3, 1))
        return torch.mean(x, dim=(1, 2))

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        """The logits, (B, num_classes)."""
        return self.head(self.pre_logits(feats))
