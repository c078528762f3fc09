"""The recipe of a public project's RegNet on CIFAR-10: 10 epochs at a constant rate.

    python -m regnet_flax.main --config configs/proj_cifar10.py

It reports no accuracy. The last batch of an epoch is smaller there; here the remainder is skipped.
"""

from configs import cifar10


def get_config(model: str = "regnet_proj_cifar"):
    config = cifar10.get_config(model)
    config.dataset.mean = (0.4914, 0.4822, 0.4465)
    config.dataset.std = (0.2023, 0.1994, 0.2010)
    config.train.epochs = 10
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "constant"
    return config
