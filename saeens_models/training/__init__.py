"""Training of SAEs on a stream of activations."""

from saeens_models.training.config import TrainingConfig
from saeens_models.training.loop import train, train_boosting_concurrently
from saeens_models.training.trainer import CurvePoint, NonFiniteLossError, SAETrainer, load_kernels

__all__ = ["CurvePoint", "NonFiniteLossError", "SAETrainer", "TrainingConfig", "load_kernels", "train", "train_boosting_concurrently"]
