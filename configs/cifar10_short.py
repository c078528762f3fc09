"""CIFAR-10 in 15 epochs instead of 200, for a CPU: five models, three seeds each.

    python -m regnet_flax.main --config configs/cifar10_short.py:resnet20
    python -m regnet_flax.main --mode compare --config configs/cifar10_short.py

The optimiser is not the paper's: batches of 64, cosine after one epoch of warm-up, Nesterov's momentum and more weight
decay, as is usual for short runs. So its errors cannot be compared with those of the paper's table III, only with each
other. 2,000 training images are held out to choose the checkpoint; the test images are read once, at the end.

The recipe was chosen by the accuracy of ResNet-20 alone, on 5,000 held-out images after four epochs, one seed each.
Batches of 128 reached 76.9 %, or 77.2 % with label smoothing of 0.1. Batches of 64 reached 79.0 %, or 77.5 % with half
the learning rate.
"""

from configs import cifar10

MODELS = ("resnet20", "regnet20_convlstm", "regnet20_convgru", "regnet20_convlstm fuse_init=identity", "se_resnet20")


def get_config(model: str = "regnet20_convlstm"):
    config = cifar10.get_config(model)
    config.dataset.validation = 2000
    config.train.epochs = 15
    config.train.batch_size = 64
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 1.0
    config.compare.models = MODELS
    config.compare.together = "apart"
    return config
