"""The program in a subprocess, stopped at any moment by a real signal; also long runs and non-finite numbers."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from faults import (
    TINY,
    Started,
    arrays,
    assert_ends_alike,
    assert_tensorboard_agrees,
    chance,
    environment,
    error_of,
    metrics,
    run,
    uninterrupted,  # noqa: F401
)
from helpers import run_program
from regnet_flax import create_model
from regnet_flax.training.optimizer import make_optimizer
from regnet_flax.training.step import create_train_state, train_step

# The moments at which one run is stopped, and the longest time this takes on an idle core, in seconds.
PHASES = {"compile": 1.0, "train": 0.05, "evaluate": 0.02, "save": 0.1, "figures": 0.5}
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGKILL: "SIGKILL"}


def stop(workdir, number, phase, random):
    """Runs the program until a random moment in or after that phase and sends it the signal.

    Returns:
      The program's phase, its exit code and its output; None for a program that had already ended.
    """
    with Started(*TINY, "--workdir", workdir) as started:
        times = random.randint(1, 8) if phase == "train" else 1
        if not started.until(f"+{phase}", times):
            return None, *started.end()
        time.sleep(random.random() * PHASES[phase])
        started.read()
        if started.process.poll() is None:
            doing = started.phases[-1] if started.phases else "between two steps"
            started.process.send_signal(number)
        else:
            doing = None
        code, out = started.end()
    if number == signal.SIGKILL and doing != "save" and list((workdir / "checkpoints").glob("*tmp*")):
        doing = f"{doing}, a save under way"
    return doing, code, out


@pytest.mark.slow
@pytest.mark.parametrize("chain", range(4))
@pytest.mark.parametrize("number", NAMES, ids=NAMES.values())
def test_stopped_at_random_moments_it_ends_bitwise_the_same(number, chain, uninterrupted, tmp_path, fault):  # noqa: F811
    """One run is stopped five times, and started again after each stop."""
    random = chance("stops", NAMES[number], chain)
    phases = [*random.sample(["compile", "train", "evaluate", "save"], 4), "figures"]
    for phase in phases:
        doing, code, out = stop(tmp_path / "run", number, phase, random)
        assert doing is not None, f"it ended before the signal came: {out}"
        fault(f"{NAMES[number]}: {doing}")
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
        elif code == 0:  # after the last step there is nothing to save, so the run finishes
            assert phase == "figures" and (tmp_path / "run/results.json").exists()
        else:
            assert code == 128 + signal.SIGTERM, out
            assert "Saved at step" in out and "run the same command to resume." in out
            step = int(out.partition("Saved at step ")[2].partition(";")[0])
            assert (tmp_path / f"run/checkpoints/{step}").is_dir()
    out = run(*TINY, "--workdir", tmp_path / "run", check=0).stdout
    assert "resuming from the checkpoint" in out or "finished run" in out
    assert_ends_alike(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_sigterm_while_it_loads_and_compiles_with_nothing_saved_yet(uninterrupted, tmp_path, fault):  # noqa: F811
    for phase in ("data", "compile"):
        with Started(
            *TINY, "--workdir", tmp_path / phase, env=environment(JAX_ENABLE_COMPILATION_CACHE="0")
        ) as started:
            assert started.until(f"+{phase}")
            started.process.send_signal(signal.SIGTERM)
            code, out = started.end()
        assert code == 143, out
        fault(f"SIGTERM: {phase}, before the first step")
        assert ("before the first step" in out) == (phase == "data")
        assert ("Saved at step 1;" in out) == (phase == "compile")
    assert not (tmp_path / "data").exists()
    run(*TINY, "--workdir", tmp_path / "compile", check=0)
    assert_ends_alike(tmp_path / "compile", uninterrupted)


@pytest.mark.thorough
def test_a_second_signal_stops_it_at_once_while_xla_compiles(tmp_path, fault):
    """With all optimisations, compilation would take ten times as long as the test waits."""
    arguments = ["--config.model.name=regnet8_convlstm", "--workdir", tmp_path / "run"]
    whole = {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    with Started(*arguments, env=environment(**whole)) as started:
        assert started.until("=compile")
        time.sleep(0.3)
        started.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert started.process.poll() is None, started.end()
        began = time.monotonic()
        started.process.send_signal(signal.SIGTERM)
        code, _ = started.end(timeout=60)
        assert time.monotonic() - began < 3
        assert "compile" in started.phases
    assert code == 143
    fault("a second SIGTERM while XLA compiles")
    assert not (tmp_path / "run/checkpoints").exists() or not list((tmp_path / "run/checkpoints").iterdir())


def everyone():
    return [path.name for path in pathlib.Path("/proc").iterdir() if path.name.isdigit()]


def stat(pid):
    """Returns state, parent and more of a process; nothing if there is no such process."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="children are found in /proc")
