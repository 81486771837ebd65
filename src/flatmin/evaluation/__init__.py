"""Scores classifiers on test images and compares them."""
