"""RegNet, self-regulated networks for image classification (arXiv 2101.00590), in JAX and Flax linen."""

from regnet_flax.models.registry import create_model, list_models

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models"]
