"""Every model of the package in plain PyTorch, as a reference.

Written from the equations and independent of `regnet_flax`: NCHW arrays, an explicit loop over the blocks, nothing
scanned or stacked. `port/torch.py` reads and writes its state-dict names. The notation is the paper's
(arXiv 2101.00590): X is a feature map, H the regulator's state, C the LSTM's cell state, n their channels.

Initial values are PyTorch's defaults: a test that compares outputs copies the weights over.

    build("regnet20_convlstm", num_classes=10, share_regulator=False)(torch.zeros(2, 3, 32, 32))  # (2, 10) logits
"""

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, ...]  # (H,), or (H, C) for the LSTM


def conv(c_in: int, c_out: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Makes a convolution with padding k//2 and no bias, as used before every BN."""
    return nn.Conv2d(c_in, c_out, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    """Makes a BN with the constants used everywhere."""
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)


class Cell(nn.Module):
    """A recurrent cell: `cell(x, state) -> state`; no state means zeros. H comes first in the state."""

    state_maps = 1

    def forward(self, x: Tensor, state: State | None = None) -> State:
        if state is None:
            state = (torch.zeros_like(x),) * self.state_maps
        return self.step(x, *state)


class Regulator(Cell):
    """W[X, H] + b for G gates, in the `separable` or the `dense` form. Row g·n + c of a weight is gate g, channel c."""

    gates: int

    def __init__(self, n: int, kernel: str = "separable"):
        super().__init__()
        self.n, self.kernel = n, kernel
        rows = self.gates * n
        if kernel == "dense":
            self.conv = nn.Conv2d(2 * n, rows, 3, padding=1)
        elif kernel == "separable":
            # They only hold weights: called directly, their outputs would be channel-major.
            self.pointwise = nn.Conv2d(2 * n, rows, 1, groups=n, bias=False)
            self.depthwise = nn.Conv2d(rows, rows, 3, padding=1, groups=rows)
        else:
            raise ValueError(f"kernel must be 'separable' or 'dense', not {kernel!r}")

    def preactivations(self, x: Tensor, h: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Returns W_g[X, H] + b_g of the gates `first` up to, but not including, `last`: n channels each."""
        count, rows = last - first, slice(first * self.n, last * self.n)
        if self.kernel == "dense":
            y = F.conv2d(torch.cat([x, h], 1), self.conv.weight[rows], self.conv.bias[rows], padding=1)
        else:
            pairs = torch.stack([x, h], 2).flatten(1, 2)  # x_0, h_0, x_1, h_1, …
            y = F.conv2d(pairs.repeat(1, count, 1, 1), self.pointwise.weight[rows], groups=count * self.n)
            weight, bias = self.depthwise.weight[rows], self.depthwise.bias[rows]
            y = F.conv2d(y, weight, bias, padding=1, groups=count * self.n)
        return y.chunk(count, 1)


class ConvRNN(Regulator):
    """H' = tanh(W[X, H] + b)."""

    gates = 1

    def step(self, x: Tensor, h: Tensor) -> State:
        (a,) = self.preactivations(x, h, 0, 1)
        return (torch.tanh(a),)


class ConvGRU(Regulator):
    """z, r = σ(W[X, H] + b); H̃ = tanh(Wh[X, r⊙H] + bh); H' = (1 − z)⊙H + z⊙H̃."""

    gates = 3

    def step(self, x: Tensor, h: Tensor) -> State:
        z, r = (torch.sigmoid(a) for a in self.preactivations(x, h, 0, 2))
        (a,) = self.preactivations(x, r * h, 2, 3)
        return ((1 - z) * h + z * torch.tanh(a),)


class ConvLSTM(Regulator):
    """i, f, o = σ(W[X, H] + b); g = tanh(Wg[X, H] + bg); C' = f⊙C + i⊙g; H' = o⊙tanh(C')."""

    gates = 4
    state_maps = 2

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, o, g = self.preactivations(x, h, 0, 4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class RNNProjectConvRNN(Cell):
    """*RNN*'s ConvRNN, H' = tanh(conv_x[X, H]).

    It has one biased convolution of [X, H], as the parameter count shows; we assume that it is `conv_x`, the GRU's name
    for its convolution of the same pair, and that there is no `conv_y`.
    """

    def __init__(self, n: int):
        super().__init__()
        self.conv_x = nn.Conv2d(2 * n, n, 3, padding=1)

    def step(self, x: Tensor, h: Tensor) -> State:
        return (torch.tanh(self.conv_x(torch.cat([x, h], 1))),)


class RNNProjectConvGRU(Cell):
    """*RNN*'s ConvGRU: a, b = σ(conv_x[X, H]); y = tanh(conv_y[X, H, b⊙H]); H' = a⊙H + (1 − a)⊙y."""

    def __init__(self, n: int):
        super().__init__()
        self.conv_x = nn.Conv2d(2 * n, 2 * n, 3, padding=1)
        self.conv_y = nn.Conv2d(3 * n, n, 3, padding=1)

    def step(self, x: Tensor, h: Tensor) -> State:
        a, b = torch.sigmoid(self.conv_x(torch.cat([x, h], 1))).chunk(2, 1)
        y = torch.tanh(self.conv_y(torch.cat([x, h, b * h], 1)))
        return (a * h + (1 - a) * y,)


class SqueezeExcite(nn.Module):
    """x ⊙ σ(fc2(ReLU(fc1(global mean of x)))), with two Linear layers, or two 1×1 convolutions as in torchvision."""

    def __init__(self, channels: int, hidden: int, convolutions: bool = False):
        super().__init__()
        layer = partial(nn.Conv2d, kernel_size=1) if convolutions else nn.Linear
        self.convolutions = convolutions
        self.fc1 = layer(channels, hidden)
        self.fc2 = layer(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=self.convolutions)
        s = torch.sigmoid(self.fc2(F.relu(self.fc1(s))))
        return x * s.reshape(*s.shape[:2], 1, 1)


class ZeroPadShortcut(nn.Module):
    """He's option A: every stride-th pixel, with zero channels appended."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.added, self.stride = c_out - c_in, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))


@dataclass(frozen=True)
class Style:
    """The differences between the projects: some names, and how a block uses H."""

    cell: str = "regulator"
    shortcut: str = "shortcut"
    head: str = "linear"
    norm_h: bool = True  # H = ReLU(BN(H)) after the cell
    fuse: bool = True  # 1×1 convolution of [X, H]; otherwise H replaces X


PAPER = Style()
TORCHVISION = Style(shortcut="downsample", head="fc")
PROJ = Style(cell="convlstm", shortcut="downsample", head="fc", norm_h=False)
RNN = Style(cell="rnn", norm_h=False, fuse=False)


class Block(nn.Module):
    """The base of basic and bottleneck blocks: `block(x, state, regulator) -> (y, state)`.

    A regulated block runs the given `regulator` (the stage's shared one), or else its own `cell`. The next block
    receives the returned state; a plain block returns the state unchanged.
    """

    expansion: int

    def __init__(
        self,
        c_in: int,
        n: int,
        stride: int = 1,
        *,
        regulated: bool = False,
        cell: Cell | None = None,
        se: bool = False,
        shortcut: str = "B",
        style: Style = PAPER,
    ):
        super().__init__()
        self.regulated, self.style = regulated, style
        c_out = n * self.expansion
        if cell is not None:
            self.add_module(style.cell, cell)
        if regulated and style.norm_h:
            self.bn_h = norm(n)
        if regulated and style.fuse:
            self.conv_fuse, self.bn_fuse = conv(2 * n, n, 1), norm(n)
        self.se = SqueezeExcite(c_out, max(1, c_out // 16)) if se else nn.Identity()
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be 'A' or 'B', not {shortcut!r}")
        if stride == 1 and c_in == c_out:
            path = nn.Identity()
        elif shortcut == "A":
            path = ZeroPadShortcut(c_in, c_out, stride)
        else:
            path = nn.Sequential(conv(c_in, c_out, 1, stride), norm(c_out))
        self.add_module(style.shortcut, path)

    def regulate(self, x: Tensor, state: State | None, regulator: Cell | None) -> State:
        """H, C = regulator(X, (H, C)); H = ReLU(BN(H)); C stays as it is."""
        cell = getattr(self, self.style.cell) if regulator is None else regulator
        h, *rest = cell(x, state)
        if self.style.norm_h:
            h = F.relu(self.bn_h(h))
        return (h, *rest)

    def fuse(self, x: Tensor, h: Tensor) -> Tensor:
        """ReLU(BN(W * [X, H])), or H itself."""
        return F.relu(self.bn_fuse(self.conv_fuse(torch.cat([x, h], 1)))) if self.style.fuse else h

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """X1(t+1) = ReLU(shortcut(X1) + SE(last BN's output))."""
        return F.relu(getattr(self, self.style.shortcut)(x) + self.se(y))


class BasicBlock(Block):
    """The RegNet module: 3×3 (`conv1`), regulator, 1×1 of [X2, H] (`conv_fuse`), 3×3 (`conv2`)."""

    expansion = 1

    def __init__(self, c_in: int, n: int, stride: int = 1, **options):
        super().__init__(c_in, n, stride, **options)
        self.conv1, self.bn1 = conv(c_in, n, 3, stride), norm(n)
        self.conv2, self.bn2 = conv(n, n, 3), norm(n)

    def forward(self, x: Tensor, state: State | None = None, regulator: Cell | None = None):
        y = F.relu(self.bn1(self.conv1(x)))  # X2
        if self.regulated:
            state = self.regulate(y, state, regulator)
            y = self.fuse(y, state[0])  # X3
        y = self.bn2(self.conv2(y))  # X4
        return self.add(x, y), state


class BottleneckBlock(Block):
    """Bottleneck RegNet module: 1×1 (`conv1`), regulator, 3×3 (`conv2`), 1×1 of [X3, H] (`conv_fuse`), 1×1."""

    expansion = 4

    def __init__(self, c_in: int, n: int, stride: int = 1, *, bottleneck_stride: str = "1x1", **options):
        super().__init__(c_in, n, stride, **options)
        stride1, stride2 = {"1x1": (stride, 1), "3x3": (1, stride)}[bottleneck_stride]
        self.conv1, self.bn1 = conv(c_in, n, 1, stride1), norm(n)
        self.conv2, self.bn2 = conv(n, n, 3, stride2), norm(n)
        self.conv3, self.bn3 = conv(n, 4 * n, 1), norm(4 * n)

    def forward(self, x: Tensor, state: State | None = None, regulator: Cell | None = None):
        y = F.relu(self.bn1(self.conv1(x)))  # X2
        if self.regulated:
            state = self.regulate(y, state, regulator)
        y = F.relu(self.bn2(self.conv2(y)))  # X3
        if self.regulated:
            y = self.fuse(y, state[0])  # X4
        y = self.bn3(self.conv3(y))  # X5
        return self.add(x, y), state


class ResNet(nn.Module):
    """Stem, stages of blocks, global mean, linear head: every network here except RegNetY.

    The attributes `layer{s}` hold the blocks of stage s, and `regulator{s}` its cell if the stage shares one.

    Args:
        num_classes: number of logits.
        block: BasicBlock, or a BottleneckBlock.
        counts: blocks in each stage; stage s has n = width · 2^(s−1) and, from the second on, stride 2.
        width: channels of the stem and n of stage 1.
        stem: (kernel size, stride, whether a 3×3 max-pool of stride 2 follows).
        make_cell: n → regulator; None for a plain network.
        share_regulator: one cell per stage, or one per block.
        regulated_stages: the stages (from 1) that have regulators; None for all.
        se, shortcut, style: as in Block.
        in_channels: channels of the images.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        block: Callable[..., Block],
        counts: tuple[int, ...],
        width: int,
        stem: tuple[int, int, bool],
        make_cell: Callable[[int], Cell] | None = None,
        share_regulator: bool = True,
        regulated_stages: tuple[int, ...] | None = None,
        se: bool = False,
        shortcut: str = "B",
        style: Style = PAPER,
        in_channels: int = 3,
    ):
        super().__init__()
        kernel_size, stride, self.pool = stem
        self.conv1, self.bn1 = conv(in_channels, width, kernel_size, stride), norm(width)
        self.stages, self.head_name = len(counts), style.head
        channels = width
        for s, count in enumerate(counts, start=1):
            n = width * 2 ** (s - 1)
            regulated = make_cell is not None and (regulated_stages is None or s in regulated_stages)
            if regulated and share_regulator:
                self.add_module(f"regulator{s}", make_cell(n))
            blocks = nn.ModuleList()
            for j in range(count):
                own = make_cell(n) if regulated and not share_regulator else None
                stride = 2 if s > 1 and j == 0 else 1
                options = {"regulated": regulated, "cell": own, "se": se, "shortcut": shortcut, "style": style}
                blocks.append(block(channels, n, stride, **options))
                channels = n * blocks[-1].expansion
            self.add_module(f"layer{s}", blocks)
        self.add_module(style.head, nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        if self.pool:
            x = F.max_pool2d(x, 3, 2, padding=1)
        for s in range(1, self.stages + 1):
            regulator = getattr(self, f"regulator{s}", None)
            state = None  # zero at each stage's start
            for block in getattr(self, f"layer{s}"):
                x, state = block(x, state, regulator)
        return getattr(self, self.head_name)(x.mean((2, 3)))


def conv_norm(c_in: int, c_out: int, kernel_size: int, stride: int = 1, groups: int = 1, relu: bool = True):
    """Makes torchvision's convolution, BN and optional ReLU as one Sequential."""
    layers = [conv(c_in, c_out, kernel_size, stride, groups), norm(c_out)]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class RegNetYBlock(nn.Module):
    """RegNetY's residual block: 1×1 (a), grouped 3×3 with the stride (b), SE, 1×1 (c); SE's width is c_in / 4."""

    def __init__(self, c_in: int, c_out: int, stride: int, group_width: int = 8):
        super().__init__()
        self.proj = nn.Identity() if (c_in, stride) == (c_out, 1) else conv_norm(c_in, c_out, 1, stride, relu=False)
        layers = OrderedDict()
        layers["a"] = conv_norm(c_in, c_out, 1)
        layers["b"] = conv_norm(c_out, c_out, 3, stride, groups=c_out // group_width)
        layers["se"] = SqueezeExcite(c_out, round(0.25 * c_in), convolutions=True)
        layers["c"] = conv_norm(c_out, c_out, 1, relu=False)
        self.f = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.proj(x) + self.f(x))


class RegNetY400MF(nn.Module):
    """Radosavovic's RegNetY-400MF (arXiv 2003.13678) with torchvision's names.

    Widths and depths follow from w0 = 48, wa = 27.89, wm = 2.09, depth 16 and group width 8; with a smaller depth the
    network has the first of these blocks.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, depth: int = 16):
        super().__init__()
        self.stem = conv_norm(in_channels, 32, 3, stride=2)
        self.trunk_output = nn.Sequential()
        channels = 32
        for s, (width, blocks) in enumerate(zip((48, 104, 208, 440), (1, 3, 6, 6), strict=True), start=1):
            blocks, depth = min(blocks, depth), depth - min(blocks, depth)
            if not blocks:
                break
            stage = nn.Sequential()
            for j in range(blocks):
                stage.add_module(f"block{s}-{j}", RegNetYBlock(channels, width, stride=2 if j == 0 else 1))
                channels = width
            self.trunk_output.add_module(f"block{s}", stage)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk_output(self.stem(x)).mean((2, 3)))


REGULATORS = {"convrnn": ConvRNN, "convgru": ConvGRU, "convlstm": ConvLSTM}
IMAGENET = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (BottleneckBlock, (3, 4, 6, 3)),
    101: (BottleneckBlock, (3, 4, 23, 3)),
}
CIFAR_STEM = {"stem": (3, 1, False), "width": 16}
IMAGENET_STEM = {"stem": (7, 2, True), "width": 64}

_proj = {"block": BasicBlock, "make_cell": partial(ConvLSTM, kernel="dense"), "share_regulator": False, "style": PROJ}
_rnn = {"block": BasicBlock, "counts": (3, 3, 3), "share_regulator": False, "style": RNN}
PROJECT_MODELS = {
    "regnet_proj_cifar": _proj | CIFAR_STEM | {"counts": (2, 2, 2), "stem": (3, 1, True)},
    "regnet_proj_imagenet": _proj | IMAGENET_STEM | {"counts": (3, 4, 6, 3)},
    "resnet_rnn20_convrnn": _rnn | CIFAR_STEM | {"make_cell": RNNProjectConvRNN},
    "resnet_rnn20_convgru": _rnn | CIFAR_STEM | {"make_cell": RNNProjectConvGRU},
}


def build(name: str, num_classes: int = 10, **options) -> nn.Module:
    """Builds the model of a registry name, such as `regnet20_convlstm`, `se_resnet50` or `regnety_400mf`.

    Depths 18, 34, 50 and 101 are the ImageNet family (even 50, although it is 6·8 + 2), any other 6m + 2 is CIFAR's.

    Options: in_channels, width, counts, shortcut, regulated_stages, kernel, share_regulator, bottleneck_stride; an
    option that the model fixes is a TypeError, an irrelevant one (kernel in a plain ResNet) is ignored.
    """
    if name == "regnety_400mf":
        return RegNetY400MF(num_classes, **options)
    if name in PROJECT_MODELS:
        fixed = set(options) & (set(PROJECT_MODELS[name]) - {"width", "counts"})
        if fixed:
            raise TypeError(f"{name} fixes {', '.join(sorted(fixed))}")
        return ResNet(num_classes, **PROJECT_MODELS[name] | options)

    match = re.fullmatch(r"(se_)?(?:resnet(\d+)|regnet(\d+)_(convrnn|convgru|convlstm))", name)
    if match is None:
        raise ValueError(f"unknown model {name!r}")
    se, cell = match[1] is not None, match[4]
    depth = int(match[2] or match[3])
    kernel, stride = options.pop("kernel", "separable"), options.pop("bottleneck_stride", "1x1")
    if cell and stride != "1x1":
        raise ValueError("bottleneck_stride='3x3' would leave X2 and X3 of different sizes: plain and SE ResNets only")
    if depth in IMAGENET:
        block, counts = IMAGENET[depth]
        if block is BottleneckBlock:
            block = partial(BottleneckBlock, bottleneck_stride=stride)
        settings = IMAGENET_STEM | {"block": block, "counts": counts, "style": PAPER if cell else TORCHVISION}
    elif depth >= 8 and depth % 6 == 2:
        settings = CIFAR_STEM | {"block": BasicBlock, "counts": ((depth - 2) // 6,) * 3}
    else:
        raise ValueError(f"{name!r}: depth must be 18, 34, 50, 101 or 6m + 2")
    if cell:
        settings["make_cell"] = partial(REGULATORS[cell], kernel=kernel)
    return ResNet(num_classes, **settings | {"se": se} | options)
