"""Compares the package with the PyTorch reference, with the same weights and inputs, and records the errors.

A comparison raises AssertionError if an error of norms, ‖ours − theirs‖ / ‖theirs‖ of one array, exceeds the bound of
its row in BOUNDS; `pytest --parity-report FILE` writes the largest error of each row.
"""

import functools
import json
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import torch

import torch_reference
from regnet_flax import create_model
from regnet_flax.models import blocks, regnety
from regnet_flax.models.layers import BatchNorm
from regnet_flax.models.regnet import CELLS, RegNet
from regnet_flax.models.regnety import RegNetY
from regnet_flax.port.torch import from_torch, to_torch
from regnet_flax.training.step import cross_entropy

BATCH, CLASSES = 6, 10

# The bounds: what is compared, how, and in which dtype → the largest relative error of norms.
BOUNDS = {
    ("cells, 3 steps", "states", "float32"): 1e-5,
    ("cells, 3 steps", "gradients of parameters, X and state", "float32"): 1e-4,
    ("cells, 3 steps", "states", "float64"): 1e-10,
    ("cells, 3 steps", "gradients of parameters, X and state", "float64"): 1e-10,
    ("blocks", "outputs, evaluation", "float32"): 1e-5,
    ("blocks", "outputs, training", "float32"): 1e-5,
    ("blocks", "gradients of parameters, X and state", "float32"): 1e-3,
    ("blocks", "running statistics", "float32"): 1e-5,
    ("blocks", "outputs, evaluation", "float64"): 1e-10,
    ("blocks", "outputs, training", "float64"): 1e-10,
    ("blocks", "gradients of parameters, X and state", "float64"): 1e-10,
    ("blocks", "running statistics", "float64"): 1e-10,
    ("networks", "logits, evaluation", "float32"): 1e-4,
    ("networks", "logits, training", "float32"): 1e-4,
    ("networks", "gradients", "float32"): 1e-3,
    ("networks", "running statistics", "float32"): 1e-4,
    ("networks", "logits, evaluation", "float64"): 1e-10,
    ("networks", "logits, training", "float64"): 1e-10,
    ("networks", "gradients", "float64"): 1e-8,
    ("networks", "running statistics", "float64"): 1e-10,
    ("ten SGD steps", "loss at each step", "float32"): 1e-3,
    ("ten SGD steps", "parameters after them", "float32"): 1e-3,
    ("ten SGD steps", "loss at each step", "float64"): 1e-10,
    ("ten SGD steps", "parameters after them", "float64"): 1e-9,
    ("cross-entropy, label smoothing too", "value and gradient", "float32"): 1e-5,
    ("cross-entropy, label smoothing too", "value and gradient", "float64"): 1e-10,
    ("schedules, warm-up too", "rates of a run", "float32"): 1e-6,
}
PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "fidelity.md"
BEGIN = (
    "<!-- pytest -n 0 --slow --thorough --parity-report docs/fidelity.md "
    "tests/test_{block_parity,parity,optimizer}.py -->"
)
END = "<!-- end of parity -->"
WHOLE_RUN = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "parity_digits_cpu.json"
ERRORS: dict[tuple[str, str, str], tuple[float, str]] = {}  # the largest of each row, and where


def batch_norm(train, dtype):
    """Makes a batch normalisation like a model."""
    return functools.partial(BatchNorm, use_running_average=not train, dtype=dtype)


def relative(found, expected):
    """Returns ‖found − expected‖ / ‖expected‖."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, f"{found.shape} against {expected.shape}"
    return float(np.linalg.norm(found - expected) / (np.linalg.norm(expected) + 1e-300))


def check(row, found, expected, name=""):
    """Compares one array, and records the error."""
    error = relative(found, expected)
    where = (os.environ.get("PYTEST_CURRENT_TEST", "").split("::")[-1].split(" ")[0] + " " + name).strip()
    if not error <= ERRORS.get(row, (-1.0, ""))[0]:
        ERRORS[row] = error, where
    assert error < BOUNDS[row], f"{', '.join(row)}: {name} is off by {error:.2e}, more than {BOUNDS[row]:g}"


def check_all(row, found, expected):
    """Compares arrays by name; an array of zeros would prove nothing."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.linalg.norm(array) > 0, f"{name} is zero"
        check(row, found[name], array, name)


