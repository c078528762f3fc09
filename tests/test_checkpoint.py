"""Checkpoints: what is restored, what is kept, and how damage is handled."""

import functools
import logging
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from regnet_flax.errors import CheckpointError, WorkdirError
from regnet_flax.training.checkpoint import Checkpoints
from regnet_flax.training.optimizer import make_optimizer
from regnet_flax.training.step import TrainState, create_train_state

pytestmark = pytest.mark.core


@functools.cache
def state(step):
    """Makes arrays that identify the step, incompressible, so that the largest file holds them."""
    kernel = np.random.default_rng(step).standard_normal((60, 50), np.float32)
    params = {"kernel": kernel, "bias": np.full(3, step, np.float32)}
    found = TrainState(np.int32(step), params, {"mean": np.ones(2, np.float32)}, (), {}, np.int32(-1))
    return jax.tree.map(jnp.asarray, found)


def like(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


LIKE, PLACE = like(state(0)), state(0).step.sharding


def same(a, b):
    """Whether two trees are bitwise the same."""
    leaves, others = jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes())
        == (np.asarray(y).dtype, np.shape(y), np.asarray(y).tobytes())
        for x, y in zip(leaves, others, strict=True)
    )


def is_step(restored, step):
    """Whether that step was restored, with its own record."""
    return restored is not None and same(restored[0], state(step)) and restored[1] == {"seconds": step / 10}


def save(checkpoints, step, accuracy=None):
    metrics = None if accuracy is None else {"eval_loss": 1.0, "eval_accuracy": accuracy}
    checkpoints.save(step, state(step), {"seconds": step / 10}, metrics)


def saved(checkpoints):
    """Returns the steps on the disk."""
    checkpoints.wait()
    return sorted(int(path.name) for path in checkpoints.directory.iterdir() if path.name.isdigit())


