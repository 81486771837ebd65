"""Trains the layers after the split."""
