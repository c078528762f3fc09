"""Exact metrics of a whole split."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regnet_flax.analysis.by_class import confusion_matrix, per_class
from regnet_flax.config.fields import default_config
from regnet_flax.data.feeds import MemoryFeed
from regnet_flax.data.folder import Split
from regnet_flax.data.sources import Dataset
from regnet_flax.errors import ConfigError
from regnet_flax.modes.setup import datasets
from regnet_flax.training.parallel import AXIS, Placement
from regnet_flax.training.step import create_train_state, eval_step
from regnet_flax.training.trainer import Step, Trainer, mean_metrics


def split(size, classes, seed=0):
    """Makes logits, which serve as the images, and labels."""
    rng = np.random.default_rng(seed)
    return 3 * rng.normal(size=(size, classes)).astype("f"), rng.integers(0, classes, size).astype("i")


def evaluate(logits, labels, batch_size, devices=1, **options):
    """Evaluates with a trainer whose model is the identity."""

    def identity(variables, batch):
        # The padding must not count, whatever it contains.
        images = jnp.where(batch["mask"][:, None], batch["images"], jnp.nan)
        return eval_step({}, batch | {"images": images}, apply_fn=lambda _, x, train: x, axis_name=AXIS)

    placement, data = Placement(jax.devices()[:devices]), Split(logits, labels)
    feed = MemoryFeed(Dataset("logits", data, data, ()), (0,), placement, batch_size)
    step = Step(lambda seed: create_train_state({"params": {}}, optax.identity()), lambda *_: None, identity, 1)
    return Trainer(step, feed, (0,), placement).evaluate({}, "test", len(labels), batch_size, **options)


@pytest.mark.parametrize(
    ("size", "batch_size", "devices"), [(1, 4, 1), (7, 7, 1), (23, 5, 1), (23, 64, 2), (101, 3, 1), (101, 6, 3)]
)
@pytest.mark.parametrize("classes", [5, 6])
def test_metrics_are_those_of_the_whole_split(size, batch_size, devices, classes):
    logits, labels = split(size, classes)
    done = []
    outcomes = np.empty((size, 2), np.int32)
    metrics = evaluate(logits, labels, batch_size, devices, poll=done.append, outcomes=outcomes)
    batch_size = -(-min(batch_size, size) // devices) * devices

    exact = logits.astype(np.float64)
    losses = np.log(np.exp(exact).sum(1)) - exact[np.arange(size), labels]
    better = (logits > logits[np.arange(size), labels][:, None]).sum(1)  # classes above the right one
    expected = {"loss": losses.mean(), "accuracy": (better == 0).mean(), "count": size}
    if classes > 5:
        expected["top5_accuracy"] = (better < 5).mean()
    assert metrics.keys() == expected.keys()
    assert metrics["loss"] == pytest.approx(expected.pop("loss"), rel=1e-5)
    for name, value in expected.items():
        assert metrics[name] == value, name
    assert [type(metrics[name]) for name in ("loss", "accuracy", "count")] == [float, float, int]
    np.testing.assert_array_equal(outcomes, np.stack([labels, logits.argmax(1)], 1))
    assert done == [min(size, n + batch_size) for n in range(0, size, batch_size)]


def test_precision_and_recall_of_each_class_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 6, (2, 200)).astype(np.int32)
    labels[labels == 4] = 3  # none of class 4, and none predicted as class 5
    predicted[predicted == 5] = 0
    padding = np.full((3, 2), -1, np.int32)
    confusion = confusion_matrix(np.concatenate([np.stack([labels, predicted], 1), padding]), 7)
    np.testing.assert_array_equal(confusion, sklearn.confusion_matrix(labels, predicted, labels=range(7)))
    assert confusion.dtype == np.int64 and confusion.sum() == 200

    found = per_class(confusion, "abcdefg")
    expected = sklearn.precision_recall_fscore_support(labels, predicted, labels=range(7), zero_division=np.nan)
    for i, entry in enumerate(found):
        assert entry["class"] == "abcdefg"[i] and entry["images"] == expected[3][i]
        assert entry["predicted"] == (predicted == i).sum()
        for name, values in (("precision", expected[0]), ("recall", expected[1])):
            assert entry[name] == (None if np.isnan(values[i]) else pytest.approx(values[i], rel=1e-12))
    assert found[4]["recall"] is found[5]["precision"] is found[6]["recall"] is None


@pytest.mark.parametrize(("record", "seed"), [({}, 7), ({"seed": 5}, 5), ({"seed": 3, "seeds": [3, 4]}, 3)])
def test_a_trained_model_is_measured_on_images_that_its_run_held_out(record, seed, monkeypatch):
    opened = []

    def open_dataset(config, seed, names):
        opened.append((seed, names))
        return types.SimpleNamespace(name="photos", class_names=("ant", "bee", "café"))

    monkeypatch.setattr(datasets, "open_dataset", open_dataset)
    config = default_config().lock()
    config.seed = 7
    datasets.open_trained_dataset(config, record, ("ant", "bee", "cafe\u0301"), "run")
    datasets.open_trained_dataset(config, record, (), "run")
    assert opened == [(seed, ("ant", "bee", "café")), (seed, ())]
    with pytest.raises(ConfigError, match="classes ant, bee, café, but run was trained on bee, café, dog: use images"):
        datasets.open_trained_dataset(config, record, ("bee", "café", "dog"), "run")


def test_many_batches_lose_no_example():
    # 2**24 + 1 is the first whole number that float32 cannot represent.
    sums = [{"loss": np.float32(0), "correct": np.int32(n), "count": np.int32(n)} for n in (2**24, 1)]
    assert mean_metrics(sums, "") == {"loss": 0, "accuracy": 1, "count": 2**24 + 1}


def test_poll_can_end_an_evaluation():
    seen = []

    def poll(done):
        seen.append(done)
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(*split(20, 3), 5, poll=poll)
    assert seen == [5, 10]
