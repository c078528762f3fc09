"""The models of two public projects against the paper's, on CIFAR-10, all with the paper's recipe.

    python -m regnet_flax.main --mode compare --config configs/compare_projects.py

The projects' own recipes are configs/proj_cifar10.py and configs/rnn_cifar10.py.
"""

from configs import cifar10


def get_config():
    config = cifar10.get_config("resnet20")
    config.compare.models = (
        "resnet20",
        "regnet20_convrnn",
        "regnet20_convgru",
        "regnet20_convlstm",
        "regnet_proj_cifar",
        "resnet_rnn20_convrnn",
        "resnet_rnn20_convgru",
    )
    return config
