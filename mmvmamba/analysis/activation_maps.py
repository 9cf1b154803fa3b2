"""What a position of the map takes from the others in a selective scan (paper, equations 16 to 20).

With Q = C, K = B, V = dt x and w = exp(A cumsum(dt)), all along a path, the scan is attention:

    y_t = sum over i <= t of <Q_t w_t, K_i / w_i> V_i + D x_t

The quotient w_t / w_i is never formed, since w underflows within hundreds of positions: it is the
exponential of A times the sum of dt from i + 1 to t, which is at most one. Everything is computed
in float64.

Three kinds of weights between a query t and a position i:
- 'qk': <Q_t, K_i>, the same for all channels;
- 'weighted': <Q_t w_t, K_i / w_i>, where every channel has its own w;
- 'contribution': the same times dt_i, which is the derivative of y_t with respect to x_i for given
  dt, B and C.
Pictures have the mean over channels, and the sum over paths where paths are combined, since the
mixer sums them. Position t's own weight has w_t / w_t = 1: the diagonals of the first two kinds are
equal. The paper drops the skip connection D, and so is it here.

Vim's two scans go forward and backward along the patches, row by row. Its class token stands in the
middle of them: as a query, it shows what the prediction takes from each patch. What other queries
take from the token is in the matrices only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvmamba.analysis.scan_patterns import ListedPath, path_name, path_positions, paths_of
from mmvmamba.models import VisionMamba
from mmvmamba.models.compared.vision_mamba import BidirectionalMixer, insert_in_the_middle
from mmvmamba.models.ss2d import SS2D, Mamba2Mixer, convolve
from mmvmamba_kernels.patterns import Path

KINDS = ("qk", "weighted", "contribution")
TITLES = {
    "qk": r"$QK^\top$",
    "weighted": r"$(Q\odot w)(K/w)^\top$",
    "contribution": r"$(Q\odot w)(K/w)^\top\odot\Delta$",
}

Kind = Literal["qk", "weighted", "contribution"]

# Row and column in the map; None for the class token.
Query = tuple[int, int] | None


@dataclass(frozen=True)
class PathScan:
    """One path's scan of one image, in float64, as S sequences of L steps.

    Attributes:
        name: What the path is called.
        positions: (S, L), the map's position `row * width + column` that each step reads, or
            `height * width` for a class token.
        outputs: (S, L), the position to which each step's output is added. These are the same but
            for the reversed paths of 'cascade2d', whose outputs are not turned back.
        Q: (S, L, N), which is C.
        K: (S, L, N), which is B.
        dt: (S, L, D), positive.
        A: (D, N), or (D, 1), negative.
        x: (S, L, D); of the Mamba-2 mixer, (S, L, D * head width).
    """

    name: str
    positions: Tensor
    outputs: Tensor
    Q: Tensor
    K: Tensor
    dt: Tensor
    A: Tensor
    x: Tensor

    def find(self, position: int) -> tuple[int, int] | None:
        """The sequence and the step whose output is added to a position, if one is."""
        found = (self.outputs == position).nonzero()
        return tuple(found[0].tolist()) if len(found) else None

    def row(self, sequence: int, step: int, kind: Kind) -> Tensor:
        """The weights of the steps up to one, for each channel.

        Args:
            sequence: The sequence.
            step: The query, t.
            kind: One of `KINDS`.

        Returns:
            (t + 1, D), or (t + 1, 1) for 'qk'.
        """
        products = self.Q[sequence, step] * self.K[sequence, : step + 1]
        if kind == "qk":
            return products.sum(-1, keepdim=True)
        dt = self.dt[sequence, : step + 1]
        # dt of the steps after each, up to the query: sums of what is positive lose no digits.
        after = dt.flip(0).cumsum(0).roll(1, 0)
        after[0] = 0
        decay = (after.flip(0)[..., None] * self.A).exp()
        weights = (decay * products[:, None]).sum(-1)
        return weights * dt if kind == "contribution" else weights

    def matrix(self, kind: Kind) -> Tensor:
        """The attention matrix, in the order of the path.

        Returns:
            (S * L, S * L): a row for each query, the mean over channels; zero after the query and
            between sequences.
        """
        sequences, steps = self.positions.shape
        found = torch.zeros((sequences * steps,) * 2, dtype=torch.float64, device=self.dt.device)
        for s in range(sequences):
            for t in range(steps):
                begin = s * steps
                found[begin + t, begin : begin + t + 1] = self.row(s, t, kind).mean(-1)
        return found


@dataclass(frozen=True)
class Scan:
    """A mixer's scan of one image.

    Attributes:
        paths: Its K paths.
        height: H of the map.
        width: W of the map.
        class_token: Whether the sequences have one position more.
    """

    paths: tuple[PathScan, ...]
    height: int
    width: int
    class_token: bool = False

    @property
    def positions(self) -> int:
        """How many there are, a class token with them."""
        return self.height * self.width + self.class_token

    def maps(self, query: Query, kind: Kind) -> Tensor:
        """The weights of all positions of the map for a query.

        Args:
            query: Row and column in the map, or None for the class token.
            kind: One of `KINDS`.

        Returns:
            (K, H, W), the mean over channels, one map for each path. They are combined by summing;
            that of a path which does not visit the query is zero.

        Raises:
            ValueError: If the query lies outside of the map, there is no class token, or the kind
                is unknown.
        """
        return self.channel_maps(query, kind).mean(-1)

    def channel_maps(self, query: Query, kind: Kind) -> Tensor:
        """As `maps`, with each channel's weights: (K, H, W, D), or (K, H, W, 1) for 'qk'."""
        position = self._position(query)
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is unknown: choose from {', '.join(KINDS)}.")
        found = []
        for path in self.paths:
            step = path.find(position)
            channels = 1 if kind == "qk" else path.dt.shape[-1]
            flat = path.dt.new_zeros(self.positions, channels)
            if step is not None:
                flat[path.positions[step[0], : step[1] + 1]] = path.row(*step, kind)
            found.append(self._to_map(flat))
        return torch.stack(found)

    def _position(self, query: Query) -> int:
        if query is None:
            if not self.class_token:
                raise ValueError("the model has no class token that could be the query.")
            return self.height * self.width
        row, column = query
        if not (0 <= row < self.height and 0 <= column < self.width):
            raise ValueError(f"the query {query} lies outside of {self.height}x{self.width}.")
        return row * self.width + column

    def _to_map(self, flat: Tensor) -> Tensor:
        """(positions, ...) to (H, W, ...), without the class token."""
        return flat[: self.height * self.width].unflatten(0, (self.height, self.width))

    def diagonals(self, kind: Kind) -> Tensor:
        """Every position's own weight: (K, H, W), the mean over channels, for each path."""
        found = []
        for path in self.paths:
            own = (path.Q * path.K).sum(-1)
            if kind == "contribution":
                own = own * path.dt.mean(-1)
            flat = own.new_zeros(self.positions)
            flat[path.positions.flatten()] = own.flatten()
            found.append(self._to_map(flat))
        return torch.stack(found)

    def aligned(self, path: int, matrix: Tensor) -> Tensor:
        """A path's attention matrix with rows and columns in row-major order of the map.

        A class token comes last.
        """
        taken = self.paths[path]
        outputs, positions = (
            place.flatten().to(matrix.device) for place in (taken.outputs, taken.positions)
        )
        found = matrix.new_zeros((self.positions,) * 2)
        found[outputs[:, None], positions] = matrix[: len(outputs), : len(positions)]
        return found


