"""Builds backbones and classifiers, loads weights, splits a network."""
