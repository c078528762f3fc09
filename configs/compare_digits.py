"""Small RegNets against a ResNet on scikit-learn's digits: no download, less than half an hour on two CPU cores.

python -m regnet_flax.main --mode compare --config configs/compare_digits.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.model.overrides.width = 8
    config.train.epochs = 15
    config.compare.models = ("resnet14", "regnet14_convrnn", "regnet14_convgru", "regnet14_convlstm")
    config.compare.seeds = (0, 1, 2, 3, 4)
    return config
