"""Figures of mixture posteriors and their diagnostics.

Each function draws on given axes, or new ones, and returns them; ``show=True`` shows the figure
instead, and ``save`` writes it to a file. Colors can be told apart by color-blind readers.

| file | holds |
| --- | --- |
| drawing | axes, colors, showing and saving |
| cells | the posterior of one cell |
| latents | component means, divergence, weights of adapted components |
| reliability | k-hat, effective sample sizes, before and after adaptation; calibration |
| expression | differential expression |
| training | training curves |
"""

from mixscvi.pl.cells import posterior
from mixscvi.pl.expression import volcano
from mixscvi.pl.latents import component_means, component_weights, divergence
from mixscvi.pl.reliability import adaptation, calibration, reliability
from mixscvi.pl.training import training

__all__ = [
    "adaptation",
    "calibration",
    "component_means",
    "component_weights",
    "divergence",
    "posterior",
    "reliability",
    "training",
    "volcano",
]
