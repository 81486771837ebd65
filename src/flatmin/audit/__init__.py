"""Looks for what makes figures untrue: near duplicates, wrong labels, rare classes."""
