"""Schedules against plain Python and PyTorch, SGD and cross-entropy against PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from comparison import check
from regnet_flax import create_model
from regnet_flax.models.regnet import unstack_blocks
from regnet_flax.training.optimizer import make_optimizer, make_schedule
from regnet_flax.training.step import cross_entropy

EPOCHS, STEPS_PER_EPOCH, RATE = 8, 10, 0.4
TOTAL = EPOCHS * STEPS_PER_EPOCH


def rates(kind, steps, **settings):
    schedule = make_schedule(kind, RATE, epochs=EPOCHS, steps_per_epoch=STEPS_PER_EPOCH, **settings)
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize("boundaries", [(2, 5), (0.25, 0.625), (0.25, 5)], ids=["epochs", "fractions", "both"])
def test_step_schedule_decays_at_its_boundaries(boundaries):
    first, second = 2 * STEPS_PER_EPOCH, 5 * STEPS_PER_EPOCH
    steps = [0, first - 1, first, second - 1, second, TOTAL - 1]
    expected = [0.4, 0.4, 0.2, 0.2, 0.1, 0.1]
    assert rates("step", steps, boundaries=boundaries, decay=0.5) == pytest.approx(expected, rel=1e-6)


def test_a_boundary_of_one_is_the_first_epochs_end():
    steps = [STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, TOTAL - 1]
    assert rates("step", steps, boundaries=(1,)) == pytest.approx([0.4, 0.04, 0.04], rel=1e-6)


def test_boundaries_that_fall_on_one_step_both_decay():
    # 0.376 and 0.374 of 80 steps both round to step 30.
    assert rates("step", [29, 30], boundaries=(0.374, 0.376), decay=0.5) == pytest.approx([0.4, 0.1], rel=1e-6)


def test_step_schedule_without_boundaries_is_constant():
    assert rates("step", [0, TOTAL - 1]) == pytest.approx([0.4, 0.4])


def test_cosine_goes_from_the_rate_to_zero():
    steps = [0, 1, 20, 40, 60, TOTAL - 1, TOTAL, TOTAL + 5]
    expected = [0.2 * (1 + math.cos(math.pi * min(step, TOTAL) / TOTAL)) for step in steps]
    assert expected[0] == 0.4 and expected[3] == pytest.approx(0.2) and expected[-1] == 0
    assert rates("cosine", steps) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_constant():
    assert rates("constant", [0, 1, TOTAL - 1]) == pytest.approx([0.4] * 3)


def test_warmup_rises_to_the_rate_and_then_the_schedule_holds():
    warmup = 2 * STEPS_PER_EPOCH
    steps = [0, 1, warmup - 2, warmup - 1, warmup, warmup + 1, TOTAL - 1]
    rising = [0.4 * 1 / 20, 0.4 * 2 / 20, 0.4 * 19 / 20, 0.4]
    assert rates("constant", steps, warmup_epochs=2) == pytest.approx(rising + [0.4] * 3, rel=1e-6)
    falling = [0.2 * (1 + math.cos(math.pi * done / 60)) for done in (0, 1, 59)]
    assert rates("cosine", steps, warmup_epochs=2) == pytest.approx(rising + falling, rel=1e-5, abs=1e-7)
    decayed = [0.4, 0.4, 0.04]
    assert rates("step", steps, warmup_epochs=2, boundaries=(0.5,)) == pytest.approx(rising + decayed, rel=1e-6)


def test_warmup_of_a_part_of_an_epoch():
    assert rates("constant", [0, 4, 5], warmup_epochs=0.5) == pytest.approx([0.08, 0.4, 0.4])


@pytest.mark.parametrize("warmup_epochs", [0, 2])
@pytest.mark.parametrize("kind", ["step", "cosine", "constant"])
def test_rates_are_those_of_torchs_schedulers(kind, warmup_epochs):
    from torch.optim import lr_scheduler

    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    warmup = warmup_epochs * STEPS_PER_EPOCH
    rising = lr_scheduler.LinearLR(sgd, start_factor=1 / warmup, total_iters=warmup - 1) if warmup else None
    if kind == "cosine":
        theirs = lr_scheduler.CosineAnnealingLR(sgd, T_max=TOTAL - warmup)
    else:
        milestones = [2 * STEPS_PER_EPOCH, 5 * STEPS_PER_EPOCH] if kind == "step" else []
        theirs = lr_scheduler.MultiStepLR(sgd, milestones, gamma=0.3)
    if rising and kind == "cosine":  # the cosine starts after the warm-up; the others count from the start of the run
        theirs = lr_scheduler.SequentialLR(sgd, [rising, theirs], milestones=[warmup])
    elif rising:
        theirs = lr_scheduler.ChainedScheduler([rising, theirs])
    expected = []
    for _ in range(TOTAL):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        theirs.step()
    found = rates(kind, range(TOTAL), boundaries=(0.25, 5), decay=0.3, warmup_epochs=warmup_epochs)
    check(("schedules, warm-up too", "rates of a run", "float32"), found, expected)


@pytest.mark.parametrize("kind", ["step", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.4])
def test_a_schedule_is_a_float32_scalar_inside_jit(kind, warmup):
    schedule = make_schedule(kind, RATE, epochs=2, steps_per_epoch=5, boundaries=(1,), warmup_epochs=warmup)
    rate = jax.jit(schedule)(jnp.int32(6))
    assert rate.shape == () and rate.dtype == jnp.float32
    assert float(rate) == pytest.approx(float(schedule(6)), rel=1e-6)


def test_an_unknown_schedule_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'linear'.*step, cosine, constant"):
        make_schedule("linear", RATE, epochs=1, steps_per_epoch=1)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "name, settings",
    [
        ("sgd", {"momentum": 0.0}),
        ("sgd", {"momentum": 0.9}),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.05}),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True}),
        ("sgd", {"momentum": 0.9, "weight_decay": 0.05, "clip_norm": 4.5}),
        ("adamw", {"betas": (0.8, 0.95)}),
        ("adamw", {"weight_decay": 0.5, "clip_norm": 4.5}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_an_optimiser_takes_the_steps_of_torch(name, settings, float64):
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(8, 3)), rng.normal(size=(8, 2))
    start = {"weight": rng.normal(size=(3, 2)), "bias": np.array([2, -3], "d")}
    rates = [0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0.01, 0.01, 0.01]
    clip = settings.get("clip_norm", 0)

    tx = make_optimizer(name, lambda count: jnp.asarray(rates)[count], **settings)
    params = jax.tree.map(jnp.asarray, start)
    state = tx.init(params)
    loss = lambda params: jnp.mean((inputs @ params["weight"] + params["bias"] - targets) ** 2)  # noqa: E731

    weights = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    options = {name: value for name, value in settings.items() if name != "clip_norm"}
    theirs = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name](
        weights.values(), lr=1.0, **{"weight_decay": 0.0} | options
    )
    norms = []
    for rate in rates:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)

        theirs.zero_grad()
        outputs = torch.tensor(inputs) @ weights["weight"] + weights["bias"]
        torch.nn.functional.mse_loss(outputs, torch.tensor(targets)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(weights.values(), clip or math.inf)))
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
        for name, value in weights.items():
            # PyTorch adds 1e-6 to the norm when it clips.
            np.testing.assert_allclose(params[name], value.detach().numpy(), rtol=1e-5 if clip else 1e-9)
    assert not clip or min(norms) < clip < max(norms), "the bound must be met and not met"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_that_of_torch(label_smoothing, dtype, parity):
    rng = np.random.default_rng(0)
    logits, labels = (4 * rng.normal(size=(6, 5))).astype(dtype), np.array([0, 1, 2, 3, 4, 4])
    row = ("cross-entropy, label smoothing too", "value and gradient", dtype)
    with parity(dtype) as device:
        inputs = torch.tensor(logits, device=device, requires_grad=True)
        theirs = torch.nn.functional.cross_entropy(
            inputs, torch.tensor(labels, device=device), label_smoothing=label_smoothing, reduction="none"
        )
        theirs.mean().backward()

        ours = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), label_smoothing)
        assert ours.shape == (6,) and ours.dtype == dtype
        check(row, ours, theirs.detach().cpu().numpy(), "value")
        gradient = jax.grad(lambda a: cross_entropy(a, jnp.asarray(labels), label_smoothing).mean())(logits)
        check(row, gradient, inputs.grad.cpu().numpy(), "gradient")


def test_cross_entropy_of_large_logits_is_finite():
    logits = jnp.array([[1000.0, 0.0, -1000.0]])
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1])), [1000.0])


def test_decay_can_be_for_kernels_alone():
    """Stacked biases also have two axes, so names decide."""
    params = {"conv": {"kernel": jnp.ones((2, 3))}, "blocks": {"bn": {"scale": jnp.ones((2, 3)), "bias": jnp.ones(3)}}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for name in ("sgd", "adamw", "lamb"):
        for decayed in ("all", "kernels"):
            tx = make_optimizer(name, lambda count: 0.1, weight_decay=0.5, decayed=decayed)
            updates, _ = tx.update(zeros, tx.init(params), params)
            assert (updates["conv"]["kernel"] < 0).all(), name
            assert bool((updates["blocks"]["bn"]["scale"] < 0).all()) == (decayed == "all"), name
            assert bool((updates["blocks"]["bn"]["bias"] < 0).all()) == (decayed == "all"), name


def test_decay_can_spare_the_regulators():
    model = create_model("regnet8_convlstm", num_classes=3, width=4)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    tx = make_optimizer("sgd", lambda count: 0.1, weight_decay=0.5, decayed="outside_regulators")
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for stage in ("stage1", "stage2", "stage3"):
        regulator = updates[stage].pop("regulator")
        assert not any(update.any() for update in jax.tree.leaves(regulator))
    decayed = jax.tree_util.tree_leaves_with_path(updates)
    assert all((update != 0).any() for path, update in decayed if path[-1].key == "kernel")
    assert all((update != 0).any() for path, update in decayed if path[-1].key == "scale")


def test_lamb_takes_the_same_step_of_stacked_blocks_and_of_single_ones(float64):
    rng = np.random.default_rng(0)
    params = {
        "stage1": {"blocks": {"conv": {"kernel": rng.normal(size=(3, 2, 4)) * np.array([1.0, 9, 0.1])[:, None, None]}}}
    }
    grads = jax.tree.map(lambda a: rng.normal(size=a.shape), params)
    tx = make_optimizer("lamb", lambda count: 0.1, weight_decay=0.1)

    def step(params, grads):
        return tx.update(grads, tx.init(params), params)[0]

    found = unstack_blocks(step(params, grads))
    expected = step(unstack_blocks(params), unstack_blocks(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    whole = optax.lamb(0.1, weight_decay=0.1)
    single = unstack_blocks(params)
    theirs, _ = whole.update(unstack_blocks(grads), whole.init(single), single)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, theirs)


def test_an_unknown_optimiser_is_named():
    with pytest.raises(ValueError, match=r"'adam': it must be one of sgd, adamw, lamb"):
        make_optimizer("adam", lambda count: 0.1)
