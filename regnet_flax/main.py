"""The command line: python -m regnet_flax.main --config configs/cifar10.py --mode train --workdir DIR."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from regnet_flax import xla_flags
from regnet_flax.config_files import DEFAULT_CONFIG, find_config, provide_configs
from regnet_flax.errors import Error, Interrupted, UsageError

_IN_CONFIG = "Error whilst parsing config file"  # ml_collections, before a traceback
MODES = ("train", "eval", "predict", "summary", "benchmark", "compare", "export")


def parse(argv: Sequence[str]) -> tuple[Any, Any]:
    """Reads the command line.

    Args:
      argv: the arguments, without the program's name.

    Returns:
      The locked config and the other flags. Modes other than train take the config from the workdir's config.json
      where there is one, the command line's overrides on top.

    Raises:
      UsageError: wrong flags, fields or values.
    """
    from absl import flags
    from ml_collections import config_flags

    from regnet_flax.training import workdir

    names = [arg for arg in argv if re.match(r"--?config(=|$)", arg)]
    if len(names) > 1:
        raise UsageError("--config is given more than once")
    rest = list(argv)
    name = DEFAULT_CONFIG
    if names:
        index = rest.index(names[0])
        equals = "=" in names[0]
        if not equals and index + 1 == len(rest):
            raise UsageError("--config needs a file, such as --config configs/cifar10.py")
        name = names[0].partition("=")[2] if equals else rest[index + 1]
        del rest[index : index + (1 if equals else 2)]
    file = find_config(name if names else None)
    provide_configs(file.partition(":")[0])
    # ml_collections asks that the file come before the overrides.
    arguments = ["regnet_flax", f"--config={file}", *rest]

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", help_string="config file", flag_values=values, sys_argv=arguments)
    flags.DEFINE_string("workdir", "", "where the run is kept: runs/<config>-<model>-<seed> by default", values)
    flags.DEFINE_enum("mode", "train", MODES, "what to do", values)
    flags.DEFINE_string("distributed", "", "auto, or HOST:PORT,PROCESSES,INDEX, to train with other processes", values)
    flags.DEFINE_bool("profile", False, "write a trace of a few training steps into the workdir", values)
    try:
        left = values(arguments)
    except Exception as error:  # the config is a program, and may end in anything
        of_the_config = not isinstance(error, flags.Error) or _IN_CONFIG in str(error)
        if isinstance(error, flags.IllegalFlagValueError) and (mend := _mend(arguments, str(error))):
            raise UsageError(mend) from error
        raise UsageError((f"--config {name}: " if of_the_config else "") + _one_line(error)) from error
    if len(left) > 1:
        raise UsageError(f"{left[1]!r} is not understood: options are written --name=value")

    config = values.config
    stem = pathlib.Path(file.partition(":")[0]).stem
    if not values.workdir:
        run = stem if values.mode == "compare" else f"{stem}-{config.model.name}-{config.seed}"
        values.workdir = str(pathlib.Path("runs") / run)
    if values.mode not in ("train", "compare") and (stored := workdir.read_plain_config(pathlib.Path(values.workdir))):
        overrides, path = config_flags.get_override_values(values["config"]), config.export.path
        try:
            with config.ignore_type():
                config.update({name: stored[name] for name in stored if name in config})
        except (AttributeError, KeyError, TypeError) as error:
            raise UsageError(
                f"{values.workdir}/{workdir.CONFIG} does not fit this version ({_one_line(error)}): "
                "restore it, or name another --workdir"
            ) from error
        _tuples(config)
        config.model.init_from, config.model.new_head = "", False  # what the run began with, not what it came to
        config.export.path = path  # where to write is not a stored workdir's to say, which may be a stranger's
        config.update_from_flattened_dict(overrides)
    return config, values


def _mend(arguments: Sequence[str], problem: str) -> str:
    """What is wrong with the value that absl could not parse, as check_config says it; "" if it is no field's."""
    from regnet_flax.config.fields import FIELDS

    for argument in arguments:
        name, _, value = argument.lstrip("-").partition("=")
        field = name.removeprefix("config.")
        if field in FIELDS and problem.startswith(f"flag --{name}={value}: "):
            return f"{field} is {value!r}: it must be {FIELDS[field](value) or 'of another type'}"
    return ""


def _tuples(config: Any) -> None:
    """JSON has lists where configs have tuples."""
    for name, value in config.items():
        if hasattr(value, "items"):
            _tuples(value)
        elif isinstance(value, (list, tuple)):
            with config.ignore_type():
                config[name] = tuple(value)


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if any(_IN_CONFIG in line for line in lines):
        lines = lines[-1:]  # of a traceback
    return " ".join(lines) or type(error).__name__