@pytest.mark.parametrize("signals", [1, 2])
def test_stopped_by_signals_it_leaves_no_worker_behind(signals, tmp_path, fault):
    for index in range(24):
        for split in ("train", "test"):
            path = tmp_path / split / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 24), (10 * index, 0, 0)).save(path)
    arguments = [*TINY, "--config.dataset.name=folder", f"--config.dataset.data_dir={tmp_path}"]
    arguments += ["--config.dataset.in_memory=never", "--config.dataset.image_size=8", "--config.dataset.workers=2"]
    arguments += ["--config.train.batch_size=8", "--config.train.epochs=5000", "--config.eval.every_epochs=0"]
    lines, command = tmp_path / "run/metrics.jsonl", [sys.executable, "-m", "regnet_flax.main", *arguments]
    with subprocess.Popen([*command, "--workdir", tmp_path / "run"], env=environment()) as program:
        try:
            while not (lines.exists() and lines.read_text()) and program.poll() is None:
                time.sleep(0.1)
            children = [pid for pid in everyone() if stat(pid)[1:2] == [str(program.pid)]]
            assert len(children) >= 2
            for _ in range(signals):
                program.send_signal(signal.SIGTERM)
                time.sleep(0.02)
            assert program.wait(60) == 143
        finally:
            program.kill()
    fault("SIGTERM, once or twice, with two worker processes")
    deadline = time.monotonic() + 20
    while left := [pid for pid in children if stat(pid)[:1] not in ([], ["Z"])]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.slow
def test_two_runs_on_one_workdir(uninterrupted, tmp_path, fault):  # noqa: F811
    with Started(*TINY, "--workdir", tmp_path / "run") as first:
        assert first.until("+compile")
        first.process.send_signal(signal.SIGSTOP)  # so that it does not end in the meantime
        line = error_of(run(*TINY, "--workdir", tmp_path / "run"), 2)
        assert f"another run (process {first.process.pid}) is training in" in line
        first.process.kill()
        first.end()
    fault("a second run on the same workdir")
    fault("a run killed that holds the workdir's lock")
    run(*TINY, "--workdir", tmp_path / "run", check=0)
    assert_ends_alike(tmp_path / "run", uninterrupted)


# Numerics


@pytest.mark.fault("a loss that is not finite")
def test_a_loss_that_is_not_finite(tmp_path):
    """Weight decay multiplies the weights by about −100 per step."""
    settings = ["--config.optimizer.learning_rate=1e3", "--config.optimizer.weight_decay=0.1"]
    settings += ["--config.optimizer.schedule=constant", "--config.optimizer.warmup_epochs=0"]
    command = [*TINY, *settings, "--workdir", tmp_path / "run"]
    line = error_of(run_program(*command), 1)
    assert "is not finite at step" in line and "learning rate 1000" in line
    step = int(line.partition("not finite at step ")[2].partition(",")[0])
    last = int(line.partition("the last good checkpoint is step ")[2].partition(";")[0])
    assert 0 < last < step <= last + 4
    before = arrays(tmp_path / "run", last)
    assert all(np.isfinite(array).all() for array in before.values())
    assert before[".nonfinite_step"] == -1 and before[".step"] == last
    # The same happens again, and the checkpoint stays usable.
    assert error_of(run_program(*command), 1) == line
    after = arrays(tmp_path / "run", last)
    assert {name: a.tobytes() for name, a in after.items()} == {name: a.tobytes() for name, a in before.items()}
    arguments = ["--mode=eval", "--workdir", tmp_path / "run", "--config.eval.checkpoint=last"]
    assert f"step {last}:" in run_program(*arguments, check=0).stdout


