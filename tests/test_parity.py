"""Whole networks against the PyTorch reference, on random weights and running statistics.

Outputs in float32; gradients and updated statistics in float64, where rounding turns no ReLU and hides nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import torch_reference
from regnet_flax import create_model
from regnet_flax.models.registry import MODELS
from regnet_flax.torch_port import from_torch, to_torch
from regnet_flax.training.optimizer import make_optimizer, make_schedule
from regnet_flax.training.steps import create_train_state, cross_entropy, train_step

BATCH, CLASSES = 6, 10
TOLERANCE = 1e-8  # of norms, relative
WHOLE = [  # at their own depth
    ("resnet20", {}),
    ("regnet20_convlstm", {}),
    ("regnet50_convrnn", {"width": 4}),
    ("regnet_proj_cifar", {"width": 8}),
    ("regnet_proj_imagenet", {"width": 4}),
    ("resnet_rnn20_convrnn", {"width": 8}),
    ("resnet_rnn20_convgru", {"width": 8}),
    ("regnety_400mf", {}),
]
OPTIONS = [
    ("regnet14_convrnn", {"kernel": "dense"}),
    ("regnet14_convgru", {"kernel": "dense", "share_regulator": False}),
    ("regnet14_convlstm", {"kernel": "dense", "shortcut": "A"}),
    ("regnet14_convlstm", {"share_regulator": False, "regulated_stages": (1, 3)}),
    ("se_resnet14", {"shortcut": "A"}),
    ("resnet50", {"width": 4, "bottleneck_stride": "3x3", "stage_sizes": (2, 2)}),
]


def kind(name):
    """All that makes a registered model but its depth and width."""
    make = MODELS[name]
    return make.func, tuple(sorted((k, v) for k, v in make.keywords.items() if k not in ("stage_sizes", "width")))


# One model of every kind in the registry, so that none can be added without a comparison; two stages of two blocks.
_named = {kind(name) for name, _ in WHOLE}
KINDS = [
    (name, {"width": 4, "stage_sizes": (2, 2)})
    for name in {kind(name): name for name in MODELS if kind(name) not in _named}.values()
]
CASES = WHOLE + OPTIONS + KINDS


def is_imagenet(name):
    return getattr(create_model(name), "stem", "imagenet") == "imagenet"


def create(name, options, **more):
    """Our model; `stage_sizes` may be other than the name says."""
    options = dict(options)
    sizes = options.pop("stage_sizes", None)
    model = create_model(name, num_classes=CLASSES, **options, **more)
    return model.clone(stage_sizes=sizes) if sizes else model


def reference(name, options, seed=0):
    """The PyTorch model, with batch normalisations that are not the identity."""
    torch.manual_seed(seed)
    options = {"counts" if key == "stage_sizes" else key: value for key, value in options.items()}
    model = torch_reference.build(name, num_classes=CLASSES, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
            torch.nn.init.normal_(module.running_mean, 0.0, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, torch.nn.Linear):  # else a narrow squeeze may be dead to every image
            torch.nn.init.uniform_(module.bias, 0.5, 1.0)
    return model


def arrays(state_dict):
    return {name: t.detach().numpy().copy() for name, t in state_dict.items() if "num_batches" not in name}


def relative(a, b):
    return float(np.linalg.norm(a.astype(np.float64) - b) / (np.linalg.norm(b) + 1e-12))


def statistics_count(name, options, size, key):
    """batch × height × width of what a batch normalisation of the reference sees."""
    first, block, *rest = key.split(".")
    if name.startswith("regnety"):
        stage = int(block.removeprefix("block")) if first == "trunk_output" else 0
        before = stage and rest[0].endswith("-0") and rest[2] == "a"  # before the stride
        return BATCH * (size // 2 ** (stage + (not before))) ** 2
    if name == "regnet_proj_cifar" and first != "bn1":
        size //= 2
    if is_imagenet(name):
        size = size // 2 if first == "bn1" else size // 4
    if first.startswith("layer"):
        stage = int(first.removeprefix("layer"))
        size //= 2 ** (stage - 1)
        if options.get("bottleneck_stride") == "3x3" and stage > 1 and block == "0" and rest[0] == "bn1":
            size *= 2  # before the stride
    return BATCH * size * size


def batch(name, dtype):
    size = 32 if is_imagenet(name) else 16
    rng = np.random.default_rng(1)
    return rng.normal(size=(BATCH, 3, size, size)).astype(dtype), rng.integers(0, CLASSES, BATCH)


def nhwc(images):
    return jnp.asarray(images.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name, options", WHOLE + OPTIONS)
def test_logits_in_float32(name, options):
    theirs = reference(name, options).eval()
    ours = create(name, options)
    variables = from_torch(arrays(theirs.state_dict()), ours)
    images, _ = batch(name, np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images)).numpy()
    logits = jax.jit(lambda v, x: ours.apply(v, x, train=False))(variables, nhwc(images))
    assert relative(np.asarray(logits), expected) < 1e-4


@pytest.mark.parametrize("name, options", CASES)
def test_training_in_float64(name, options):
    theirs = reference(name, options).double().train()
    before = arrays(theirs.state_dict())
    images, labels = batch(name, np.float64)
    expected = theirs(torch.from_numpy(images))
    torch.nn.functional.cross_entropy(expected, torch.from_numpy(labels)).backward()
    gradients = {key: p.grad.numpy() for key, p in theirs.named_parameters()}

    with jax.enable_x64(True):
        ours = create(name, options, dtype=jnp.float64)
        variables = from_torch(before, ours)

        def loss_fn(params):
            variables_ = variables | {"params": params}
            logits, updates = ours.apply(variables_, nhwc(images), train=True, mutable=["batch_stats"])
            return cross_entropy(logits, jnp.asarray(labels)).mean(), (logits, updates["batch_stats"])

        grads, (logits, batch_stats) = jax.jit(jax.grad(loss_fn, has_aux=True))(variables["params"])
    assert relative(np.asarray(logits), expected.detach().numpy()) < TOLERANCE
    found = to_torch({"params": grads}, ours)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert np.linalg.norm(gradient) > 0 and relative(found[key], gradient) < TOLERANCE, key

    after = arrays(theirs.state_dict())
    for key, value in to_torch({"batch_stats": batch_stats}, ours).items():
        new = after[key]
        if key.endswith("running_var"):  # PyTorch keeps the unbiased variance, Flax the biased one
            count = statistics_count(name, options, images.shape[-1], key)
            new = 0.9 * before[key] + (new - 0.9 * before[key]) * (count - 1) / count
        assert relative(value, new) < TOLERANCE, key


@pytest.mark.parametrize("name, options", [*CASES, ("resnet20", {"in_channels": 1})])
def test_names_both_ways(name, options):
    state = arrays(reference(name, options).state_dict())
    options = {key: value for key, value in options.items() if key != "in_channels"}
    for scan in (True, False):
        model = create(name, options, scan=None if name.startswith("regnety") else scan)
        back = to_torch(from_torch(state, model), model)
        assert back.keys() == state.keys()
        for key, value in state.items():
            np.testing.assert_array_equal(back[key], value)


def test_entries_that_do_not_fit_are_listed():
    model = create_model("resnet20")
    state = arrays(reference("resnet20", {}).state_dict())
    del state["layer1.2.bn1.running_mean"]
    state["extra.weight"] = np.zeros(3)
    state["linear.bias"] = np.zeros(7)
    state["bn1.num_batches_tracked"] = np.zeros(())
    with pytest.raises(ValueError) as error:
        from_torch(state, model)
    for words in (
        "missing: layer1.2.bn1.running_mean",
        "left over: extra.weight",
        "linear.bias has shape (7,)",
    ):
        assert words in str(error.value)
    assert "tracked" not in str(error.value)


def test_the_photo_notebooks_head_is_read():
    model = create_model("resnet20")
    state = arrays(reference("resnet20", {}).state_dict())
    renamed = {key.replace("linear.", "fc."): value for key, value in state.items()}
    a, b = from_torch(state, model), from_torch(renamed, model)
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("name, options", [("resnet14", {}), ("regnet14_convlstm", {}), ("resnet_rnn20_convgru", {})])
def test_ten_sgd_steps_in_float64(name, options):
    """Momentum, weight decay and a step of the schedule: the losses on the way and the parameters at the end."""
    options = options | {"width": 4}
    theirs = reference(name, options).double().train()
    with jax.enable_x64(True):
        ours = create(name, options, dtype=jnp.float64)
        schedule = make_schedule("step", 0.1, epochs=1, steps_per_epoch=10, boundaries=(0.5,))
        tx = make_optimizer(schedule, momentum=0.9, weight_decay=1e-2)
        state = create_train_state(from_torch(arrays(theirs.state_dict()), ours), tx)
        step = jax.jit(functools.partial(train_step, apply_fn=ours.apply, tx=tx))
        sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        rng = np.random.default_rng(2)
        for index in range(10):
            images, labels = rng.normal(size=(BATCH, 3, 8, 8)), rng.integers(0, CLASSES, BATCH)
            before = float(state.sums["loss"])
            sums = {key: value.astype(jnp.float64) for key, value in state.sums.items()}
            state = step(state.replace(sums=sums), {"images": nhwc(images), "labels": jnp.asarray(labels)})

            sgd.param_groups[0]["lr"] = float(schedule(index))
            sgd.zero_grad()
            loss = torch.nn.functional.cross_entropy(theirs(torch.from_numpy(images)), torch.from_numpy(labels))
            loss.backward()
            sgd.step()
            assert float(state.sums["loss"]) - before == pytest.approx(loss.item(), rel=1e-7), index
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.01)
    found = to_torch({"params": state.params}, ours)
    for key, parameter in theirs.named_parameters():
        assert relative(found[key], parameter.detach().numpy()) < 1e-6, key
