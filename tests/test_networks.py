"""The other families against their PyTorch references, in float64; parameter counts; the start from a plain network.

One small network per family by default, and the cross product with --thorough.
"""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import torch_networks
from comparison import BATCH, CLASSES, arrays, compile_for, random_variables, randomized, relative, to_tensor
from regnet_flax import create_model, list_models
from regnet_flax.analysis.summary import count_parameters, summarize
from regnet_flax.data.augment import normalize
from regnet_flax.models.regulators import REGULATORS, ConvRNN
from regnet_flax.modes.export import stablehlo
from regnet_flax.port.torch import bottleneck_stride, from_torch, to_torch
from regnet_flax.training.step import cross_entropy
from torch_networks import dia, grouped, preact, reference

COUNTS = [  # from the papers or osmr/imgclsmob's table
    ("preact_resnet20", 10, 272_282),
    ("preact_resnet56", 10, 855_578),
    ("wrn28_10", 10, 36_479_194),
    ("resnext50_32x4d", 1000, 25_028_904),
    ("dia_resnet20", 10, 286_866),
    ("dia_resnet56", 10, 870_162),
    ("dia_resnet164", 100, 1_946_132),  # the table has it with 100 classes
    ("rla_resnet50", 1000, 25_557_032 + 313_664),
    pytest.param("rla_resnet101", 1000, 44_549_160 + 454_016, marks=pytest.mark.thorough),
]


def shapes(model, size=32):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), train=False))


@pytest.mark.parametrize("name, classes, count", COUNTS)
def test_parameter_counts(name, classes, count):
    model = create_model(name, num_classes=classes)
    assert count_parameters(shapes(model)["params"]) == count


def compare(model, make, size, parity):
    """Compares logits in both modes, gradients and running statistics, in float64.

    Args:
      model: a model with CLASSES classes.
      make: makes its reference, given the number of classes.
      size: height and width of the images.
    """
    with parity("float64") as device:
        torch.manual_seed(0)
        theirs = randomized(make(CLASSES)).to(device, torch.float64)
        before, calls = arrays(theirs.state_dict()), {}

        def called(name, module, inputs, _):
            if module.training:
                calls[name] = calls.get(name, (0, 0))[0] + 1, inputs[0].numel() // inputs[0].shape[1]

        for name, module in theirs.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.register_forward_hook(functools.partial(called, name))
        rng = np.random.default_rng(1)
        images, labels = rng.normal(size=(BATCH, size, size, 3)), rng.integers(0, CLASSES, BATCH)
        model = model.clone(dtype=jnp.float64, **({"unroll": 1} if hasattr(model, "unroll") else {}))
        variables = from_torch(before, model)

        def loss(params, variables):
            variables = variables | {"params": params}
            logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return cross_entropy(logits, jnp.asarray(labels)).mean(), (logits, updates["batch_stats"])

        @compile_for("float64")
        def ours(variables):
            gradient = jax.grad(loss, has_aux=True)(variables["params"], variables)
            return model.apply(variables, images, train=False), gradient

        in_eval, (grads, (in_train, statistics)) = ours(variables)
        inputs = to_tensor(images, device)
        with torch.no_grad():
            assert relative(in_eval, theirs.eval()(inputs).cpu().numpy()) < 1e-10
        logits = theirs.train()(inputs)
        assert relative(in_train, logits.detach().cpu().numpy()) < 1e-10
        torch.nn.functional.cross_entropy(logits, torch.tensor(labels, device=device)).backward()
        found = to_torch({"params": grads}, model)
        # Nothing uses the LSTM's C of a stage's last block.
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
        expected = arrays(gradients)
        assert found.keys() == expected.keys()
        # A gradient that is zero up to rounding, such as of a bias before a BN, has no meaningful relative error.
        largest = max(map(np.linalg.norm, expected.values()))
        wrong = {k: np.linalg.norm(found[k] - a) / (np.linalg.norm(a) + 1e-3 * largest) for k, a in expected.items()}
        assert max(wrong.values()) < 1e-10, max(wrong.items(), key=lambda item: item[1])
        after, found = arrays(theirs.state_dict()), to_torch({"batch_stats": statistics}, model)
        for name, array in found.items():
            expected = after[name]
            if name.endswith("running_var"):  # PyTorch divides by N − 1
                times, n = calls[name.removesuffix(".running_var")]
                old = 0.9**times * before[name]
                expected = old + (expected - old) * (n - 1) / n
            assert relative(array, expected) < 1e-10, name