@pytest.mark.fault("bfloat16 in training")
@pytest.mark.parametrize(
    "name",
    ["regnet8_convlstm", pytest.param("se_regnet8_convgru", marks=pytest.mark.thorough), "regnet_proj_cifar"],
)
def test_bfloat16_keeps_state_statistics_and_sums_in_float32(name):
    options = {} if "proj" in name else {"width": 4}
    model = create_model(name, dtype=jnp.bfloat16, axis_name="batch", **options)
    images, labels = jnp.zeros((4, 32, 32, 3)), jnp.zeros(4, jnp.int32)
    tx = make_optimizer("sgd", lambda count: 0.1, momentum=0.9, weight_decay=1e-4)
    before = jax.eval_shape(
        lambda: create_train_state(dict(model.init(jax.random.key(0), images, train=False)), tx),
    )

    def step(state, images, labels):
        batch = {"images": images, "labels": labels}
        return train_step(state, batch, apply_fn=model.apply, tx=tx, axis_name="batch")

    traced, after = jax.make_jaxpr(step, axis_env=[("batch", 2)], return_shape=True)(before, images, labels)
    for state in (before, after[0]):
        kinds = {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert kinds == {jnp.dtype("float32")}
    narrow = [
        equation
        for equation in equations(traced.jaxpr)
        if any(getattr(variable.aval, "dtype", None) == jnp.bfloat16 for variable in equation.invars)
    ]
    # Convolutions accumulate in float32 themselves; a sum over an axis of one accumulates nothing.
    assert any(equation.primitive.name in ("conv_general_dilated", "ffi_call") for equation in narrow)
    sums = [equation for equation in narrow if "sum" in equation.primitive.name]
    assert not [e for e in sums if e.invars[0].aval.size != e.outvars[0].aval.size]


def equations(jaxpr):
    """Yields the equations, including those of inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


# Long runs


@pytest.mark.slow
@pytest.mark.fault("5,000 steps in one process")
def test_a_long_run_needs_no_more_memory_and_no_more_files(tmp_path):
    settings = ["--config.train.epochs=500", "--config.train.max_steps=5000", "--config.checkpoint.every_steps=100"]
    settings += ["--config.eval.every_epochs=10"]
    seen = []
    with Started(*TINY, *settings, "--workdir", tmp_path / "run") as started:
        assert started.until("+train")
        status = f"/proc/{started.process.pid}"
        while started.process.poll() is None:
            started.read()
            try:
                with open(f"{status}/statm") as file:
                    pages = int(file.read().split()[1])
                saved = [
                    int(path.name) for path in (tmp_path / "run/checkpoints").glob("[0-9]*") if path.name.isdigit()
                ]
                seen.append((max(saved, default=0), pages * 4096, len(os.listdir(f"{status}/fd"))))
            except (OSError, IndexError, ValueError):
                break
            time.sleep(0.05)
        code, out = started.end()
    assert code == 0, out
    late = [sample for sample in seen if 1000 <= sample[0] < 5000]  # after these it draws figures
    steps, memory, files = (np.array(column, float) for column in zip(*late, strict=True))
    assert steps.max() >= 4900 and len(late) > 50
    slope = np.polyfit(steps, memory, 1)[0]
    parts = ", ".join(f"{np.median(part) / 2**20:.1f}" for part in np.array_split(memory, 4))
    print(f"memory grows by {slope:.0f} bytes a step, MiB by quarters: {parts}; {files.max():.0f} files open")
    assert slope < 1000, f"{slope:.0f} bytes a step"
    first, last = (files[: len(files) // 4], files[-len(files) // 4 :])
    assert last.min() <= first.min()  # the minimum is between saves; a file that a save leaves open would remain
    assert files.max() < 100
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(5, 5001, 5))
    assert_tensorboard_agrees(tmp_path / "run")
