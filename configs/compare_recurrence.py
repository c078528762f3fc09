"""Networks with a recurrence along their depth, on CIFAR-10 with one recipe: RegNet-20, DIANet-20 and ResNet-20.

python -m regnet_flax.main --mode compare --config configs/compare_recurrence.py
"""

from configs import cifar10


def get_config():
    config = cifar10.get_config("resnet20")
    config.compare.models = ("resnet20", "dia_resnet20", "regnet20_convlstm", "se_resnet20", "se_regnet20_convlstm")
    return config
