"""The CIFAR networks in PyTorch, written for speed: versus_torch.py measures the package against them.

State-dict names and values are those of tests/torch_reference.py, which is written for readability;
tests/test_torch_peer.py compares the two. The optimisations:

- A separable gate's preactivation has several forms (FORMS); none repeats or interleaves X and H.
- The first block of a stage has no state, so products with it and the forget and reset gates are skipped.
- ReLUs work in place on fresh arrays, and products and sums are combined (addcmul, lerp).
- SGD updates all parameters in one call (`fused`), gradients are dropped instead of zeroed, and inference runs in
  inference mode, compiled with frozen weights if requested: batch normalisations are then folded into convolutions.
"""

import functools
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor_config


def _pair(x, h, weight):
    """Returns x ⊙ w_x + h ⊙ w_h of one gate; `weight` is (n, 2, 1, 1), a missing h is zero."""
    y = x * weight[:, 0:1, :, 0]
    return y if h is None else torch.addcmul(y, h, weight[:, 1:2, :, 0])


def per_gate(x, h, pointwise, depthwise, bias):
    """Computes each gate's pairs by multiplication and addition, with one depthwise convolution per gate."""
    parts = zip(pointwise, depthwise, bias, strict=True)
    return [F.conv2d(_pair(x, h, w), k, b, padding=1, groups=x.shape[1]) for w, k, b in parts]


def all_gates(x, h, pointwise, depthwise, bias):
    """Puts the pairs of all gates side by side into one depthwise convolution."""
    pairs = torch.cat([_pair(x, h, w) for w in pointwise], 1)
    kernel = torch.cat(list(depthwise))
    return F.conv2d(pairs, kernel, torch.cat(list(bias)), padding=1, groups=len(kernel)).chunk(len(bias), 1)


def folded(x, h, pointwise, depthwise, bias):
    """Folds the pair's weights into the depthwise kernel: one convolution of X and one of H per gate."""
    n, found = x.shape[1], []
    for w, k, b in zip(pointwise, depthwise, bias, strict=True):
        y = F.conv2d(x, k * w[:, :1], b, padding=1, groups=n)
        found.append(y if h is None else y + F.conv2d(h, k * w[:, 1:], padding=1, groups=n))
    return found


FORMS = {"per gate": per_gate, "all gates": all_gates, "folded": folded}


class Cell(nn.Module):
    """`cell(x, state) -> state`, a tuple with H first; state None means zeros. Row g·n + c is gate g, channel c."""

    gates: int

    def __init__(self, n, form):
        super().__init__()
        rows = self.gates * n
        self.n, self.form = n, FORMS[form]
        self.pointwise = nn.Conv2d(2 * n, rows, 1, groups=n, bias=False)  # both only hold weights
        self.depthwise = nn.Conv2d(rows, rows, 3, padding=1, groups=rows)

    def preactivations(self, x, h, *gates):
        """Returns W_g[X, H] + b_g of each of `gates`."""
        parameters = self.pointwise.weight, self.depthwise.weight, self.depthwise.bias
        rows = ([whole.split(self.n)[g] for g in gates] for whole in parameters)
        return self.form(x, h, *rows)


class ConvRNN(Cell):
    gates = 1

    def forward(self, x, state):
        (y,) = self.preactivations(x, None if state is None else state[0], 0)
        return (torch.tanh(y),)


class ConvGRU(Cell):
    gates = 3

    def forward(self, x, state):
        if state is None:
            z, y = self.preactivations(x, None, 0, 2)
            return (torch.sigmoid(z) * torch.tanh(y),)
        (h,) = state
        z, r = self.preactivations(x, h, 0, 1)
        (y,) = self.preactivations(x, torch.sigmoid(r) * h, 2)
        return (torch.lerp(h, torch.tanh(y), torch.sigmoid(z)),)


class ConvLSTM(Cell):
    gates = 4

    def forward(self, x, state):
        if state is None:
            i, o, g = self.preactivations(x, None, 0, 2, 3)
            c = torch.sigmoid(i) * torch.tanh(g)
        else:
            i, f, o, g = self.preactivations(x, state[0], 0, 1, 2, 3)
            c = torch.addcmul(torch.sigmoid(i) * torch.tanh(g), torch.sigmoid(f), state[1])
        return torch.sigmoid(o) * torch.tanh(c), c


