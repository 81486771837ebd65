"""Chooses by val: the backbone to fine-tune, a temperature, and the classifier that is released."""
