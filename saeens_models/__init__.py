"""Sparse autoencoders, their ensembles, training and metrics, in plain PyTorch."""

from saeens_models import interop, metrics
from saeens_models.architectures import SAE, SAEConfig, SAESettings, build_sae, save_sae
from saeens_models.consensus import Cluster, Consensus, consensus
from saeens_models.ensembles import Bagging, Boosting, Ensemble, load_ensemble, save_ensemble
from saeens_models.interop import load_sae
from saeens_models.steering import ablate, steer
from saeens_models.synthetic import SyntheticActivations
from saeens_models.training import Checkpoints, TrainingConfig, train, train_boosting_concurrently

__all__ = [
    "SAE",
    "Bagging",
    "Boosting",
    "Checkpoints",
    "Cluster",
    "Consensus",
    "Ensemble",
    "SAEConfig",
    "SAESettings",
    "SyntheticActivations",
    "TrainingConfig",
    "ablate",
    "build_sae",
    "consensus",
    "interop",
    "load_ensemble",
    "load_sae",
    "metrics",
    "save_ensemble",
    "save_sae",
    "steer",
    "train",
    "train_boosting_concurrently",
]