def write_report(file):
    """Writes the errors as a Markdown table, between the file's markers if it has them, or as the whole file.

    Rows of tests that did not run stay unchanged, so a run of some tests updates only their rows.
    """
    text = file.read_text() if file.exists() else ""
    before = {tuple(line.strip("| ").split(" | ")[:4]): line for line in text.splitlines()}
    lines = ["| compared | | type | at most | largest seen | in |", "| --- " * 6 + "|"]
    for row, bound in BOUNDS.items():
        words = (*row, f"{bound:g}")
        line = before.get(words, f"| {' | '.join(words)} | nan | not run |")
        if row in ERRORS:
            error, where = ERRORS[row]
            line = f"| {' | '.join(words)} | {error:.1e} | `{where}` |"
        lines.append(line)
    if WHOLE_RUN.exists():
        run = json.loads(WHOLE_RUN.read_text())
        for dtype in ("float32", "float64"):
            where = f"`benchmarks/parity_run.py`, step {run[dtype]['at_step']}"
            error = run[dtype]["largest_difference"]
            lines.append(
                f"| {run['steps']} steps on the digits | loss, absolute | {dtype} | – | {error:.1e} | {where} |"
            )
    place = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    table = "\n".join([BEGIN, *lines, END])
    file.write_text(place.sub(lambda _: table, text) if place.search(text) else table + "\n")


def to_nhwc(array):
    """Converts a tensor (N, channels, height, width) to an array (N, height, width, channels)."""
    return array.detach().cpu().numpy().transpose(0, 2, 3, 1)


def to_tensor(array, device):
    """Converts back, to a leaf tensor with a gradient."""
    return torch.tensor(array.transpose(0, 3, 1, 2).copy(), device=device, requires_grad=True)


def arrays(state_dict):
    """Returns the arrays of a state dict or of named gradients."""
    return {name: t.detach().cpu().numpy().copy() for name, t in state_dict.items() if "num_batches" not in name}


def random_variables(shapes, rng, dtype):
    """Draws variables of the same structure; none keeps its initial value."""

    def draw(path, a):
        names = [key.key for key in path]
        if names[-1] == "kernel":
            values = rng.normal(0, math.prod(a.shape[:-1]) ** -0.5, a.shape)
        elif names[-1] == "var" or "se" in names:  # a narrow squeeze may otherwise be dead for every image
            values = rng.uniform(0.5, 1.5, a.shape)
        else:
            values = (names[-1] == "scale") + rng.normal(0, 0.2, a.shape)
        return values.astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def load(module, variables, names):
    """Loads variables into a PyTorch module under the names that `names` gives."""
    state = {name: torch.from_numpy(array) for name, array in names(variables).items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and all("num_batches" in name for name in missing), (missing, unexpected)


def named_within(model, place, prefix):
    """Maps the variables of a part of a model, at `place`, to PyTorch's names, without their `prefix`."""

    def names(variables):
        for key in reversed(place):
            variables = {collection: {key: tree} for collection, tree in variables.items()}
        return {name.removeprefix(prefix): array for name, array in to_torch(variables, model).items()}

    return names


def watch_counts(module):
    """Records N = batch × height × width of the input of each BatchNorm2d of a module when it runs."""
    counts = {}

    def hook(name, _, inputs, output):
        counts[name] = inputs[0].numel() // inputs[0].shape[1]

    for name, part in module.named_modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.register_forward_hook(functools.partial(hook, name))
    return counts


def check_statistics(row, found, before, after, counts):
    """Compares running statistics; corrects PyTorch's update of the unbiased variance by (N − 1) / N."""
    expected = {}
    for key, value in after.items():
        if key.endswith("running_var"):
            n = counts[key.removesuffix(".running_var")]
            value = 0.9 * before[key] + (value - 0.9 * before[key]) * (n - 1) / n
        if "running" in key:
            expected[key] = value
    check_all(row, found, expected)


def compile_for(dtype):
    """Returns jax.jit; float64 checks equations, not XLA's optimisations, and compiles twice as fast without them."""
    quick = dtype == "float64" and jax.default_backend() == "cpu"
    return functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0} if quick else None)