@dataclass(frozen=True)
class Driven:
    """What drives a mixer's K scans, at every position of the map, in float64.

    Attributes:
        paths: The paths.
        Q: (K, H, W, N), which is C.
        K: (K, H, W, N), which is B.
        dt: (K, H, W, D), positive.
        A: (K, D, N), or (K, D, 1), negative.
        x: (K, H, W, D); of the Mamba-2 mixer, (K, H, W, D * head width).
    """

    paths: tuple[Path | ListedPath, ...]
    Q: Tensor
    K: Tensor
    dt: Tensor
    A: Tensor
    x: Tensor


def driven(mixer: SS2D | Mamba2Mixer, x: Tensor) -> Driven:
    """What a mixer makes of a map.

    Args:
        mixer: The mixer.
        x: What it is given, (B, H, W, C); the first image is taken.
    """
    is_mamba2 = isinstance(mixer, Mamba2Mixer)
    paths = paths_of("cross2d" if is_mamba2 else mixer.scan)
    x, conv = mixer.in_proj(x[:1]), mixer.conv2d
    # In the precision in which the mixer computes it.
    A = -mixer.A_logs.float().exp()
    if is_mamba2:
        x = convolve(None if conv is None else conv[1], mixer.act, x)
        A = A[..., None]
    else:
        x = convolve(conv, mixer.act, x.chunk(2, dim=-1)[0] if mixer.gated else x)
        A = mixer._per_direction(A)
        if mixer.scan == "cascade2d":
            rows = F.layer_norm(x, x.shape[-1:])
            columns = F.layer_norm(mixer._scan_lines(rows, slice(0, 2)), x.shape[-1:])
            x = torch.cat([columns if path.column_major else rows for path in paths])
    x = x.double().expand(len(paths), -1, -1, -1)
    projected = x @ mixer.x_proj_weight.double()[:, None].mT
    rank = mixer.heads if is_mamba2 else mixer.dt_rank
    dt, B, C = projected.split([rank, mixer.d_state, mixer.d_state], dim=-1)
    if not is_mamba2:
        dt = dt @ mixer.dt_projs_weight.double()[:, None].mT
    dt = F.softplus(dt + mixer.dt_projs_bias.double()[:, None, None])
    return Driven(paths, C, B, dt, A.double(), x)


