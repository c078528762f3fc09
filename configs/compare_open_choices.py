"""The choices that the paper leaves open, changed one at a time, for RegNet-20 with a ConvLSTM on CIFAR-10.

    python -m regnet_flax.main --mode compare --config configs/compare_open_choices.py

The first model has our defaults: only H is batch-normalised, separately in each block; one regulator per stage; X[c] is
paired with H[c]; the fusing convolutions start from He's values. ResNet-20 comes last.
"""

from configs import cifar10

CHANGES = (
    "",
    " normalize_state=hc",
    " normalize_state=none",
    " share_state_norm=True",
    " share_regulator=False",
    " regulator_grouping=contiguous",
    " fuse_init=identity",
)


def get_config():
    config = cifar10.get_config("regnet20_convlstm")
    config.compare.models = (*(f"regnet20_convlstm{change}" for change in CHANGES), "resnet20")
    return config
