"""The picture that explains SS2D: what one position gets along each of the four paths."""

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from PIL import Image

from mmvmamba.analysis.scan_patterns import path_name, path_positions, paths_of
from mmvmamba_kernels import selective_scan_2d

SCAN = "cross2d"
# Below 1, so that small weights are seen.
GAMMA = 0.6


def path_weights(
    height: int, width: int, query: tuple[int, int], decay: float = 0.07
) -> np.ndarray:
    """Computes what every position gives to the output at one position, along each path.

    The weights are derivatives of `selective_scan_2d` in float64, of one channel without skip
    connection and with the same step size everywhere: exp(-decay * steps), for the number of steps
    that the path takes from the position to the query.

    Args:
        height: H of the map.
        width: W of the map.
        query: Row and column of the output's position.
        decay: By how much the state shrinks in one step, as -delta * A.

    Returns:
        (4, H, W): zero for positions that the path visits later than the query.
    """
    maps = []
    for k in range(4):
        x = torch.zeros(1, height, width, 1, dtype=torch.float64, requires_grad=True)
        # Side by side: the low rank of the step size, B and C. C lets path k alone speak.
        proj = torch.zeros(1, height, width, 4, 3, dtype=torch.float64)
        proj[..., 1], proj[..., k, 2] = 1, 1
        rates = torch.full((4, 1, 1), -decay / np.log(2), dtype=torch.float64)
        nothing = torch.zeros(4, 1, dtype=torch.float64)
        # A step size of softplus(0) = log(2).
        y = selective_scan_2d(x, proj, nothing[..., None], nothing, rates, nothing, pattern=SCAN)
        (weights,) = torch.autograd.grad(y[0, query[0], query[1], 0], x)
        maps.append(weights[0, ..., 0].numpy() / np.log(2))
    return np.stack(maps)


def draw_ss2d(image: Image.Image, height: int, width: int, query: tuple[int, int]):
    """Draws the way from a map over four paths to the map of their sums.

    Args:
        image: What is shown as the map.
        height: H of the map.
        width: W of the map.
        query: Row and column of the position that is followed, counted from 0.

    Returns:
        matplotlib's figure.

    Raises:
        ValueError: If the query is outside of the map.
    """
    if not (0 <= query[0] < height and 0 <= query[1] < width):
        raise ValueError(f"query={query} is outside of the map of {height} x {width} positions.")
    weights = path_weights(height, width, query)
    figure = Figure(figsize=(13, 5.0))
    grid = figure.add_gridspec(
        2, 5, width_ratios=(1.5, 1, 1, 1.35, 1.5), left=0.012, right=0.988, top=0.83, bottom=0.06,
        wspace=0.3, hspace=0.32,
    )  # fmt: skip
    start, end = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 4])
    panels = [figure.add_subplot(grid[k // 2, 1 + k % 2]) for k in range(4)]
    _draw_image(start, image, height, width)
    for k, (axes, path) in enumerate(zip(panels, paths_of(SCAN), strict=True)):
        axes.imshow(weights[k], cmap="Blues", norm=PowerNorm(GAMMA, 0, 1))
        rows, columns = np.divmod(path_positions(path, height, width)[0], width)
        steps = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.009, "alpha": 0.55}
        arrows = (columns[:-1], rows[:-1], np.diff(columns), np.diff(rows))
        axes.quiver(*arrows, color="black", **steps)
        axes.plot(columns[0], rows[0], "o", color="tab:red", markersize=5)
        axes.set_title(f"{k + 1}: {path_name(path)}", fontsize=10)
    end.imshow(weights.sum(0), cmap="Blues", norm=PowerNorm(GAMMA, 0, weights.sum(0).max()))
    for axes in (start, *panels, end):
        axes.plot(query[1], query[0], "*", color="gold", markeredgecolor="black", markersize=13)
        axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    _draw_equations(figure.add_subplot(grid[:, 3]))
    for x, title, explanation in (
        (0.106, "feature map", "$H \\times W$ positions, $D$ channels"),
        (0.393, "1. cross-scan", "unfold the map into four sequences"),
        (0.672, "2. selective scan", "walk along each sequence"),
        (0.896, "3. cross-merge", "add the four at each position"),
    ):
        figure.text(x, 0.945, title, ha="center", fontsize=13, fontweight="bold")
        figure.text(x, 0.895, explanation, ha="center", fontsize=11.5)
    for left, right in ((start, panels[0]), (start, panels[2])):
        figure.add_artist(_arrow(left, right))
    return figure


def _draw_image(axes, image: Image.Image, height: int, width: int) -> None:
    """The image, cut into one square for each position."""
    side = 32
    pixels = np.asarray(image.convert("RGB").resize((width * side, height * side))).copy()
    for axis, count in ((0, height), (1, width)):
        lines = (np.arange(1, count)[:, None] * side + np.arange(-1, 1)).ravel()
        pixels[(slice(None),) * axis + (lines,)] = 255
    axes.imshow(pixels, extent=(-0.5, width - 0.5, height - 0.5, -0.5))


def _draw_equations(axes) -> None:
    axes.axis("off")
    lines = (
        (0.90, r"$\Delta_l,\ B_l,\ C_l\ =\ \mathrm{linear}(x_l)$"),
        (0.68, r"$h_l\ =\ e^{\Delta_l A}\,h_{l-1}\ +\ \Delta_l B_l\,x_l$"),
        (0.46, r"$y_l\ =\ C_l \cdot h_l\ +\ D\,x_l$"),
    )
    for height, text in lines:
        axes.text(0.5, height, text, ha="center", va="center", fontsize=13)
    said = "Each position decides what the\nstate keeps and takes in.\nCost: linear in $H\\,W$."
    axes.text(0.5, 0.16, said, ha="center", va="center", fontsize=10.5, linespacing=1.5)


def _arrow(left, right) -> ConnectionPatch:
    return ConnectionPatch(
        xyA=(1.02, 0.5), xyB=(-0.06, 0.5), coordsA="axes fraction", coordsB="axes fraction",
        axesA=left, axesB=right, arrowstyle="-|>", color="0.35", mutation_scale=14,
    )  # fmt: skip
