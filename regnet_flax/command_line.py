"""Reads the command line: flags, the config file, and the config stored in a workdir."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from regnet_flax.config.files import DEFAULT_CONFIG, find_config, provide_configs
from regnet_flax.errors import ConfigError, UsageError
from regnet_flax.places import fetch, in_bucket, located

_IN_CONFIG = "Error whilst parsing config file"  # ml_collections writes this before a traceback
# These modes take the config from the command line only; the others take it from the workdir's config.json.
BEGIN = ("train", "compare")


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line's options other than the config.

    Attributes:
      mode: what to do.
      workdir: the run's directory.
      distributed: "", or how this process finds the others; see `parallel.initialize`.
      profile: whether to write a trace of a few training steps into the workdir.
    """

    mode: str
    workdir: str
    distributed: str = ""
    profile: bool = False


def usage(modes: Sequence[str]) -> str:
    """Returns the text of --help."""
    return f"""\
usage: python -m regnet_flax.main [--config FILE] [--mode MODE] [--workdir DIR] [--config.FIELD=VALUE …]

  --config FILE          a config file, or FILE:MODEL for another model; {DEFAULT_CONFIG} by default
  --mode MODE            {", ".join(modes)}; train by default. Interrupted runs resume: run train again
  --workdir DIR          the run's directory; runs/<config>-<model>-<seed> by default, runs/<config> for compare,
                         runs/<file> for model.init_from without a run; for your own images, the folder's name
                         follows <config>; gs://… and s3://… work too
  --distributed auto     train or eval as one of several processes that Slurm, Kubernetes, Open MPI or a TPU started
  --distributed HOST:PORT,PROCESSES,INDEX    the same, set by hand: process 0's machine and a free port on it
  --profile              write a trace of a few training steps into WORKDIR/profile, for TensorBoard or Perfetto
  --config.FIELD=VALUE   sets a field of the config, such as --config.train.batch_size=64
  --helpfields           lists the fields of a config

Compiled programs are kept in your cache directory, 1 GB at most; JAX_ENABLE_COMPILATION_CACHE=false turns that off.
Models: regnet20_convlstm, regnet56_convgru, se_resnet20, …; see regnet_flax.list_models().
"""


def parse(argv: Sequence[str], modes: Sequence[str]) -> tuple[Any, Options]:
    """Reads the command line.

    Args:
      argv: the arguments, without the program's name.
      modes: the values that --mode takes.

    Returns:
      The locked config and the other flags. Modes other than train and compare take the config from the workdir's
      config.json if there is one; overrides on the command line take precedence.

    Raises:
      UsageError: a flag, field or value is wrong.
    """
    from absl import flags
    from ml_collections import config_flags

    name, rest = _take_config(argv)
    _check_fields(rest)
    file = find_config(name)
    provide_configs(file.partition(":")[0])
    # ml_collections requires the file before the overrides.
    arguments = ["regnet_flax", f"--config={file}", *rest]

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", help_string="config file", flag_values=values, sys_argv=arguments)
    flags.DEFINE_string("workdir", "", "the run's directory: runs/<config>-<model>-<seed> by default", values)
    flags.DEFINE_enum("mode", "train", list(modes), "what to do", values)
    flags.DEFINE_string("distributed", "", "auto, or HOST:PORT,PROCESSES,INDEX, to train with other processes", values)
    flags.DEFINE_bool("profile", False, "write a trace of a few training steps into the workdir", values)
    try:
        left = values(arguments)
    except Exception as error:  # the config is a program and can raise anything
        of_the_config = not isinstance(error, flags.Error) or _IN_CONFIG in str(error)
        if isinstance(error, flags.IllegalFlagValueError) and (wrong := _wrong_field(arguments, str(error))):
            raise UsageError(wrong) from error
        prefix = f"--config {name or DEFAULT_CONFIG}: " if of_the_config else ""
        raise UsageError(prefix + _one_line(error)) from error
    if len(left) > 1:
        raise UsageError(f"{left[1]!r} is not understood: options are written --name=value")

    config, workdir = values.config, values.workdir
    overrides = config_flags.get_override_values(values["config"])
    if values.mode not in BEGIN:  # what a config starts training from is not what its run has become
        for field, none in (("init_from", ""), ("new_head", False), ("adapt_stem", False)):
            if field in config.model:  # a config of one's own may lack it, which check_config says
                config.model[field] = overrides.get(f"model.{field}", none)
    if workdir:
        workdir = located(workdir, "--workdir")
        if values.distributed and in_bucket(workdir):
            raise UsageError(
                f"--workdir is {workdir}: with --distributed it must be a directory that all machines see, such as the "
                "bucket mounted by gcsfuse"
            )
    elif values.mode not in BEGIN and config.model.init_from:  # belongs to no run: it gets its own directory
        from regnet_flax.port.weights import SUFFIXES

        name = pathlib.Path(config.model.init_from).name
        workdir = str(pathlib.Path("runs", next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), name)))
    else:
        parts = [pathlib.Path(file.partition(":")[0]).stem]
        if config.dataset.name == "folder" and config.dataset.data_dir:  # two folders are two runs
            parts.append(pathlib.Path(located(config.dataset.data_dir, "dataset.data_dir")).resolve().name)
        if values.mode != "compare":
            parts += [config.model.name, str(config.seed)]
        workdir = str(pathlib.Path("runs") / "-".join(filter(None, parts)))
    if values.mode not in BEGIN:
        _take_stored(config, workdir, overrides)
    for name in ("dataset.data_dir", "model.init_from", "export.path"):
        section, _, field = name.partition(".")
        if str(config[section][field]).startswith("~"):
            config[section][field] = located(config[section][field], name)
    return config, Options(values.mode, workdir, values.distributed, values.profile)


