"""Errors, files, the console, the params schema and the frame of every stage."""
