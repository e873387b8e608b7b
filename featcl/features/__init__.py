"""From a sparse autoencoder to named directions: SAE sources, training, checking, selection, control bases."""

from featcl.features.check import SAEHealth, check_sae
from featcl.features.controls import pca_directions, random_directions, random_features
from featcl.features.directions import Directions
from featcl.features.encoder import FeatureEncoder
from featcl.features.saelens import load_sae
from featcl.features.selectors import select_features
from featcl.features.tokens import read_texts
from featcl.features.training import SAESettings, TrainedSAE, train_from_files, train_saes

__all__ = [
    "Directions",
    "FeatureEncoder",
    "SAEHealth",
    "SAESettings",
    "TrainedSAE",
    "check_sae",
    "load_sae",
    "pca_directions",
    "random_directions",
    "random_features",
    "read_texts",
    "select_features",
    "train_from_files",
    "train_saes",
]
