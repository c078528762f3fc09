"""Your own photographs, a few hundred of any size: DIR/train/<class>/* and DIR/test/<class>/*, or DIR/<class>/*.

    python -m regnet_flax.main --config configs/folder.py --config.dataset.data_dir=DIR
    python -m regnet_flax.main --config configs/folder.py:resnet18,finetune --config.dataset.data_dir=DIR \
        --config.model.init_from=resnet18.pth

If there is a DIR/val/ beside DIR/test/, it chooses the best checkpoint.

Photographs keep their aspect ratio: training uses random crops, flips and TrivialAugment, testing the centre.
`finetune` starts from weights for 224×224 images, such as torchvision's ResNets, with a new head. Neither its accuracy
nor that of training from scratch has been measured. configs/rnn_photos.py has a public project's recipe, which is
faster.
"""

from configs import base

CROP = "random_resized_crop"


def get_config(model: str = "regnet20_convlstm"):
    model, _, recipe = model.partition(",")
    if recipe not in ("", "finetune"):
        raise ValueError(f"the recipe is {recipe!r}: it must be finetune, as in configs/folder.py:{model},finetune")
    config = base.get_config()
    config.model.name = model
    config.dataset.name = "folder"
    config.dataset.image_size = 96
    config.dataset.augment = (CROP, "flip", "trivialaugment")
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
    if recipe == "finetune":
        config.model.new_head = True
        config.dataset.image_size = 224
        config.dataset.augment = (CROP, "flip")
        config.dataset.mean = (0.485, 0.456, 0.406)  # torchvision's
        config.dataset.std = (0.229, 0.224, 0.225)
        config.train.epochs = 15
        config.optimizer.learning_rate = 0.005
        config.optimizer.weight_decay = 1e-4
        config.optimizer.warmup_epochs = 1.0
        config.eval.every_epochs = 1
    return config
