"""The report: one HTML file of a whole study, which needs no network and no script."""
