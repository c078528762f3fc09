"""The paper's CIFAR recipe on CIFAR-100; the paper reports up to 2.04 points less error with a regulator.

python -m regnet_flax.main --config configs/cifar100.py:regnet20_convgru
"""

from configs import cifar10


def get_config(model: str = "regnet20_convlstm"):
    config = cifar10.get_config(model)
    config.dataset.name = "cifar100"
    return config