def compare_cell(cell, theirs, names, dtype, device, steps=3):
    """Compares a cell's states over some steps from a random state, and the gradients of a random sum of them.

    Args:
      cell: a Regulator.
      theirs: the reference's cell.
      names: maps {"params": …} to PyTorch's names.
      dtype: "float32" or "float64".
      device: of the reference.
    """
    rng = np.random.default_rng(0)
    shape = (BATCH, 5, 4, cell.features)
    xs = list(rng.normal(size=(steps, *shape)).astype(dtype))
    state = tuple(rng.normal(size=(len(cell.state_names), *shape)).astype(dtype))
    weights = rng.normal(size=(steps, len(state), *shape)).astype(dtype)
    shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), jnp.zeros(shape), cell.initial_state(shape)))
    params = random_variables(shapes, rng, dtype)["params"]

    def ours(params, xs, state):
        states = []
        for x in xs:
            state, _ = cell.apply({"params": params}, x, state)
            states.append(state)
        total = sum(jnp.vdot(w, a) for ws, s in zip(weights, states, strict=True) for w, a in zip(ws, s, strict=True))
        return total, states

    gradient = compile_for(dtype)(jax.grad(ours, argnums=(0, 1, 2), has_aux=True))
    (grads, x_grads, state_grads), states = gradient(params, xs, state)

    theirs = theirs.to(device, getattr(torch, dtype))
    load(theirs, {"params": params}, names)
    t_xs, start = [to_tensor(x, device) for x in xs], tuple(to_tensor(a, device) for a in state)
    t_state, total = start, 0
    kind = "cells, 3 steps"
    for step, x in enumerate(t_xs):
        t_state = theirs(x, t_state)
        for a, w, found, name in zip(t_state, weights[step], states[step], cell.state_names, strict=True):
            total = total + (a * to_tensor(w, device)).sum()
            check((kind, "states", dtype), found, to_nhwc(a), f"{name} of step {step + 1}")
    total.backward()
    row = (kind, "gradients of parameters, X and state", dtype)
    check_all(row, names({"params": grads}), arrays({name: p.grad for name, p in theirs.named_parameters()}))
    inputs = {f"X of step {i + 1}": x for i, x in enumerate(t_xs)} | dict(zip(cell.state_names, start, strict=True))
    found = dict(zip(inputs, [*x_grads, *state_grads], strict=True))
    check_all(row, found, {name: to_nhwc(tensor.grad) for name, tensor in inputs.items()})


def make_block(kind, regulator, options):
    """Makes the block in both frameworks, with the names of its variables.

    Args:
      kind: "basic", "bottleneck" or "regnety".
      regulator: a key of CELLS or None.
      options: kernel, shared, se, shortcut, bottleneck_stride, strides, inputs (channels of X1), and style of the
        reference.

    Returns:
      make(train, dtype) → our block; the reference's block; its shared cell or None; names of the block's variables;
      names of the shared cell's.
    """
    options = {"kernel": "separable", "shared": True, "se": False, "shortcut": "B", "strides": 1} | options
    n, strides, c_in = 4, options["strides"], options["inputs"]
    if kind == "regnety":

        def make_regnety(train, dtype):
            norm = batch_norm(train, dtype)
            return regnety.Block(16, strides, group_width=8, squeezed=round(0.25 * c_in), norm=norm, dtype=dtype)

        names = named_within(RegNetY(), ["stage1_block1"], "trunk_output.block1.block1-0.")
        return make_regnety, torch_reference.RegNetYBlock(c_in, 16, strides), None, names, None

    style, stride_at = options.get("style", torch_reference.PAPER), options.get("bottleneck_stride", "1x1")
    fields = {"regulator": regulator, "kernel": options["kernel"], "share_regulator": options["shared"]}
    fields |= {"normalize_state": "h" if style.norm_h else "none", "replace": not style.fuse}
    model = RegNet(stage_sizes=(1,), block=kind, width=n, stem="cifar", **fields)

    def make(train, dtype):
        cell = None
        if regulator:
            cell = functools.partial(CELLS[regulator], features=n, kernel=options["kernel"], dtype=dtype)
        block = blocks.BasicBlock if kind == "basic" else blocks.BottleneckBlock
        return block(
            features=n,
            norm=batch_norm(train, dtype),
            strides=strides,
            cell=cell,
            normalize_state="h" if style.norm_h else "none",
            replace=not style.fuse,
            squeeze_excite=options["se"],
            shortcut=options["shortcut"],
            stride_at=stride_at,
            dtype=dtype,
        )

    cells = torch_reference.REGULATORS
    make_cell = {"replacing_convgru": torch_reference.RNNProjectConvGRU}.get(regulator)
    if style is torch_reference.RNN and regulator == "convrnn":
        make_cell = torch_reference.RNNProjectConvRNN
    elif regulator in cells:
        make_cell = functools.partial(cells[regulator], kernel=options["kernel"])
    cell = make_cell(n) if make_cell else None
    own = cell if not options["shared"] else None
    their_block = torch_reference.BasicBlock if kind == "basic" else torch_reference.BottleneckBlock
    more = {"bottleneck_stride": stride_at} if kind == "bottleneck" else {}
    settings = {"regulated": regulator is not None, "cell": own, "se": options["se"], "shortcut": options["shortcut"]}
    theirs = their_block(c_in, n, strides, **settings, style=style, **more)
    names = named_within(model, ["stage1", "block1"], "layer1.0.")
    shared_names = named_within(model, ["stage1", "regulator"], "regulator1.")
    return make, theirs, None if own else cell, names, shared_names


