"""Training of SAEs on a stream of activations."""

from saeens_models.training.checkpoints import CheckpointError, Checkpoints, SeekableBatches, checkpoint_bytes, recipes_in
from saeens_models.training.config import TrainingConfig
from saeens_models.training.loop import train, train_boosting_concurrently
from saeens_models.training.prefetch import on_device
from saeens_models.training.trainer import CurvePoint, NonFiniteLossError, SAETrainer, load_kernels

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "CurvePoint",
    "NonFiniteLossError",
    "SAETrainer",
    "SeekableBatches",
    "TrainingConfig",
    "checkpoint_bytes",
    "load_kernels",
    "on_device",
    "recipes_in",
    "train",
    "train_boosting_concurrently",
]
