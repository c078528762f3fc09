"""The defaults, which every other config starts from and changes.

The fields, each with its default, what it must be and what it means, are the rows of regnet_flax/config/fields.py;
`python -m regnet_flax.main --helpfields` lists them. Override a field on the command line with
--config.train.batch_size=64; a tuple with --config.dataset.mean='(0.5,)'.
"""

from regnet_flax.config import fields


def get_config():
    return fields.default_config()
