"""Reads records, augments images and makes batches of them."""
