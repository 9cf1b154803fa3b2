"""Effective receptive fields (paper, figures 6, 10, 13 and 14).

The field is the gradient of the last map's centre with respect to the image: of the sum over
channels of the positive activations there, the positive part of the gradient summed over colours
and averaged over images, as the literature on large kernels defines it. The sum of all activations
would not do: after a layer norm it is a constant, whose gradient is zero.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mmvmamba.analysis.measured import tensors

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)

# Exponent of the values in pictures, which would otherwise show their peak alone.
GAMMA = 0.25


@dataclass(frozen=True)
class Area:
    """The smallest centred square that holds a share of a field.

    Attributes:
        share: The share of the field's sum that was asked for.
        side: The square's side in pixels, odd.
        ratio: Its area over the image's, of which it is a part.
    """

    share: float
    side: int
    ratio: float


def effective_receptive_field(
    model: nn.Module,
    images: Iterable[Tensor],
    progress: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Computes a backbone's effective receptive field.

    Args:
        model: A module from images to one map or several, (B, C, H, W) or as timm's models say
            in `output_fmt`, of which the last is taken; in evaluation mode.
        images: Images of one size, (C, H, W) each, on the model's device.
        progress: Called after each image.

    Returns:
        (H, W), not negative.

    Raises:
        ValueError: If there is no image, the last output is no map, or the gradient is zero.
    """
    total, count = 0.0, 0
    for image in images:
        total = total + _gradient(model, image[None])
        count += 1
        progress()
    if not count:
        raise ValueError("an effective receptive field needs at least one image")
    field = (total / count).cpu().numpy()
    if not field.sum() > 0:
        raise ValueError(
            f"the gradient at the centre of {type(model).__name__}'s last map is zero or not finite"
        )
    return field


def _gradient(model: nn.Module, image: Tensor) -> Tensor:
    image = image.detach().requires_grad_()
    with torch.enable_grad():
        *_, output = tensors(model(image))
        if output.ndim != 4:
            raise ValueError(
                f"the last output of {type(model).__name__} has shape {tuple(output.shape)}, and "
                "is no map (B, C, H, W)"
            )
        if str(getattr(model, "output_fmt", "")).endswith("NHWC"):
            output = output.permute(0, 3, 1, 2)
        centre = output[:, :, output.shape[2] // 2, output.shape[3] // 2]
        (gradient,) = torch.autograd.grad(centre.relu().sum(), image)
    return gradient[0].double().relu().sum(0)


def smallest_square(field: np.ndarray, share: float) -> Area:
    """Finds the smallest centred square that holds more than a share of a field's sum.

    Args:
        field: (H, W), not negative. In images that are not square, the square is cut to the image.
        share: Between 0 and 1.

    Raises:
        ValueError: If the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} must be between 0 and 1")
    height, width = field.shape
    row, column = height // 2, width // 2
    total = field.sum()
    for reach in range(max(height, width) // 2 + 1):
        part = field[
            max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1
        ]
        if part.sum() > share * total:
            break
    return Area(share, min(2 * reach + 1, max(height, width)), part.size / field.size)


def draw_fields(fields: Mapping[str, Sequence[tuple[str, np.ndarray]]], title: str):
    """Draws effective receptive fields side by side.

    Args:
        fields: For each row, by its name ('before training'), names of models and their fields.
        title: A line above all.

    Returns:
        matplotlib's figure. Each field is shown over its largest value, to the power of `GAMMA`.
    """
    # The object-oriented interface leaves pyplot's global state and back end alone.
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(name for row in fields.values() for name, _ in row))
    figure = Figure(
        figsize=(2.5 * len(columns) + 1.4, 2.6 * len(fields) + 0.9), layout="constrained"
    )
    figure.suptitle(title)
    grid = figure.subplots(len(fields), len(columns), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for (name, row), cells in zip(fields.items(), grid, strict=True):
        for model, field in row:
            axes = cells[columns.index(model)]
            axes.set_axis_on()
            axes.set_xticks([])
            axes.set_yticks([])
            picture = axes.imshow(
                field / field.max(), norm=PowerNorm(GAMMA, vmin=0, vmax=1), cmap="YlGn"
            )
            axes.set_title(f"{model}\n{name}", fontsize="small")
    bar = figure.colorbar(picture, ax=grid, ticks=[0, 0.001, 0.01, 0.1, 0.4, 1], shrink=0.9)
    bar.ax.set_yticklabels(["0", "0.001", "0.01", "0.1", "0.4", "1"])
    bar.set_label("of the largest value")
    return figure