@torch.no_grad()
def scan_of(mixer: SS2D | Mamba2Mixer, x: Tensor) -> Scan:
    """Computes what a mixer scans.

    Args:
        mixer: The mixer.
        x: What it is given, (B, H, W, C); the first image is taken.

    Returns:
        The scan.
    """
    given = driven(mixer, x)
    return Scan(tuple(_along_path(given, k) for k in range(len(given.paths))), *x.shape[1:3])


def _along_path(given: Driven, k: int) -> PathScan:
    path, x = given.paths[k], given.x[k]
    positions = torch.from_numpy(path_positions(path, *x.shape[:2]).copy()).to(x.device)
    turned = path.per_line and path.reverse
    outputs = positions.flip(1) if turned else positions
    Q, K, dt, x = (
        part[k].flatten(0, 1)[positions] for part in (given.Q, given.K, given.dt, given.x)
    )
    return PathScan(path_name(path), positions, outputs, Q, K, dt, given.A[k], x)


@torch.no_grad()
def scan_of_sequence(mixer: BidirectionalMixer, x: Tensor, size: tuple[int, int]) -> Scan:
    """Computes what Vim's mixer scans.

    Args:
        mixer: The mixer.
        x: What it is given, (B, L, C); the first image is taken.
        size: Height and width in patches. With one token more, that is the class token.

    Returns:
        The scan, of a forward and a backward path.
    """
    x, dt, B, C, _ = (part[0].double() for part in mixer.drive(x[:1]))
    dt = F.softplus(dt + mixer.step_bias.double()[:, None])
    patches = size[0] * size[1]
    order = torch.arange(patches, device=x.device)
    class_token = x.shape[-1] > patches
    if class_token:
        token = order.new_full((1, 1, 1), patches)
        order = insert_in_the_middle(order[None, :, None], token).flatten()
    paths = [
        PathScan(name, positions, positions, *(part.mT[None] for part in (q, k, steps)), rates, u)
        for name, positions, q, k, steps, rates, u in zip(
            ("forward", "backward"),
            (order[None], order.flip(0)[None]),
            C,
            B,
            dt.chunk(2),
            mixer.rates.double().chunk(2),
            (half.mT[None] for half in x.chunk(2)),
            strict=True,
        )
    ]
    return Scan(tuple(paths), *size, class_token)


