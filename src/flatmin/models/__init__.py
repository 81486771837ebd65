"""Builds backbones and classifiers, loads weights, and splits networks into frozen and trained layers."""
