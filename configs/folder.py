"""Your own photographs, a few hundred of any size: DIR/train/<class>/* and DIR/test/<class>/*, or DIR/<class>/*.

    python -m regnet_flax.main --config configs/folder.py --config.dataset.data_dir=DIR
    python -m regnet_flax.main --config configs/folder.py:regnet20_convlstm,scratch --config.dataset.data_dir=DIR
    python -m regnet_flax.main --config configs/folder.py:resnet18,finetune --config.dataset.data_dir=DIR \
        --config.model.init_from=resnet18.pth

If there is a DIR/val/ beside DIR/test/, it chooses the best checkpoint.

A model for which weights come with the package, such as the default, starts from them, with a new head. Other models,
and all with `scratch`, start from random weights. `finetune` starts from weights of yours for 224×224 images, such as
torchvision's ResNets. docs/results.md has accuracies. Photographs keep their aspect ratio: training takes random crops
and flips them, testing takes the centre. configs/rnn_photos.py has a public project's recipe.
"""

import regnet_flax
from configs import base

CROP = "random_resized_crop"


def get_config(model: str = "regnet20_convlstm"):
    model, _, recipe = model.partition(",")
    if recipe not in ("", "scratch", "finetune"):
        known = f"it must be scratch or finetune, as in configs/folder.py:{model},scratch"
        raise ValueError(f"the recipe is {recipe!r}: {known}")
    config = base.get_config()
    config.model.name = model
    config.dataset.name = "folder"
    config.dataset.image_size = 64
    config.dataset.augment = (CROP, "flip")
    config.train.batch_size = 16  # with few images, large batches would leave few steps
    config.train.epochs = 100
    config.optimizer.learning_rate = 0.05
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.label_smoothing = 0.1
    config.eval.batch_size = 64
    config.eval.every_epochs = 2
    config.log.every_steps = 0
    weights = f"{model}.cifar10"
    if recipe == "finetune":
        config.model.new_head = True
        config.dataset.image_size = 224
        config.dataset.mean = (0.485, 0.456, 0.406)  # torchvision's
        config.dataset.std = (0.229, 0.224, 0.225)
        config.train.epochs = 15
        config.optimizer.learning_rate = 0.005
        config.optimizer.weight_decay = 1e-4
        config.optimizer.warmup_epochs = 1.0
        config.eval.every_epochs = 1
    elif not recipe and weights in regnet_flax.list_weights():
        config.model.init_from = weights
        config.model.new_head = True
        config.dataset.mean = (0.4913, 0.4822, 0.4466)  # CIFAR-10's
        config.dataset.std = (0.2452, 0.2427, 0.2605)
        config.train.epochs = 15
        config.optimizer.learning_rate = 0.03
        config.optimizer.warmup_epochs = 2.0
        config.eval.every_epochs = 1
    return config
