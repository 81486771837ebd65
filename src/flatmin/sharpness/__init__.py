"""How sharp a minimum is: loss rises, the Hessian's largest eigenvalues and trace, and the loss along lines.

Everything is computed from the mean loss over a fixed sample, in inference mode, as a function of the trained weights,
which are laid out as one vector. No variable is changed. The package imports `flatmin.sam` and nothing else of Flatmin.
"""

from .hessian import largest_eigenpairs, trace
from .measures import (
    EIGENVALUES,
    Sharpness,
    adaptive_sharpness,
    filter_normalised,
    line,
    measure,
    relative_flatness,
    rise,
)
from .surface import Batch, Derivatives, Surface, flattened

__all__ = [
    "EIGENVALUES",
    "Batch",
    "Derivatives",
    "Sharpness",
    "Surface",
    "adaptive_sharpness",
    "filter_normalised",
    "flattened",
    "largest_eigenpairs",
    "line",
    "measure",
    "relative_flatness",
    "rise",
    "trace",
]
