"""CIFAR-10 in 20 epochs instead of 200, for two CPU cores: RegNet-20 and ResNet-20, three seeds each.

    python -m regnet_flax.main --config configs/cifar10_short.py:resnet20
    python -m regnet_flax.main --mode compare --config configs/cifar10_short.py

The optimiser is not the paper's: cosine after one epoch of warm-up, Nesterov's momentum and more weight decay, as is
usual for short runs. So its errors cannot be compared with those of the paper's table III, only with each other.
Label smoothing is not used: with 0.1, ResNet-20 reached 77.2 instead of 76.9 % of 5,000 held-out images in four epochs
(one seed), which is no clear gain.
"""

from configs import cifar10

MODELS = ("resnet20", "regnet20_convlstm", "regnet20_convgru", "regnet20_convlstm fuse_init=identity", "se_resnet20")


def get_config(model: str = "regnet20_convlstm"):
    config = cifar10.get_config(model)
    config.train.epochs = 20
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 1.0
    config.compare.models = MODELS
    return config
