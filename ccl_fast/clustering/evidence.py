"""Evidence of Gaussian clusters under a normal-inverse-Wishart prior, from counts, sums and Gram matrices alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ccl_fast.errors import ArgumentError
from ccl_fast.ops import segment_gram


def cluster_moments(x: Tensor, ids: Tensor, n_clusters: int) -> Tensor:
    """Return the Gram matrices of the clusters' rows [n, d], with a 1 at their end: float64 [k, d + 1, d + 1].

    They add up: those of two clusters together are the sum. Ids [n], below 0 for none.
    """
    return segment_gram(torch.cat((x.double(), x.new_ones(len(x), 1, dtype=torch.float64)), 1), ids, n_clusters)


def log_evidence(moments: Tensor, kappa: float, psi: float) -> Tensor:
    r"""Log density of the rows of each cluster, mean and covariance integrated out: [k].

    .. math::
        \ell = -\tfrac{n d}{2} \log \pi + \log \tfrac{\Gamma_d(\nu_n / 2)}{\Gamma_d(\nu / 2)}
            + \tfrac{\nu}{2} \log |\Psi| - \tfrac{\nu_n}{2} \log |\Psi_n| + \tfrac{d}{2} \log \tfrac{\kappa}{\kappa_n}

    with nu = d + 1, Psi = psi I, a prior mean of 0, :math:`\kappa_n = \kappa + n`, :math:`\nu_n = \nu + n` and
    :math:`\Psi_n = \Psi + G - S S^T / \kappa_n`, of Gram matrix G and sum S. Murphy, "Conjugate Bayesian analysis of
    the Gaussian distribution", 2007.
    """
    d = moments.shape[1] - 1
    n, sums, grams = moments[:, -1, -1], moments[:, -1, :-1], moments[:, :-1, :-1]
    nu, kappa_n = d + 1, kappa + n
    scatter = grams - sums[:, :, None] * sums[:, None] / kappa_n[:, None, None]
    factor, failed = torch.linalg.cholesky_ex(scatter + psi * torch.eye(d, dtype=scatter.dtype, device=scatter.device))
    if failed.any():
        least = torch.finfo(grams.dtype).eps * float(grams.diagonal(dim1=1, dim2=2).max())
        raise ArgumentError(f"psi: expected more than the rounding of the data's squares, {least:.0e}, got {psi:g}")
    log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
    gammas = torch.mvlgamma((nu + n) / 2, d) - torch.mvlgamma(torch.full_like(n, nu / 2), d)
    priors = nu * d * math.log(psi) / 2 + d / 2 * (math.log(kappa) - kappa_n.log())
    return gammas + priors - n * d / 2 * math.log(math.pi) - (nu + n) / 2 * log_det


def log_posterior(moments: Tensor, kappa: float, psi: float) -> Tensor:
    """Return log Gamma(n) + log evidence of each cluster [k], 0 of an empty one: their sum is a partition's.

    A Dirichlet process of concentration 1 gives a partition a probability proportional to the product of Gamma(n).
    """
    n = moments[:, -1, -1]
    return torch.where(n > 0, torch.lgamma(n.clamp(min=1)) + log_evidence(moments, kappa, psi), 0.0)