SMALL = {"width": 4, "stage_sizes": (3, 1)}  # the first stage has a scan, the second does not


def network(name, **fields):
    options = {key: fields.pop(key) for key in ("width", "shortcut", "share_regulator", "kernel") if key in fields}
    return create_model(name, num_classes=CLASSES, **options).clone(**fields)


def cases():
    """Yields (id, model, reference, image size), first the ones that run without --thorough."""
    counts = {"counts": (3, 1), "width": 4}
    few = {"groups": 2, "width_per_group": 64}
    yield "preact", network("se_preact_regnet20_convlstm", **SMALL), preact("convlstm", se=True, **counts), 8
    fields, two = SMALL | few | {"stage_sizes": (1, 2)}, counts | {"counts": (1, 2)}
    yield "resnext", network("se_regnext50_32x4d_convrnn", **fields), grouped(50, 2, 64, "convrnn", se=True, **two), 32
    yield "dia", network("dia_resnet20", **SMALL), dia(**counts), 8
    yield "rla", network("rla_resnet50", **SMALL), functools.partial(torch_networks.RLANet, **counts), 42
    for cell, se in itertools.product((None, "convrnn", "convgru", "convlstm"), (False, True)):
        prefix, end = "se_" if se else "", f"_{cell}" if cell else ""
        for kind, make, size in (
            (f"{'preact_regnet' if cell else 'preact_resnet'}20", preact(cell, se=se, **counts), 8),
            ("wrn16_2", preact(cell, se=se, **counts | {"stem_width": 16, "width": 8}), 8),
            (f"{'regnext' if cell else 'resnext'}50_32x4d", grouped(50, 32, 4, cell, se=se, **counts), 32),
            (f"wide_{'regnet' if cell else 'resnet'}50_2", grouped(50, 1, 128, cell, se=se, **counts), 32),
        ):
            fields = SMALL | ({"width": 8} if kind.startswith("wrn") else {})
            yield f"{prefix}{kind}{end}", network(f"{prefix}{kind}{end}", **fields), make, size
    yield "preact-A", network("preact_resnet20", shortcut="A", **SMALL), preact(shortcut="A", **counts), 8
    yield "dia164", network("dia_resnet164", **SMALL), dia(bottleneck=True, **counts), 8
    yield "dia50", network("dia_resnet50", **SMALL), dia(bottleneck=True, imagenet=True, **counts), 32
    own = {"share_regulator": False}
    yield "dia-own", network("dia_resnet20", **own, **SMALL), dia(**own, **counts), 8
    yield "preact-own", network("preact_regnet20_convgru", **own, **SMALL), preact("convgru", **own, **counts), 8
    dense = {"kernel": "dense"}
    yield "preact-dense", network("preact_regnet20_convrnn", **dense, **SMALL), preact("convrnn", **dense, **counts), 8


ALWAYS = ("preact", "resnext", "dia", "rla")


@pytest.mark.parametrize(
    "model, make, size",
    [pytest.param(*case, id=name, marks=() if name in ALWAYS else pytest.mark.thorough) for name, *case in cases()],
)
def test_network(model, make, size, parity):
    compare(model, make, size, parity)


FURTHER = [name for name in list_models() if reference(name) is not None]
PLAIN = [name for name in FURTHER if not name.startswith("se_") and "_conv" not in name]


def sizes(state):
    """Returns a state dict's stem width, and each stage's number of blocks and first convolution's outputs."""
    blocks = {match.groups() for key in state if (match := re.match(r"layer(\d)\.(\d+)\.", key))}
    counts = collections.Counter(stage for stage, _ in blocks)
    inner = [len(state[f"layer{stage}.0.conv1.weight"]) for stage in sorted(counts)]
    return len(state["conv1.weight"]), tuple(counts[stage] for stage in sorted(counts)), inner


