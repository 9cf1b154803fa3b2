"""S4ND-ConvNeXt-T (arXiv 2210.06583): mmpretrain's ConvNeXt with S4ND for its convolutions."""

from typing import Literal

from mmpretrain.models.backbones import ConvNeXt
from torch import nn

from mmvmamba.models.arguments import check_choice
from mmvmamba.models.compared.s4nd import S4ND

STEM_CHANNELS = 32
STEM_KERNEL = 16
STRIDE = 4


class S4NDConvNeXt(ConvNeXt):
    """ConvNeXt whose depth-wise convolutions and stem are S4ND with kernels of two axes.

    Args:
        arch: As mmpretrain's.
        img_size: Side of the images in pixels that the greatest length of the kernels is for: in
            each stage that of its map. Images of other sizes are taken; larger ones see as far.
        downsample: Between stages, 'conv' for ConvNeXt's own convolutions, whose parameters are the
            published 30.0 M; or 's4nd' for S4ND and an average, as in the released config.
        d_state: Number of states N of a channel, along each axis.
        n_ssm: Sets of A and B that channels share.
        drop_path_rate: Stochastic depth's largest rate.
        **options: As mmpretrain's.

    Raises:
        ArgumentError: If `downsample` is unknown.
    """

    def __init__(
        self,
        arch: str | dict = "tiny",
        *,
        img_size: int = 224,
        downsample: Literal["conv", "s4nd"] = "conv",
        d_state: int = 64,
        n_ssm: int = 1,
        drop_path_rate: float = 0.1,
        **options,
    ):
        super().__init__(arch, drop_path_rate=drop_path_rate, **options)
        check_choice("downsample", downsample, ("conv", "s4nd"))
        ssm = {"d_state": d_state, "n_ssm": n_ssm}
        convolution, norm = self.downsample_layers[0]
        # Its first convolution is not the first layer.
        self.image_channels = convolution.in_channels
        self.downsample_layers[0] = nn.Sequential(
            S4ND(convolution.in_channels, out_channels=STEM_CHANNELS, l_max=STEM_KERNEL, **ssm),
            *_gated_average(STEM_CHANNELS, convolution.out_channels, STRIDE),
            norm,
        )
        side = img_size // STRIDE
        for i, stage in enumerate(self.stages):
            if i:
                if downsample == "s4nd":
                    norm, convolution = self.downsample_layers[i]
                    self.downsample_layers[i] = nn.Sequential(
                        norm,
                        S4ND(convolution.in_channels, l_max=side, **ssm),
                        *_gated_average(convolution.in_channels, convolution.out_channels, 2),
                    )
                side //= 2
            for block in stage:
                block.depthwise_conv = S4ND(block.depthwise_conv.in_channels, l_max=side, **ssm)
        self._freeze_stages()

    def train(self, mode: bool = True) -> "S4NDConvNeXt":
        """Sets the mode; upstream's returns nothing."""
        super().train(mode)
        return self


def _gated_average(in_channels: int, out_channels: int, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.AvgPool2d(stride),
        nn.Conv2d(in_channels, 2 * out_channels, kernel_size=1),
        nn.GLU(dim=1),
    )