@dataclass(frozen=True)
class Mixed:
    """A mixer of a model and what it was given for an image.

    Attributes:
        stage: The stage, from 1.
        block: The block within it, from 1.
        mixer: The mixer.
        x: (1, H, W, C), or Vim's sequence, (1, L, C).
        size: H and W of the map.
    """

    stage: int
    block: int
    mixer: SS2D | Mamba2Mixer | BidirectionalMixer
    x: Tensor
    size: tuple[int, int]

    def scan(self) -> Scan:
        """What it scanned."""
        if isinstance(self.mixer, BidirectionalMixer):
            return scan_of_sequence(self.mixer, self.x, self.size)
        return scan_of(self.mixer, self.x)


@torch.no_grad()
def capture(model: nn.Module, image: Tensor) -> list[Mixed]:
    """Runs a model on an image and keeps what its mixers are given.

    Args:
        model: A module with a VMamba or a VisionMamba in it, in evaluation mode.
        image: (3, H, W).

    Returns:
        The mixers, in the order in which they stand in the model. Vim's are blocks of one stage.

    Raises:
        ValueError: If the model has none.
    """
    found: list[Mixed] = []
    grids: list[tuple[int, int]] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, VisionMamba):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda vim, given: grids.append(vim.grid_of(given[0].shape[-2:]))
                )
            )
        elif isinstance(module, BidirectionalMixer):
            # ...layers.BLOCK.mixer
            *_, block, _ = name.split(".")
            hooks.append(module.register_forward_pre_hook(_keep(found, 1, int(block) + 1, grids)))
        elif isinstance(module, (SS2D, Mamba2Mixer)):
            # ...layers.STAGE.blocks.BLOCK.op
            *_, stage, _, block, _ = name.split(".")
            keep = _keep(found, int(stage) + 1, int(block) + 1)
            hooks.append(module.register_forward_pre_hook(keep))
    if not hooks:
        raise ValueError(
            f"{type(model).__name__} has no selective scan to look at: activation maps are "
            "VMamba's and Vim's. Effective receptive fields (erf.py) compare them with others."
        )
    try:
        model(image[None])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _keep(
    found: list[Mixed], stage: int, block: int, grids: Sequence[tuple[int, int]] = ()
) -> Callable[[nn.Module, tuple[Tensor]], None]:
    """A hook that keeps what a mixer is given; of a sequence, the grid tells height and width."""

    def hook(mixer: nn.Module, given: tuple[Tensor]) -> None:
        x = given[0][:1]
        size = grids[-1] if grids else tuple(x.shape[1:3])
        found.append(Mixed(stage, block, mixer, x, size))

    return hook


def arrays(scan: Scan, query: Query, longest: int) -> dict[str, np.ndarray]:
    """All that is drawn of a scan, for `np.savez`.

    Args:
        scan: The scan.
        query: Row and column in the map, or None for the class token.
        longest: Attention matrices are left out where there are more positions.

    Returns:
        'query', which is empty for the class token, and for each kind 'map_KIND' and
        'diagonal_KIND', (K, H, W), and 'matrix_KIND', (K, L, L), in float32 and in the order of
        each path, with zeros at the end of shorter ones.
    """
    found = {"query": np.array(query or (), dtype=int)}
    for kind in KINDS:
        found[f"map_{kind}"] = scan.maps(query, kind).cpu().numpy()
        found[f"diagonal_{kind}"] = scan.diagonals(kind).cpu().numpy()
        if scan.positions <= longest:
            longest_path = max(path.positions.numel() for path in scan.paths)
            matrices = []
            for path in scan.paths:
                missing = longest_path - path.positions.numel()
                matrix = F.pad(path.matrix(kind).float(), (0, missing, 0, missing))
                matrices.append(matrix.cpu().numpy())
            found[f"matrix_{kind}"] = np.stack(matrices)
    return found


