"""Continual-learning methods, rivals and add-ons: one small file each, one interface (`method.py`)."""
