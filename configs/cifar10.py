"""The paper's CIFAR recipe on CIFAR-10 (arXiv 2101.00590, section IV; arXiv 1512.03385, section 4.2).

    python -m regnet_flax.main --config configs/cifar10.py
    python -m regnet_flax.main --config configs/cifar10.py:regnet56_convgru

He et al. report 8.75 % test error for ResNet-20; the paper, up to 1.51 points less with a regulator.
"""

from configs import base


def get_config(model: str = "regnet20_convlstm"):
    config = base.get_config()
    config.model.name = model
    config.dataset.name = "cifar10"
    config.dataset.augment = ("crop", "flip")
    return config