CELLS = {"convrnn": ConvRNN, "convgru": ConvGRU, "convlstm": ConvLSTM}


def conv(c_in, c_out, size, stride=1):
    return nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    """`block(x, state, cell) -> (y, state)`; `cell` is its stage's regulator, or None."""

    def __init__(self, c_in, n, stride, regulated):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, n, 3, stride), nn.BatchNorm2d(n)
        if regulated:
            self.bn_h = nn.BatchNorm2d(n)
            self.conv_fuse, self.bn_fuse = conv(2 * n, n, 1), nn.BatchNorm2d(n)
        self.conv2, self.bn2 = conv(n, n, 3), nn.BatchNorm2d(n)
        path = nn.Sequential(conv(c_in, n, 1, stride), nn.BatchNorm2d(n))
        self.shortcut = nn.Identity() if (c_in, stride) == (n, 1) else path

    def forward(self, x, state, cell):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if cell is not None:
            h, *rest = cell(y, state)
            h = F.relu(self.bn_h(h), inplace=True)
            y = F.relu(self.bn_fuse(self.conv_fuse(torch.cat([y, h], 1))), inplace=True)
            state = (h, *rest)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True), state


class Network(nn.Module):
    """Stem, three stages of blocks, global mean, linear head: (batch, 3, height, width) → logits (batch, classes)."""

    def __init__(self, classes, counts, width, cell, form):
        super().__init__()
        self.conv1, self.bn1 = conv(3, width, 3), nn.BatchNorm2d(width)
        channels = width
        for s, count in enumerate(counts):
            n = width * 2**s
            if cell is not None:
                self.add_module(f"regulator{s + 1}", CELLS[cell](n, form))
            blocks = nn.ModuleList()
            for j in range(count):
                blocks.append(Block(channels, n, 2 if s and not j else 1, cell is not None))
                channels = n
            self.add_module(f"layer{s + 1}", blocks)
        self.linear, self.stages = nn.Linear(channels, classes), len(counts)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for s in range(1, self.stages + 1):
            state, cell = None, getattr(self, f"regulator{s}", None)
            for block in getattr(self, f"layer{s}"):
                x, state = block(x, state, cell)
        return self.linear(x.mean((2, 3)))


def build(name, classes=10, form="per gate", width=16, counts=None):
    """Builds `resnet{6m+2}` or `regnet{6m+2}_{convrnn,convgru,convlstm}`, with one separable regulator per stage.

    Raises:
        ValueError: it is any other name.
    """
    match = re.fullmatch(r"resnet(\d+)|regnet(\d+)_(convrnn|convgru|convlstm)", name)
    depth = int(match[1] or match[2]) if match else 0
    if depth % 6 != 2:
        raise ValueError(f"{name!r} has no PyTorch peer; resnet20 and regnet20_convgru have, and other depths 6m + 2")
    return Network(classes, counts or ((depth - 2) // 6,) * 3, width, match[3], form)


def calls(model, batch, size, dtype, tasks, threads, form="per gate", channels_last=False, mode="eager"):
    """Returns functions by task ("train", "infer") that each start one step on data on the device, a function that
    waits for the last of them, and facts. `mode` is "eager", "compiled", or "graphs" (compiled, with CUDA graphs).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads:
        torch.set_num_threads(threads)
    if device == "cuda":
        inductor_config.autotune_local_cache = False  # processes that compile at once would time each other
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32, which XLA uses by default on GPUs that have it
        torch.backends.cudnn.allow_tf32 = True
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = build(model, form=form).to(device).to(memory_format=layout)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=layout)
    labels = torch.arange(batch, device=device) % 10
    options = {"mode": "reduce-overhead"} if mode == "graphs" else {}
    translate = functools.partial(torch.compile, **options) if mode != "eager" else lambda function: function
    forward, loss_of = translate(network), translate(lambda x, y: F.cross_entropy(network(x), y))
    cast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)

    def train():
        sgd.zero_grad(set_to_none=True)
        with cast:
            loss = loss_of(images, labels)
        loss.backward()
        sgd.step()

    def infer():
        with torch.inference_mode(), cast:
            forward(images)

    if "train" not in tasks:
        network.eval()
        inductor_config.freezing = True  # only takes effect without gradients
    found = {"train": train, "infer": infer}
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return {task: found[task] for task in tasks}, lambda _: wait(), {"device": name, "torch": torch.__version__}
