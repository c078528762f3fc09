"""The paper's CIFAR recipe on CIFAR-100. Error in its table III: RegNet-20 29.69 to 30.03 %, ResNet-20 31.72 %.

python -m regnet_flax.main --config configs/cifar100.py:regnet20_convgru
"""

from configs import cifar10


def get_config(model: str = "regnet20_convlstm"):
    config = cifar10.get_config(model)
    config.dataset.name = "cifar100"
    return config
