"""Networks with a recurrence along their depth, RegNet-20 and DIANet-20, against ResNet-20 and the SE networks.

On CIFAR-10, with the paper's recipe.

    python -m regnet_flax.main --mode compare --config configs/compare_recurrence.py
"""

from configs import cifar10


def get_config():
    config = cifar10.get_config("resnet20")
    config.compare.models = ("resnet20", "dia_resnet20", "regnet20_convlstm", "se_resnet20", "se_regnet20_convlstm")
    return config
