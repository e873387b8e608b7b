"""From a sparse autoencoder to named directions: SAE sources, training, checking, selection, control bases."""

from featcl.features.bridge import as_bridge
from featcl.features.bundle import Bundle, bundle_names
from featcl.features.check import SAEHealth, check_sae
from featcl.features.controls import pca_directions, random_directions, random_features
from featcl.features.directions import Directions
from featcl.features.encoder import FeatureEncoder
from featcl.features.explanations import fetch_explanations
from featcl.features.select import select_features
from featcl.features.show import FeatureDashboard, FeatureDashboards, show
from featcl.features.sources import load_sae
from featcl.features.tokens import read_documents, read_texts
from featcl.features.training import SAESettings, TrainedSAE, train_from_files, train_like, train_saes
from featcl.features.validation import Validation, validate

__all__ = [
    "Bundle",
    "Directions",
    "FeatureDashboard",
    "FeatureDashboards",
    "FeatureEncoder",
    "SAEHealth",
    "SAESettings",
    "TrainedSAE",
    "Validation",
    "as_bridge",
    "bundle_names",
    "check_sae",
    "fetch_explanations",
    "load_sae",
    "pca_directions",
    "random_directions",
    "random_features",
    "read_documents",
    "read_texts",
    "select_features",
    "show",
    "train_from_files",
    "train_like",
    "train_saes",
    "validate",
]
