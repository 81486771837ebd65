"""Reads a data set and writes it as records: the prepare stage."""
