"""The other networks in plain PyTorch: other families of ResNets, comparison models, and the paper's open choices.

Like torch_reference.py: written from the equations, independent of `regnet_flax`, nothing scanned or stacked.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_reference import (
    CIFAR_STEM,
    IMAGENET,
    IMAGENET_STEM,
    PAPER,
    REGULATORS,
    TORCHVISION,
    BasicBlock,
    BottleneckBlock,
    Cell,
    Regulator,
    ResNet,
    SqueezeExcite,
    State,
    Style,
    ZeroPadShortcut,
    conv,
    norm,
)


class GroupedBottleneck(nn.Module):
    """The block of ResNeXt and Wide ResNet: m = n · base / 64 · groups channels inside, 4n outside, stride in the 3×3.

    A regulator sees X2, of m channels, at the block's stride; a 1×1 without groups fuses H, 2m → m.
    """

    expansion = 4

    def __init__(self, c_in, n, stride=1, *, groups, base, regulated=False, cell=None, se=False, style, shortcut="B"):
        super().__init__()
        m, c_out = max(1, n * base // 64) * groups, 4 * n
        self.stride, self.style, self.regulated = stride, style, regulated
        self.conv1, self.bn1 = conv(c_in, m, 1), norm(m)
        self.conv2, self.bn2 = conv(m, m, 3, stride, groups), norm(m)
        self.conv3, self.bn3 = conv(m, c_out, 1), norm(c_out)
        if cell is not None:
            self.regulator = cell
        if regulated:
            self.bn_h, self.conv_fuse, self.bn_fuse = norm(m), conv(2 * m, m, 1), norm(m)
        self.se = SqueezeExcite(c_out, max(1, c_out // 16)) if se else nn.Identity()
        path = nn.Identity()
        if stride != 1 or c_in != c_out:
            path = nn.Sequential(conv(c_in, c_out, 1, stride), norm(c_out))
        self.add_module(style.shortcut, path)

    def forward(self, x: Tensor, state: State | None = None, regulator: Cell | None = None):
        x2 = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(x2)))
        if self.regulated:
            h, *rest = (regulator or self.regulator)(x2[:, :, :: self.stride, :: self.stride], state)
            state = (F.relu(self.bn_h(h)), *rest)
            y = F.relu(self.bn_fuse(self.conv_fuse(torch.cat([y, state[0]], 1))))
        y = self.se(self.bn3(self.conv3(y)))
        return F.relu(getattr(self, self.style.shortcut)(x) + y), state


class PreactBlock(nn.Module):
    """A = ReLU(BN(X1)); X2 = ReLU(BN(W12 * A)); X3 = ReLU(BN(W23 * [X2, H])), or X2; X1' = shortcut + W34 * X3."""

    def __init__(self, c_in, n, stride, *, cell=None, regulated=False, se=False, shortcut="B"):
        super().__init__()
        self.bn1, self.conv1 = norm(c_in), conv(c_in, n, 3, stride)
        self.bn2, self.conv2 = norm(n), conv(n, n, 3)
        self.regulated, self.changes, self.option = regulated, stride != 1 or c_in != n, shortcut
        if cell is not None:
            self.regulator = cell
        if regulated:
            self.bn_h, self.conv_fuse, self.bn_fuse = norm(n), conv(2 * n, n, 1), norm(n)
        self.se = SqueezeExcite(n, max(1, n // 16)) if se else nn.Identity()
        if self.changes:
            projection = nn.Sequential(conv(c_in, n, 1, stride))
            self.shortcut = projection if shortcut == "B" else ZeroPadShortcut(c_in, n, stride)

    def forward(self, x, state=None, regulator=None):
        a = F.relu(self.bn1(x))
        y = F.relu(self.bn2(self.conv1(a)))
        if self.regulated:
            h, *rest = (regulator or self.regulator)(y, state)
            state = (F.relu(self.bn_h(h)), *rest)
            y = F.relu(self.bn_fuse(self.conv_fuse(torch.cat([y, state[0]], 1))))
        path = x if not self.changes else self.shortcut(a if self.option == "B" else x)
        return path + self.se(self.conv2(y)), state


class PreactNet(nn.Module):
    """A stem without BN, stages of pre-activation blocks, BN and ReLU before the pooling."""

    def __init__(
        self,
        num_classes,
        counts,
        width,
        stem_width=None,
        make_cell=None,
        share_regulator=True,
        in_channels=3,
        **options,
    ):
        super().__init__()
        channels = stem_width or width
        self.conv1, self.stages = conv(in_channels, channels, 3), len(counts)
        for s, count in enumerate(counts, start=1):
            n, blocks = width * 2 ** (s - 1), nn.ModuleList()
            if make_cell and share_regulator:
                self.add_module(f"regulator{s}", make_cell(n))
            for j in range(count):
                own = make_cell(n) if make_cell and not share_regulator else None
                more = options | {"cell": own, "regulated": make_cell is not None}
                blocks.append(PreactBlock(channels, n, 2 if s > 1 and j == 0 else 1, **more))
                channels = n
            self.add_module(f"layer{s}", blocks)
        self.bn_last, self.linear = norm(channels), nn.Linear(channels, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        for s in range(1, self.stages + 1):
            state = None
            for block in getattr(self, f"layer{s}"):
                x, state = block(x, state, getattr(self, f"regulator{s}", None))
        return self.linear(F.relu(self.bn_last(x)).mean((2, 3)))


class DIACell(Cell):
    """i, f, o, g = A_x(y) + A_h(h); c' = σ(f)c + σ(i)tanh(g); h' = σ(o)σ(c'), of vectors; A is C → C/4 → 4C."""

    state_maps = 2

    def __init__(self, n: int):
        super().__init__()
        small = max(1, n // 4)
        self.x1, self.x2 = nn.Linear(n, small), nn.Linear(small, 4 * n)
        self.h1, self.h2 = nn.Linear(n, small), nn.Linear(small, 4 * n)

    def step(self, y: Tensor, h: Tensor, c: Tensor) -> State:
        gates = self.x2(F.relu(self.x1(y))) + self.h2(F.relu(self.h1(h)))
        i, f, o, g = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.sigmoid(c), c


class DIABlock:
    """x' = ReLU(shortcut + F(x)⊙h'), where the cell's input is the global means of F(x), after its last BN."""

    def forward(self, x, state=None, regulator=None):
        y = self.residual(x)
        state = (regulator or self.regulator)(y.mean((2, 3)), state)
        return F.relu(self.shortcut(x) + y * state[0][:, :, None, None]), state


class DIABasicBlock(DIABlock, BasicBlock):
    def residual(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class DIABottleneckBlock(DIABlock, BottleneckBlock):
    def residual(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(y))


DIA_STYLE = Style(norm_h=False, fuse=False)


class RLABlock(nn.Module):
    """y = F([x, h]); x' = ReLU(shortcut(x) + y); h' = W_rec * tanh(BN(pooled h + W_out * y)).

    W_out and W_rec belong to the stage; h is averaged over 2×2 pixels if the stride is 2.
    """

    def __init__(self, c_in, n, stride, k, at="1x1"):
        super().__init__()
        first, second = (stride, 1) if at == "1x1" else (1, stride)
        self.conv1, self.bn1 = conv(c_in + k, n, 1, first), norm(n)
        self.conv2, self.bn2 = conv(n, n, 3, second), norm(n)
        self.conv3, self.bn3 = conv(n, 4 * n, 1), norm(4 * n)
        self.bn_h, self.stride = norm(k), stride
        changes = stride != 1 or c_in != 4 * n
        self.shortcut = nn.Sequential(conv(c_in, 4 * n, 1, stride), norm(4 * n)) if changes else nn.Identity()

    def forward(self, x, h, out, rec):
        y = F.relu(self.bn1(self.conv1(torch.cat([x, h], 1))))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        if self.stride > 1:
            h = F.avg_pool2d(h, 2, 2, ceil_mode=True, count_include_pad=False)
        return F.relu(self.shortcut(x) + y), rec(torch.tanh(self.bn_h(h + out(y))))


class RLANet(nn.Module):
    """h starts at zero after the stem and passes through all stages; the head sees the means of [x, ReLU(BN(h))]."""

    def __init__(self, num_classes, counts=(3, 4, 6, 3), width=64, k=32, bottleneck_stride="1x1", in_channels=3):
        super().__init__()
        self.conv1, self.bn1, self.k, self.stages = conv(in_channels, width, 7, 2), norm(width), k, len(counts)
        channels = width
        for s, count in enumerate(counts, start=1):
            n, blocks = width * 2 ** (s - 1), nn.ModuleList()
            for j in range(count):
                blocks.append(RLABlock(channels, n, 2 if s > 1 and j == 0 else 1, k, bottleneck_stride))
                channels = 4 * n
            self.add_module(f"layer{s}", blocks)
            self.add_module(f"conv_out{s}", conv(channels, k, 1))
            self.add_module(f"conv_rec{s}", conv(k, k, 3))
        self.bn_h, self.linear = norm(k), nn.Linear(channels + k, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        h = x.new_zeros(len(x), self.k, *x.shape[2:])
        for s in range(1, self.stages + 1):
            for block in getattr(self, f"layer{s}"):
                x, h = block(x, h, getattr(self, f"conv_out{s}"), getattr(self, f"conv_rec{s}"))
        return self.linear(torch.cat([x, F.relu(self.bn_h(h))], 1).mean((2, 3)))


def contiguous(cell: type[Regulator]) -> type[Regulator]:
    """Returns the cell with N literal groups over [X, H]: neighbours share a group, X with X and H with H."""

    class Contiguous(cell):
        def preactivations(self, x, h, first, last):
            count, rows = last - first, slice(first * self.n, last * self.n)
            both = torch.cat([x, h], 1).repeat(1, count, 1, 1)
            y = F.conv2d(both, self.pointwise.weight[rows], groups=count * self.n)
            weight, bias = self.depthwise.weight[rows], self.depthwise.bias[rows]
            return F.conv2d(y, weight, bias, padding=1, groups=count * self.n).chunk(count, 1)

    return Contiguous


class OpenBlock(BasicBlock):
    """The paper's module with ReLU(BN(·)) of H ("h"), H and C ("hc") or neither ("none"), optionally per stage."""

    def __init__(self, c_in, n, stride=1, *, normalize="h", **options):
        super().__init__(c_in, n, stride, **options)
        self.norms = ("bn_h", "bn_c") if normalize == "hc" else ("bn_h",) if normalize == "h" else ()
        if normalize == "none":
            del self.bn_h
        if normalize == "hc":
            self.bn_c = norm(n)
        self.stage = None  # maps a name to the stage's batch normalisation

    def regulate(self, x, state, regulator):
        state = (regulator or self.regulator)(x, state)
        found = [(self.stage or partial(getattr, self))(name) for name in self.norms]
        return tuple(F.relu(bn(a)) for a, bn in zip(state, found, strict=False)) + state[len(found) :]


class OpenNet(ResNet):
    """RegNet with the choices that the paper leaves open; see OpenBlock and `contiguous`."""

    def __init__(self, num_classes, *, cell, normalize="h", share_norm=False, grouping="pairs", **options):
        make_cell = contiguous(REGULATORS[cell]) if grouping == "contiguous" else REGULATORS[cell]
        if normalize == "hc" and make_cell.state_maps == 1:
            normalize = "h"
        super().__init__(num_classes, block=partial(OpenBlock, normalize=normalize), make_cell=make_cell, **options)
        for s in range(1, self.stages + 1 if share_norm else 1):
            for block in getattr(self, f"layer{s}"):
                for name in block.norms:
                    if not hasattr(self, f"{name}{s}"):
                        self.add_module(f"{name}{s}", getattr(block, name))
                    delattr(block, name)
                block.stage = partial(lambda s, name: getattr(self, f"{name}{s}"), s)


def grouped(depth, groups, base, cell=None, kernel="separable", **options):
    """Builds ResNeXt and Wide ResNet, with torchvision's names if there is no regulator."""
    make_cell = None
    if cell:
        make_cell = lambda n: REGULATORS[cell](max(1, n * base // 64) * groups, kernel)  # noqa: E731
    style = PAPER if cell else TORCHVISION
    block = partial(GroupedBottleneck, groups=groups, base=base)
    return partial(ResNet, **IMAGENET_STEM | {"block": block, "make_cell": make_cell, "style": style} | options)


def preact(cell=None, kernel="separable", **options):
    make_cell = partial(REGULATORS[cell], kernel=kernel) if cell else None
    return partial(PreactNet, make_cell=make_cell, **options)


def dia(bottleneck=False, imagenet=False, **options):
    block = DIABottleneckBlock if bottleneck else DIABasicBlock
    stem = IMAGENET_STEM if imagenet else CIFAR_STEM
    fields = stem | {"block": block, "style": DIA_STYLE, "make_cell": lambda n: DIACell(n * block.expansion)}
    return partial(ResNet, **fields | options)


IMAGENET_COUNTS = {depth: counts for depth, (_, counts) in IMAGENET.items()}


def reference(name):
    """Builds the PyTorch network of a listed name of these families at full size; None for other families."""
    se, name = name.startswith("se_"), name.removeprefix("se_")
    cell = name.rpartition("_")[2] if name.endswith(("convrnn", "convgru", "convlstm")) else None
    size = name.removesuffix(f"_{cell}").lstrip("abcdefghijklmnopqrstuvwxyz_")
    if name.startswith("preact"):
        return preact(cell, se=se, counts=((int(size) - 2) // 6,) * 3, width=16)
    if name.startswith("wrn"):
        depth, factor = map(int, size.split("_"))
        return preact(cell, se=se, counts=((depth - 4) // 6,) * 3, width=16 * factor, stem_width=16)
    if name.startswith(("resnext", "regnext")):
        depth, _, rest = size.partition("_")
        groups, base = map(int, rest.removesuffix("d").split("x"))
        return grouped(int(depth), groups, base, cell, se=se, counts=IMAGENET_COUNTS[int(depth)])
    if name.startswith("wide"):
        depth, factor = map(int, size.split("_"))
        return grouped(depth, 1, 64 * factor, cell, se=se, counts=IMAGENET_COUNTS[depth])
    if name.startswith("dia"):
        imagenet = int(size) in IMAGENET_COUNTS
        deep = {"bottleneck": True, "counts": (18,) * 3} if size == "164" else {"counts": ((int(size) - 2) // 6,) * 3}
        if imagenet:
            deep = {"bottleneck": True, "imagenet": True, "counts": IMAGENET_COUNTS[int(size)]}
        return dia(**deep)
    if name.startswith("rla"):
        return partial(RLANet, counts=IMAGENET_COUNTS[int(size)])
    return None
