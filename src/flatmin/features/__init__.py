"""Runs frozen layers and keeps their activations on disk."""