def test_every_plain_name_has_its_references_size():
    for name in PLAIN:
        with torch.device("meta"):
            state = reference(name)(CLASSES).state_dict()
        model = create_model(name, num_classes=CLASSES)
        groups, width = getattr(model, "groups", 1), getattr(model, "width_per_group", 64)
        inner = [groups * width * model.width * 2**stage // 64 for stage in range(len(model.stage_sizes))]
        assert sizes(state) == (model.stage_info[0].channels, model.stage_sizes, inner), name


@pytest.mark.thorough
def test_every_name_has_a_reference_of_the_same_names_and_shapes():
    for name in FURTHER:
        with torch.device("meta"):
            state = reference(name)(CLASSES).state_dict()
        wanted = {key: np.broadcast_to(np.float32(0), tuple(t.shape)) for key, t in state.items()}
        model = create_model(name, num_classes=CLASSES)
        from_torch(wanted, model.clone(scan=False) if hasattr(model, "scan") else model)


@pytest.mark.parametrize(
    "names",
    [["regnext50_32x4d_convrnn", "dia_resnet20", "rla_resnet50"], pytest.param(FURTHER, marks=pytest.mark.thorough)],
    ids=len,
)
def test_parameters_and_multiply_adds_are_pytorchs(names):
    """The references run only on shapes; a multiply-add is two of PyTorch's FLOPs."""
    for name in names:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            theirs = reference(name)(CLASSES)
            theirs(torch.empty(1, 3, 64, 64))
        parts = summarize(create_model(name, num_classes=CLASSES), (64, 64, 3))
        assert sum(part.parameters for part in parts) == sum(p.numel() for p in theirs.parameters()), name
        assert 2 * sum(part.multiply_adds for part in parts) == counter.get_total_flops(), name


@pytest.mark.parametrize("name", ["resnext50_32x4d", "wide_resnet50_2"])
def test_torchvisions_weights_give_its_logits(name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = randomized(getattr(torchvision.models, name)(num_classes=CLASSES)).eval()
    model = create_model(name, num_classes=CLASSES)
    assert bottleneck_stride(model) == "3x3"
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    logits = jax.jit(model.apply)(from_torch(arrays(theirs.state_dict()), model), images)
    with torch.no_grad():
        assert relative(logits, theirs(to_tensor(images, "cpu")).numpy()) < 1e-4


@pytest.mark.parametrize(
    "name, words",
    [
        ("preact_resnet21", r"depth 6m\+2 \(nearest: 20 or 26\)"),
        ("wrn28", "unknown model 'wrn28': the closest names are"),
        ("wrn26_10_convgru", r"depth 6m\+4 \(nearest: 22 or 28\)"),
        ("resnext34_32x4d", "resnext50_32x4d"),
        ("se_dia_resnet20", "dia_resnet20"),
        ("dia_resnet21", r"depth 6m\+2"),
        ("wrn16_0", "16_0 has a 0"),
        ("resnext50_0x4d", "50_0x4d has a 0"),
        ("wide_resnet50_0", "50_0 has a 0"),
    ],
)
def test_unknown_names(name, words):
    with pytest.raises(ValueError, match=words):
        create_model(name)


def test_sizes_and_cells_that_are_not_listed_are_accepted_by_name(monkeypatch):
    monkeypatch.setitem(REGULATORS, "leaky", ConvRNN)
    assert create_model("se_regnext50_32x4d_leaky").regulator == "leaky"
    assert create_model("wrn22_4_convgru").stage_sizes == (3, 3, 3)
    assert create_model("se_preact_regnet56_convrnn").stage_sizes == (9, 9, 9)
    assert create_model("resnext50_16x8d").groups == 16
    assert create_model("wide_resnet50_4").width_per_group == 256
    assert create_model("dia_resnet26").stage_sizes == (4, 4, 4)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["preact_regnet20_convlstm", "se_regnext50_32x4d_convgru", "dia_resnet20", "rla_resnet50"]
)
def test_exported_as_a_program(name):
    model = network(name, **SMALL)
    variables = random_variables(shapes(model), np.random.default_rng(0), np.float32)
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)
    program = jax.export.deserialize(bytearray(stablehlo(model, variables, (32, 32, 3), mean, std)))
    expected = jax.jit(model.apply)(variables, normalize(images, mean, std))
    assert relative(program.call(images), expected) < 1e-5