def _summary(config: Any) -> None:
    from rich.console import Console

    from regnet_flax.analysis import summary
    from regnet_flax.config.check import check_config, image_shape, model_options
    from regnet_flax.models.registry import create_model

    config.dataset.data_dir = config.dataset.data_dir or "."  # nothing is read
    check_config(config)
    shape, classes = image_shape(config)
    model = create_model(config.model.name, num_classes=classes, **model_options(config))
    title = f"{config.model.name}, images of {'×'.join(map(str, shape))}, {model.num_classes} classes"
    Console().print(summary.table(summary.summarize(model, shape), title))


USAGE = f"""usage: python -m regnet_flax.main [--config FILE] [--mode MODE] [--workdir DIR] [--config.FIELD=VALUE …]

  --config FILE          a config file, or FILE:MODEL for another model; {DEFAULT_CONFIG} by default
  --mode MODE            {", ".join(MODES)}; train by default. Running train again goes on where it was stopped
  --workdir DIR          where the run is kept; runs/<config>-<model>-<seed> by default, runs/<config> for compare
  --distributed auto     train or eval as one of several processes that Slurm, Kubernetes, Open MPI or a TPU started
  --distributed HOST:PORT,PROCESSES,INDEX    the same, told which: process 0's machine and a free port on it
  --profile              write a trace of a few training steps into WORKDIR/profile, for TensorBoard or Perfetto
  --config.FIELD=VALUE   sets a field of the config, such as --config.train.batch_size=64; configs/base.py has them all

Models: regnet20_convlstm, regnet56_convgru, se_resnet20, …; see regnet_flax.list_models().
"""


def run(argv: Sequence[str]) -> None:
    """Does what the command line says, and raises what goes wrong."""
    if any(arg in ("-h", "--help", "-help", "--helpfull") for arg in argv):
        print(USAGE, end="")
        return
    xla_flags.set_defaults()
    config, values = parse(argv)

    from regnet_flax.training import parallel
    from regnet_flax.training.display import log_to_console

    if values.distributed:
        if values.mode not in ("train", "eval"):
            raise UsageError(f"--distributed is for --mode train and eval: leave it out with {values.mode}")
        parallel.initialize(values.distributed)
    log_to_console(logging.INFO if not values.distributed or parallel.is_primary() else logging.WARNING)
    if values.mode == "summary":
        _summary(config)
        return

    from regnet_flax.modes import evaluate, setup, train

    if values.mode == "train":
        train.train_and_evaluate(config, values.workdir, profile=values.profile)
    elif values.mode == "compare":
        from regnet_flax.modes import compare

        compare.compare(config, values.workdir, train.train_and_evaluate)
    elif values.mode == "benchmark":
        import json

        import jax

        from regnet_flax.modes import benchmark

        config.dataset.data_dir = config.dataset.data_dir or "."  # nothing is read
        print(json.dumps(benchmark.benchmark(config, jax.local_devices())))
    elif values.mode == "export":
        from regnet_flax.modes import export

        model, variables, step = setup.load_trained(config, values.workdir)
        export.export_model(config, model, variables, step, values.workdir)
    elif values.mode == "predict":
        from regnet_flax.modes import predict

        with contextlib.redirect_stdout(sys.stderr) if config.predict.json else contextlib.nullcontext():
            model, variables, step = setup.load_trained(config, values.workdir)
            result = predict.predict_images(config, model, variables, step, values.workdir)
        predict.show(result, config.predict.json)
    else:
        evaluate.evaluate_only(config, values.workdir)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 0 done, 1 failed, 2 wrong input, 128 + n stopped by signal n."""
    from regnet_flax.training import parallel

    try:
        code = _exit_code(argv)
    except Exception:
        if not parallel.joined():
            raise
        traceback.print_exc()
        code = 1
    if code in (1, 2) and parallel.joined():
        parallel.end(code)
    return code


def _exit_code(argv: Sequence[str] | None) -> int:
    try:
        run(sys.argv[1:] if argv is None else argv)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except Error as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno is None:
            raise
        place = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{place}: make room or fix it, and run the same command again", file=sys.stderr)
        return 1
    return 0


def console() -> NoReturn:
    """Runs the command line and ends the process with its exit code."""
    code = main()
    if code == 1:
        # The threads of a save that failed wait minutes for each other, and Python waits for them.
        for child in multiprocessing.active_children():
            child.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    console()
