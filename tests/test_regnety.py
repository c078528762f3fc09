"""RegNetY-400MF equals torchvision's: names and parameters, and outputs if torchvision is installed."""

import jax
import numpy as np
import pytest
import torch

import comparison
import torch_reference
from comparison import arrays, check
from regnet_flax import create_model
from regnet_flax.analysis.summary import count_parameters
from regnet_flax.port.torch import from_torch, to_torch


def torchvisions_names():
    """Lists the names of torchvision/models/regnet.py and ops/misc.py: Conv2dNormActivation is (0) conv, (1) BN."""

    def conv_bn(prefix):
        yield f"{prefix}.0.weight"
        yield from (f"{prefix}.1.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var"))

    yield from conv_bn("stem")
    for stage, depth in ((1, 1), (2, 3), (3, 6), (4, 6)):
        for index in range(depth):
            block = f"trunk_output.block{stage}.block{stage}-{index}"
            if index == 0:  # SimpleStemIN and each stage halve the image, which changes the shape
                yield from conv_bn(f"{block}.proj")
            for part in "abc":
                yield from conv_bn(f"{block}.f.{part}")
            yield from (f"{block}.f.se.{fc}.{leaf}" for fc in ("fc1", "fc2") for leaf in ("weight", "bias"))
    yield from ("fc.weight", "fc.bias")


def test_names_and_parameters():
    model = create_model("regnety_400mf", num_classes=1000)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    assert count_parameters(shapes["params"]) == 4_344_144
    exported = to_torch(jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes), model)
    assert set(exported) == set(torchvisions_names())
    state = torch_reference.build("regnety_400mf", 1000).state_dict()
    assert {name: tuple(array.shape) for name, array in arrays(state).items()} == {
        name: array.shape for name, array in exported.items()
    }


def test_outputs_are_torchvisions(parity):
    """In evaluation, with initial weights, and statistics updated by one training batch."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    with parity("float32") as device:
        theirs = models.regnet_y_400mf(num_classes=comparison.CLASSES).to(device)
        images = np.random.default_rng(0).normal(size=(4, 96, 96, 3)).astype("f")
        inputs = comparison.to_tensor(images, device)
        with torch.no_grad():
            theirs.train()(inputs)
            expected = theirs.eval()(inputs).cpu().numpy()
        model = create_model("regnety_400mf", num_classes=comparison.CLASSES)
        variables = from_torch(arrays(theirs.state_dict()), model)
        found = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
        check(("networks", "logits, evaluation", "float32"), found, expected)
