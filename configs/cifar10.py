"""The paper's CIFAR recipe on CIFAR-10 (arXiv 2101.00590, section IV; arXiv 1512.03385, section 4.2).

    python -m regnet_flax.main --config configs/cifar10.py
    python -m regnet_flax.main --config configs/cifar10.py:regnet56_convgru

Test error in the paper's table III: ResNet-20 8.38 %, RegNet-20 7.60 % (ConvRNN), 7.42 % (ConvGRU), 7.28 % (ConvLSTM).
"""

from configs import base


def get_config(model: str = "regnet20_convlstm"):
    config = base.get_config()
    config.model.name = model
    config.dataset.name = "cifar10"
    config.dataset.augment = ("crop", "flip")
    return config
