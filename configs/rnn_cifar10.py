"""The recipe of a public project's ResNet with a recurrent cell in each block, on CIFAR-10: no augmentation.

    python -m regnet_flax.main --config configs/rnn_cifar10.py
    python -m regnet_flax.main --config configs/rnn_cifar10.py:resnet_rnn20_convgru
    python -m regnet_flax.main --config configs/rnn_cifar10.py:resnet20

It reports 86.0 to 86.3 % test accuracy for its ResNet-20.
"""

from configs import base


def get_config(model: str = "resnet_rnn20_convrnn"):
    config = base.get_config()
    config.model.name = model
    if model.startswith(("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")):
        config.model.overrides.init = "torch"  # all of the project's models start from PyTorch's initial values
    config.dataset.name = "cifar10"
    config.dataset.mean = (0.5,)
    config.dataset.std = (0.5,)
    config.train.batch_size = 64
    config.train.epochs = 150
    config.optimizer.boundaries = (80,)
    return config