def _take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the value of --config, None if it is not given, and the other arguments."""
    names = [arg for arg in argv if re.match(r"--?config(=|$)", arg)]
    rest = list(argv)
    if not names:
        return None, rest
    if len(names) > 1:
        raise UsageError("--config is given more than once")
    index = rest.index(names[0])
    _, equals, name = rest.pop(index).partition("=")
    if equals:
        return name, rest
    if index == len(rest):
        raise UsageError("--config needs a file, such as --config configs/cifar10.py")
    return rest.pop(index), rest


def _check_fields(arguments: Sequence[str]) -> None:
    """Raises UsageError for an override of an unknown field; the message names the nearest ones."""
    names = [match[1] for arg in arguments if (match := re.match(r"--?(?:no)?config\.([^=\[\s]+)", arg))]
    if not names:
        return
    from regnet_flax.config.fields import FIELDS

    for name in names:
        if name in FIELDS:
            continue
        if inside := [field for field in FIELDS if field.startswith(f"{name}.")]:
            raise UsageError(f"{name} is a group of fields: set one of them, such as --config.{inside[0]}=VALUE")
        last = name.rpartition(".")[2]
        near = [field for field in FIELDS if field.rpartition(".")[2] == last]
        near = near or difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.7)
        if not near:
            lasts = {field.rpartition(".")[2]: field for field in FIELDS}
            near = [lasts[close] for close in difflib.get_close_matches(last, lasts, n=1)]
        raise UsageError(
            f"no field {name}; " + (f"did you mean {' or '.join(near)}?" if near else "--helpfields lists them")
        )


def _take_stored(config: Any, workdir: str, overrides: dict[str, Any]) -> None:
    """Sets the config to the workdir's config.json, if there is one, and applies the overrides."""
    from regnet_flax.config.resolve import fill_in
    from regnet_flax.training.workdir import CONFIG, read_plain_config

    stored = read_plain_config(fetch(workdir, CONFIG))
    if not stored:
        return
    try:
        fill_in(config, stored)
    except (AttributeError, KeyError, TypeError, ConfigError) as error:
        raise UsageError(
            f"{workdir}/{CONFIG} does not fit this version ({_one_line(error)}): restore it, or name another --workdir"
        ) from error
    config.update_from_flattened_dict(overrides)


def _wrong_field(arguments: Sequence[str], problem: str) -> str:
    """Explains a value that absl could not parse, in check_config's words; "" if it belongs to no field."""
    from regnet_flax.config.fields import FIELDS

    for argument in arguments:
        name, _, value = argument.lstrip("-").partition("=")
        field = name.removeprefix("config.")
        if field in FIELDS and problem.startswith(f"flag --{name}={value}: "):
            return f"{field} is {value!r}: it must be {FIELDS[field].check(value) or 'of another type'}"
    return ""


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if any(_IN_CONFIG in line for line in lines):
        lines = lines[-1:]  # the last line of a traceback
    return " ".join(lines) or type(error).__name__