def files(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    path = tmp_path_factory.mktemp("three")
    checkpoints = Checkpoints(path, keep=3)
    for step, accuracy in ((10, 0.7), (20, 0.9), (30, 0.8)):
        save(checkpoints, step, accuracy)
    checkpoints.close()
    return path


@pytest.fixture
def workdir(three, tmp_path):
    """A workdir with the steps 10, 20 and 30, with the best accuracy at 20."""
    return shutil.copytree(three, tmp_path / "workdir")


@pytest.fixture
def opened():
    """Opens checkpoints, and closes them after the test."""
    all_of_them = []

    def opened(path, keep=5, keep_best=1):
        all_of_them.append(Checkpoints(path, keep, keep_best))
        return all_of_them[-1]

    yield opened
    for checkpoints in all_of_them:
        checkpoints.close()


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The warnings so far."""
    monkeypatch.setattr(logging.getLogger("regnet_flax"), "propagate", True)
    return lambda: [r.getMessage() for r in caplog.records if r.name == "regnet_flax" and r.levelname == "WARNING"]


# Restoring


def test_a_train_state_comes_back_bitwise_with_its_record(tmp_path, opened):
    odd = np.array([np.nan, -np.nan, -0.0, 1e-42, np.inf], np.float32)
    odd[0] = np.uint32(0x7FC00123).view(np.float32)  # a NaN with a payload
    params = {"a": jnp.asarray(odd), "b": {"c": jnp.arange(4, dtype=jnp.bfloat16) / 3, "scalar": jnp.float32(0.1)}}
    tx = make_optimizer("sgd", lambda count: 0.1, momentum=0.9, weight_decay=1e-4, clip_norm=1.0)
    before = create_train_state({"params": params, "batch_stats": {"mean": jnp.ones(2)}}, tx)
    before = before.replace(step=jnp.int32(7))
    record = {"logged": False, "seconds": 0.1 + 0.2, "nested": {"names": ["ä", "b"]}}
    first = opened(tmp_path)
    first.save(7, before, record)
    first.wait()
    after, found = opened(tmp_path).restore(like(before))
    assert type(after) is type(before)
    assert same(after, before)
    assert found == record


def test_nothing_is_restored_where_nothing_was_saved(tmp_path, opened):
    assert opened(tmp_path).restore(LIKE) is None


def test_a_state_is_restored_to_any_devices(tmp_path, opened):
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("batch",)), PartitionSpec())
    one = NamedSharding(Mesh(np.array(jax.devices()[-1:]), ("batch",)), PartitionSpec())
    for step, before, after in ((1, everywhere, one), (2, one, everywhere)):
        checkpoints = opened(tmp_path / str(step))
        checkpoints.save(step, jax.device_put(state(step), before), {"seconds": step / 10})
        checkpoints.wait()
        restored = checkpoints.restore(like(jax.device_put(state(0), after)))
        assert is_step(restored, step)
        assert all(leaf.sharding == after for leaf in jax.tree.leaves(restored[0]))


# Retention


@pytest.mark.parametrize(
    ("keep", "keep_best", "accuracies"),
    [
        (1, 1, [0.9, 0.1, 0.2, 0.3]),
        (1, 1, [0.1, 0.9, 0.8, 0.05]),
        (2, 1, [0.5, 0.9, 0.4, 0.3, 0.2]),
        (1, 2, [0.5, 0.9, 0.7, 0.3, 0.2]),
        (2, 0, [0.9, 0.5, 0.4, 0.3]),
        (1, 1, [None, 0.5, None, 0.4, None]),
        (1, 1, [None, None, None]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, opened, keep, keep_best, accuracies):
    checkpoints = opened(tmp_path, keep, keep_best)
    expected = {}
    for step, accuracy in enumerate(accuracies, 1):
        save(checkpoints, step, accuracy)
        expected[step] = accuracy
        newest = sorted(expected)[-keep:]
        evaluated = [step for step in expected if expected[step] is not None]
        best = sorted(evaluated, key=expected.get, reverse=True)[:keep_best]
        expected = {step: expected[step] for step in expected if step in newest or step in best}
        assert saved(checkpoints) == sorted(expected) == checkpoints.steps()
        assert is_step(checkpoints.restore(LIKE), step)


def test_retention_counts_what_an_earlier_process_saved(workdir, opened):
    checkpoints = opened(workdir, keep=1)
    save(checkpoints, 40, 0.1)
    assert saved(checkpoints) == [20, 40]


@pytest.mark.parametrize("step", [5, 10, 15, 20])
def test_a_save_below_the_newest_is_an_error(workdir, opened, step):
    checkpoints = opened(workdir)
    with pytest.raises(CheckpointError, match=f"step {step}:"):
        save(checkpoints, step)
    assert saved(checkpoints) == [10, 20, 30]


def test_a_save_at_the_newest_leaves_it_as_it_is(workdir, opened):
    checkpoints = opened(workdir)
    before = files(workdir)
    checkpoints.save(30, state(99), {"seconds": 99.0}, {"eval_accuracy": 1.0})
    checkpoints.wait()
    assert files(workdir) == before


def test_metrics_that_come_late_count(tmp_path, opened):
    checkpoints = opened(tmp_path, keep=1)
    save(checkpoints, 1)
    save(checkpoints, 1, 0.9)  # immediately, while the first save may still be running
    save(checkpoints, 2)
    checkpoints.wait()
    reopened = opened(tmp_path, keep=1)
    save(reopened, 2, 0.8)
    save(reopened, 3, 0.7)
    assert saved(reopened) == [1, 3]
    assert reopened.read_variables("best", PLACE)[0] == 1
    assert opened(tmp_path).read_variables("best", PLACE)[0] == 1
    assert is_step(reopened.restore(LIKE), 3)


# Damage


def _largest(step):
    return max((file for file in (step / "state").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def truncate(step):
    file = _largest(step)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_bit(step):
    """Flips a bit in values that are stored uncompressed, because noise does not compress: Orbax does not notice."""
    file = _largest(step)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def delete_arrays(step):
    _largest(step).unlink()


def delete_manifest(step):
    (step / "state/manifest.ocdbt").unlink()


def delete_record(step):
    shutil.rmtree(step / "record")


def empty_record(step):
    (step / "record/metadata").write_text("")


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGE = [truncate, flip_bit, delete_arrays, delete_manifest, delete_record, empty_record, empty]
by_name = pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)


@by_name
@pytest.mark.fault("the newest checkpoint damaged in seven ways")
def test_a_damaged_newest_is_named_and_set_aside_and_the_one_before_is_used(workdir, opened, warnings, damage):
    damage(workdir / "checkpoints/30")
    checkpoints = opened(workdir)
    assert is_step(checkpoints.restore(LIKE), 20)
    assert checkpoints.steps() == [10, 20]
    assert any("checkpoint 30 is damaged" in message for message in warnings())
    assert all("\n" not in message for message in warnings())
    assert (workdir / "checkpoints/damaged/30").is_dir()
    assert not (workdir / "checkpoints/30").exists()
    for step in (25, 30, 35):
        save(checkpoints, step)
    assert saved(checkpoints) == [10, 20, 25, 30, 35]
    assert is_step(checkpoints.restore(LIKE), 35)
    assert checkpoints.read_variables("30", PLACE)[0] == 30


def test_a_stray_empty_step_is_set_aside(workdir, opened, warnings):
    (workdir / "checkpoints/40").mkdir()
    checkpoints = opened(workdir)
    assert is_step(checkpoints.restore(LIKE), 30)
    assert any("checkpoint 40 is damaged" in message for message in warnings())
    save(checkpoints, 35)
    save(checkpoints, 40)
    assert saved(checkpoints) == [10, 20, 30, 35, 40]
    assert is_step(checkpoints.restore(LIKE), 40)


@pytest.mark.fault("the two newest checkpoints damaged")
def test_several_damaged_ones_are_all_set_aside(workdir, opened, warnings):
    empty(workdir / "checkpoints/30")
    truncate(workdir / "checkpoints/20")
    checkpoints = opened(workdir)
    assert is_step(checkpoints.restore(LIKE), 10)
    for step in (20, 30):
        assert any(f"checkpoint {step} is damaged" in message for message in warnings())
        assert (workdir / f"checkpoints/damaged/{step}").is_dir()
    save(checkpoints, 15)
    assert saved(checkpoints) == [10, 15]


def test_a_step_can_be_damaged_twice(workdir, opened):
    truncate(workdir / "checkpoints/30")
    checkpoints = opened(workdir)
    checkpoints.restore(LIKE)
    save(checkpoints, 30)
    checkpoints.wait()
    delete_record(workdir / "checkpoints/30")
    checkpoints = opened(workdir)
    assert is_step(checkpoints.restore(LIKE), 20)
    assert not (workdir / "checkpoints/damaged/30/record").exists()  # the second
    save(checkpoints, 30)
    assert is_step(checkpoints.restore(LIKE), 30)


@pytest.mark.fault("each file of a checkpoint changed or deleted")
def test_whatever_file_is_damaged_no_wrong_state_is_restored(workdir, tmp_path, opened):
    def flip(file):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    names = [file.relative_to(workdir) for file in (workdir / "checkpoints/30").rglob("*") if file.is_file()]
    assert len(names) > 5
    outcomes = []
    for number, name in enumerate(names):
        for damage in (flip, lambda file: file.unlink()):
            path = shutil.copytree(workdir, tmp_path / f"{number}-{len(outcomes)}")
            damage(path / name)
            checkpoints = Checkpoints(path, keep=3)
            restored = checkpoints.restore(LIKE)
            checkpoints.close()
            assert is_step(restored, 30) or is_step(restored, 20), f"{damage.__name__} {name}"
            outcomes.append(is_step(restored, 30))
    assert any(outcomes) and not all(outcomes)


@pytest.mark.parametrize("content", ['{"eval_acc', "", "\x00\x00", "{}", "[]", '{"eval_accuracy": "high"}'])
@pytest.mark.fault("a checkpoint's metrics damaged")
def test_damaged_metrics_do_not_count_and_harm_nothing_else(workdir, opened, warnings, content):
    (workdir / "checkpoints/20/metrics/metrics").write_text(content)
    checkpoints = opened(workdir, keep=1)
    assert any("checkpoint 20 has damaged metrics" in message for message in warnings())
    assert is_step(checkpoints.restore(LIKE), 30)
    assert checkpoints.read_variables("best", PLACE)[0] == 30
    save(checkpoints, 40, 0.1)
    assert saved(checkpoints) == [30, 40]


@pytest.mark.fault("foreign files among the checkpoints")
def test_foreign_files_are_left_alone(workdir, opened, warnings):
    directory = workdir / "checkpoints"
    for name in ("notes.txt", "40", ".hidden", "30.bak/readme", "best/metrics/metrics", "040/file"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("mine")
    checkpoints = opened(workdir, keep=2)
    assert checkpoints.steps() == [10, 20, 30]
    assert is_step(checkpoints.restore(LIKE), 30)
    save(checkpoints, 50)
    checkpoints.wait()
    assert warnings() == []
    assert sum(content == b"mine" for content in files(directory).values()) == 6


@pytest.mark.fault("what a killed save leaves")
def test_what_a_killed_save_left_is_ignored_and_cleared_by_the_run_that_goes_on(workdir, opened, warnings):
    unfinished = workdir / "checkpoints/40.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints/30", unfinished)
    evaluation = opened(workdir)
    assert evaluation.read_variables("last", PLACE)[0] == 30
    assert unfinished.is_dir()  # another process may be saving now
    checkpoints = opened(workdir)
    assert is_step(checkpoints.restore(LIKE), 30)
    assert not unfinished.exists()
    assert warnings() == []
    save(checkpoints, 40)
    assert saved(checkpoints) == [10, 20, 30, 40]


@pytest.mark.parametrize(
    "damage",
    [pytest.param(how, marks=() if how in (truncate, delete_record) else pytest.mark.thorough) for how in DAMAGE],
    ids=lambda damage: damage.__name__,
)
@pytest.mark.fault("all checkpoints damaged in seven ways")
def test_where_all_are_damaged_nothing_is_moved_or_deleted(workdir, opened, damage):
    for step in (10, 20, 30):
        damage(workdir / f"checkpoints/{step}")
    before = files(workdir)
    checkpoints = opened(workdir)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(LIKE)
    message = str(caught.value)
    assert "\n" not in message and str(workdir) in message and "newest, step 30: " in message
    assert files(workdir) == before
    assert checkpoints.steps() == [10, 20, 30]
    assert not (workdir / "checkpoints/damaged").exists()


def test_a_state_of_another_shape_is_not_restored(workdir, opened):
    other = state(0).replace(params={"kernel": jnp.zeros((60, 51)), "bias": jnp.zeros(3)})
    with pytest.raises(CheckpointError):
        opened(workdir).restore(like(other))
    assert is_step(opened(workdir).restore(LIKE), 30)


@pytest.mark.fault("a limit on the size of a checkpoint's files")
def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoints(workdir, opened):
    large = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal(300_000, np.float32))}
    checkpoints = opened(workdir)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(40, large, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and str(workdir) in str(caught.value)
    assert saved(checkpoints) == [10, 20, 30]
    again = opened(workdir)
    assert is_step(again.restore(LIKE), 30)
    save(again, 40)
    assert saved(again) == [10, 20, 30, 40]


# Reading one for evaluation


@pytest.mark.parametrize(("which", "step"), [("best", 20), ("last", 30), ("10", 10), ("20", 20)])
def test_reading_by_name(workdir, opened, which, step):
    found, tree = opened(workdir).read_variables(which, PLACE)
    assert found == step and same(tree, {"params": state(step).params, "batch_stats": state(step).batch_stats})


def test_the_best_is_the_newest_where_none_was_evaluated(tmp_path, opened):
    checkpoints = opened(tmp_path)
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.wait()
    assert checkpoints.read_variables("best", PLACE)[0] == 2


def test_reading_an_unknown_step_names_the_known_ones(workdir, opened):
    with pytest.raises(WorkdirError, match="15.* 10, 20, 30$"):
        opened(workdir).read_variables("15", PLACE)


def test_reading_where_there_is_none(tmp_path, opened):
    with pytest.raises(WorkdirError, match="no checkpoint"):
        opened(tmp_path).read_variables("best", PLACE)


@by_name
def test_reading_a_damaged_one_is_an_error_and_moves_nothing(workdir, opened, damage):
    damage(workdir / "checkpoints/20")
    before = files(workdir)
    checkpoints = opened(workdir)
    with pytest.raises(CheckpointError, match="checkpoint 20 .* is damaged .*--config.eval.checkpoint") as caught:
        checkpoints.read_variables("20", PLACE)
    assert "\n" not in str(caught.value)
    assert files(workdir) == before
    assert checkpoints.read_variables("last", PLACE)[0] == 30
