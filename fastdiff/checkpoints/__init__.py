"""Models, classifiers and training states in folders, written whole or not at all."""
