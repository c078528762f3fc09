"""A RegNet on scikit-learn's 1,797 handwritten digits, 8×8 pixels: real data, nothing to download.

    python -m regnet_flax.main

The default config.
"""

from configs import base


def get_config(model: str = "regnet20_convlstm"):
    config = base.get_config()
    config.model.name = model
    config.dataset.name = "digits"
    config.train.batch_size = 32
    config.train.epochs = 25
    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 5e-3  # so few images need more than the paper's 1e-4
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.schedule = "cosine"
    config.eval.batch_size = 360
    config.log.every_steps = 0
    return config