def compare_block(kind, regulator, options, dtype, device):
    """Compares a block's outputs in both modes, gradients of a random sum of the training ones, and statistics."""
    make, theirs, t_shared, names, shared_names = make_block(kind, regulator, options)
    rng = np.random.default_rng(0)
    strides, size = options.get("strides", 1), 6
    x = rng.normal(size=(BATCH, size, size, options["inputs"])).astype(dtype)
    inner = (BATCH, size // strides, size // strides, 4)
    state = tuple(rng.normal(size=(len(CELLS[regulator].state_names), *inner)).astype(dtype)) if regulator else ()
    train, evaluation = (make(mode, jnp.dtype(dtype)) for mode in (True, False))

    def apply(block, variables, shared, x, state, **more):
        if kind == "regnety":
            out = block.apply(variables, x, **more)
            return ((out[0], ()), out[1]) if more else (out, ())
        out = block.apply(variables, (x, state), shared, **more)
        return (out[0][0], out[1]) if more else out[0]

    shared = None
    if t_shared is not None:
        cell = CELLS[regulator](4, options.get("kernel", "separable"))
        shapes = jax.eval_shape(lambda: cell.init(jax.random.key(0), jnp.zeros(inner), cell.initial_state(inner)))
        shared = random_variables(shapes, rng, dtype)["params"]
    init = functools.partial(evaluation.init, jax.random.key(0))
    arguments = (x,) if kind == "regnety" else ((x, state), shared)
    variables = random_variables(jax.eval_shape(init, *arguments), rng, dtype)
    output = jax.eval_shape(lambda: apply(evaluation, variables, shared, x, state))[0]
    weights = [rng.normal(size=a.shape).astype(dtype) for a in (output, *state)]

    def loss(params, shared, x, state, batch_stats):
        now = {"params": params, "batch_stats": batch_stats}
        (y, new), updates = apply(train, now, shared, x, state, mutable=["batch_stats"])
        total = sum(jnp.vdot(w, a) for w, a in zip(weights, (y, *new), strict=True))
        return total, ((y, *new), updates["batch_stats"])

    @compile_for(dtype)
    def ours(variables, shared, x, state):
        y, new = apply(evaluation, variables, shared, x, state)
        gradient = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
        return (y, *new), gradient(variables["params"], shared, x, state, variables["batch_stats"])

    in_eval, (grads, (in_train, batch_stats)) = ours(variables, shared, x, state)

    module = torch.nn.ModuleDict({"block": theirs} | ({"shared": t_shared} if t_shared is not None else {}))
    module.to(device, getattr(torch, dtype))
    load(theirs, variables, names)
    if t_shared is not None:
        load(t_shared, {"params": shared}, shared_names)
    before, counts = arrays(theirs.state_dict()), watch_counts(theirs)
    t_x, t_state = to_tensor(x, device), tuple(to_tensor(a, device) for a in state)

    def run():
        if kind == "regnety":
            return (theirs(t_x),)
        y, new = theirs(t_x, t_state or None, t_shared)
        return (y, *(new or ()))

    labels = ["X", "H", "C"]
    with torch.no_grad():
        module.eval()
        for label, found, expected in zip(labels, in_eval, run(), strict=False):
            check(("blocks", "outputs, evaluation", dtype), found, to_nhwc(expected), label)
    outputs = module.train() and run()
    assert len(outputs) == len(in_eval) == len(in_train)
    for label, found, expected in zip(labels, in_train, outputs, strict=False):
        check(("blocks", "outputs, training", dtype), found, to_nhwc(expected), label)
    sum((a * to_tensor(w, device)).sum() for a, w in zip(outputs, weights, strict=True)).backward()
    row = ("blocks", "gradients of parameters, X and state", dtype)
    check_all(row, names({"params": grads[0]}), arrays({k: p.grad for k, p in theirs.named_parameters()}))
    if t_shared is not None:
        expected = arrays({k: p.grad for k, p in t_shared.named_parameters()})
        check_all(row, shared_names({"params": grads[1]}), expected)
    inputs = dict(zip(labels, (t_x, *t_state), strict=False))
    found = dict(zip(labels, (grads[2], *grads[3]), strict=False))
    check_all(row, found, {name: to_nhwc(tensor.grad) for name, tensor in inputs.items()})
    row = ("blocks", "running statistics", dtype)
    check_statistics(row, names({"batch_stats": batch_stats}), before, arrays(theirs.state_dict()), counts)


def create(name, options, **more):
    """Makes our model; `stage_sizes`, or RegNetY's `depth`, may differ from the name."""
    options = {key: value for key, value in options.items() if key != "in_channels"}
    sizes = {key: options.pop(key) for key in ("stage_sizes", "depth") if key in options}
    return create_model(name, num_classes=CLASSES, **options, **more).clone(**sizes)


def randomized(model):
    """Randomizes a PyTorch model: batch normalisations are not the identity, and squeezes are dead for no image."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
            torch.nn.init.normal_(module.running_mean, 0.0, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.uniform_(module.bias, 0.5, 1.0)
    return model


def reference(name, options, seed=0):
    """Makes the PyTorch model, randomized."""
    torch.manual_seed(seed)
    options = {"counts" if key == "stage_sizes" else key: value for key, value in options.items()}
    model = torch_reference.build(name, num_classes=CLASSES, **options)
    return randomized(model)


def compare_network(name, options, dtype, device, size, seed=0, train=True):
    """Compares a network's logits in both modes, gradients of the cross-entropy, and updated running statistics.

    Args:
      name, options: see `create`.
      dtype: "float32" or "float64".
      device: of the reference.
      size: height and width of the images.
      seed: for weights and images.
      train: False compares only the logits in evaluation.
    """
    theirs = reference(name, options, seed).to(device, getattr(torch, dtype))
    before, counts = arrays(theirs.state_dict()), watch_counts(theirs)
    rng = np.random.default_rng(seed + 1)
    images = rng.normal(size=(BATCH, size, size, 3)).astype(dtype)
    labels = rng.integers(0, CLASSES, BATCH)
    unroll = {} if name.startswith("regnety") else {"unroll": 1}  # a rolled loop compiles faster
    model = create(name, options, dtype=jnp.dtype(dtype), **unroll)
    variables = from_torch(before, model)

    def loss(params, batch_stats, images):
        now = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(now, images, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, jnp.asarray(labels)).mean(), (logits, updates["batch_stats"])

    @compile_for(dtype)
    def ours(variables, images):
        in_eval = model.apply(variables, images, train=False)
        gradient = jax.grad(loss, has_aux=True)
        return in_eval, gradient(variables["params"], variables["batch_stats"], images) if train else None

    in_eval, in_training = ours(variables, images)

    inputs, targets = to_tensor(images, device), torch.tensor(labels, device=device)
    with torch.no_grad():
        expected = theirs.eval()(inputs).cpu().numpy()
    check(("networks", "logits, evaluation", dtype), in_eval, expected)
    if in_training is None:
        return
    grads, (in_train, batch_stats) = in_training
    logits = theirs.train()(inputs)
    check(("networks", "logits, training", dtype), in_train, logits.detach().cpu().numpy())
    torch.nn.functional.cross_entropy(logits, targets).backward()
    expected = arrays({key: p.grad for key, p in theirs.named_parameters()})
    check_all(("networks", "gradients", dtype), to_torch({"params": grads}, model), expected)
    found = to_torch({"batch_stats": batch_stats}, model)
    check_statistics(("networks", "running statistics", dtype), found, before, arrays(theirs.state_dict()), counts)
