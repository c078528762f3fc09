"""The defaults. Every other config starts from them and changes some.

The fields, with their defaults, valid values and meanings, are the rows of regnet_flax/config/fields.py;
`python -m regnet_flax.main --helpfields` lists them. Override a field on the command line with
--config.train.batch_size=64; a tuple with --config.dataset.mean='(0.5,)'.
"""

from regnet_flax.config import fields


def get_config():
    return fields.default_config()
