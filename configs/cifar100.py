"""The paper's CIFAR recipe on CIFAR-100.

    python -m regnet_flax.main --config configs/cifar100.py:regnet20_convgru

Test error in the paper's table III: ResNet-20 31.72 %, RegNet-20 29.69 to 30.03 %.
"""

from configs import cifar10


def get_config(model: str = "regnet20_convlstm"):
    config = cifar10.get_config(model)
    config.dataset.name = "cifar100"
    return config
