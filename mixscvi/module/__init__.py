"""scvi-tools' module contract on the mixture core.

| file | holds |
| --- | --- |
| options | what posterior, prior and objective are made of |
| vae | the mixture's module |
| scvi_vae | scvi-tools' own module with importance sampling |
| label_prior | the prior of z that labels below it make |
| semi_supervised | scANVI's modules: labels of some of the cells |
| signatures, devices | the signatures that scvi-tools reads, and minibatches where the module is |
| encoding | from scvi-tools' inputs to the core's encoders |
| decoding | from draws and covariates to the likelihood of the counts |
| sampling | importance sampling of log p(x) |
| adapting | from the encoder's posterior of a cell to its exact one |
| densities | moments and densities without a closed form |
| factorized | the mixture posterior as scvi-tools reads it |
| pseudo_cells | the VampPrior's inputs |
"""

from mixscvi.module.decoding import CountLikelihood, decode
from mixscvi.module.factorized import FactorizedMixture
from mixscvi.module.label_prior import LabelPrior
from mixscvi.module.options import MixtureOptions
from mixscvi.module.pseudo_cells import PseudoCells
from mixscvi.module.sampling import FORMS, ImportanceSampling
from mixscvi.module.scvi_vae import FusedVAE, ScviVAE
from mixscvi.module.semi_supervised import FusedSCANVAE, MixSCANVAE, ScviSCANVAE
from mixscvi.module.vae import MixVAE

__all__ = [
    "FORMS",
    "CountLikelihood",
    "FactorizedMixture",
    "FusedSCANVAE",
    "FusedVAE",
    "ImportanceSampling",
    "LabelPrior",
    "MixSCANVAE",
    "MixVAE",
    "MixtureOptions",
    "PseudoCells",
    "ScviSCANVAE",
    "ScviVAE",
    "decode",
]
