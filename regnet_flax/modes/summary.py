"""--mode summary: the size of a config's model as a table; --mode models: the names of all models."""

from __future__ import annotations

from typing import Any

from regnet_flax.analysis import summary
from regnet_flax.command_line import Options
from regnet_flax.config.check import check_config, image_shape, model_options
from regnet_flax.errors import ConfigError
from regnet_flax.models.plugins import import_plugins
from regnet_flax.models.registry import create_model, list_models
from regnet_flax.training.display import say_table


def run(config: Any, options: Options) -> None:
    """Prints parameters, multiply-adds and the output shape of each stage; reads no data set.

    With --mode models, it prints the names of all models instead.

    Raises:
      ConfigError: a value is wrong.
    """
    if options.mode == "models":
        try:
            import_plugins(config.model.plugins)
        except ValueError as error:
            raise ConfigError(f"model.plugins: {error}") from error
        print("\n".join(list_models()))
        return
    config.dataset.data_dir = config.dataset.data_dir or "."  # nothing is read
    check_config(config)
    shape, classes = image_shape(config)
    model = create_model(config.model.name, num_classes=classes, **model_options(config))
    title = f"{config.model.name}, images of {'×'.join(map(str, shape))}, {model.num_classes} classes"
    say_table(summary.table(summary.summarize(model, shape), title))