def draw_maps(image: np.ndarray, found: dict[str, np.ndarray], names: Sequence[str], title: str):
    """Draws the maps for a query, combined and for each path (paper, figures 5 and 9).

    Args:
        image: (H, W, 3), from 0 to 1.
        found: What `arrays` gave.
        names: The paths' names.
        title: A line above all.

    Returns:
        matplotlib's figure. Colours are magnitudes over the largest one of each map.
    """
    from matplotlib.figure import Figure

    columns = 2 + len(names)
    figure = Figure(figsize=(1.92 * columns, 6.9), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(3, columns)
    for axes, kind in zip(grid[:, 1], KINDS, strict=True):
        axes.set_title(f"{TITLES[kind]}\nall paths", fontsize="small")
    for row, kind in zip(grid, KINDS, strict=True):
        _show_image(row[0], image, found)
        maps = found[f"map_{kind}"]
        for axes, values in zip(row[1:], (maps.sum(0), *maps), strict=True):
            _show(axes, values, found)
        for axes, name in zip(row[2:], names, strict=True):
            axes.set_title(name, fontsize="small")
    grid[0, 0].set_title(_query_title(found), fontsize="small")
    return figure


def draw_matrices(scan: Scan, image: np.ndarray, found: dict[str, np.ndarray], title: str):
    """Draws the attention matrices and their diagonals (paper, figure 8).

    Args:
        scan: The scan.
        image: (H, W, 3), from 0 to 1.
        found: What `arrays` gave, with matrices.
        title: A line above all.

    Returns:
        matplotlib's figure.
    """
    from matplotlib.figure import Figure

    # The first row has four.
    columns = max(4, len(scan.paths))
    figure = Figure(figsize=(2.5 * columns, 9.2), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(4, columns)
    _show_image(grid[0, 0], image, found)
    grid[0, 0].set_title(_query_title(found), fontsize="small")
    diagonals = ("qk", "contribution")
    for axes, kind in zip(grid[0, 1:], diagonals, strict=False):
        _show(axes, found[f"diagonal_{kind}"].sum(0), found)
    grid[0, 1].set_title(
        f"diagonals of {TITLES['qk']}\nand of {TITLES['weighted']}", fontsize="small"
    )
    grid[0, 2].set_title(f"diagonals of\n{TITLES['contribution']}", fontsize="small")
    total = sum(
        scan.aligned(k, torch.from_numpy(matrix))
        for k, matrix in enumerate(found["matrix_weighted"])
    )
    _show(grid[0, 3], total.numpy())
    grid[0, 3].set_title(f"{TITLES['weighted']}\nall paths, row-major", fontsize="small")
    for k, path in enumerate(scan.paths):
        qk, weighted = found["matrix_qk"][k], found["matrix_weighted"][k]
        aligned = scan.aligned(k, torch.from_numpy(qk)).numpy()
        for axes, values in zip(grid[1:, k], (qk, aligned, weighted), strict=True):
            _show(axes, values)
        grid[1, k].set_title(path.name, fontsize="small")
    for axes in (*grid[0, 4:], *grid[1:, len(scan.paths) :].flat):
        axes.remove()
    labels = (TITLES["qk"], f"{TITLES['qk']}, row-major", TITLES["weighted"])
    for axes, label in zip(grid[1:, 0], labels, strict=True):
        axes.set_ylabel(label, fontsize="small")
    return figure


def _show_image(axes, image: np.ndarray, found: dict[str, np.ndarray]) -> None:
    axes.imshow(image)
    height, width = found["map_qk"].shape[1:]
    if found["query"].size:
        row, column = (found["query"] + 0.5) * (image.shape[0] / height, image.shape[1] / width)
        axes.plot(column - 0.5, row - 0.5, "*", color="red", markeredgecolor="white", markersize=12)
    _bare(axes)


def _query_title(found: dict[str, np.ndarray]) -> str:
    return "image and query" if found["query"].size else "image; class token"


def _show(axes, values: np.ndarray, found: dict[str, np.ndarray] | None = None) -> None:
    magnitude = np.abs(values)
    axes.imshow(magnitude / max(magnitude.max(), np.finfo(float).tiny), vmin=0, vmax=1)
    if found is not None and found["query"].size:
        row, column = found["query"]
        axes.plot(column, row, "*", color="red", markeredgecolor="white", markersize=9)
    _bare(axes)


def _bare(axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
