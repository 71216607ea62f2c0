"""How embeddings lie on the sphere: spread over it, and close within a class."""

import math

from torch import Tensor

from ccl_fast.checks import check_floating, check_matrix, check_positive
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.batch import check_ids
from ccl_fast.ops import same_id_similarity, streaming_logsumexp
from ccl_fast.ops.backends import ContrastBackend
from ccl_fast.ops.ids import separate_unassigned
from ccl_fast.ops.normalize import normalize_embeddings


def uniformity(embeddings: Tensor, *, t: float = 2.0, backend: ContrastBackend = "auto") -> Tensor:
    r"""Measure the logarithm of the mean Gaussian potential of all pairs of rows: the lower, the more uniform.

    .. math::
        \log \frac{1}{n (n - 1)} \sum_{i \ne j} e^{-t |z_i - z_j|^2}, \qquad
        -t |z_i - z_j|^2 = 2 t \langle z_i, z_j \rangle - 2 t

    with z the embeddings at unit length. Between -4t (no two rows nearer than opposite points) and 0 (all rows equal).
    Memory is linear in n. Differentiable (once), so it is a loss as well as a measure.

    Wang, Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere" (arXiv:2005.10242); Wang, Liu, "Understanding the Behaviour of Contrastive Loss" (arXiv:2012.09740),
    which reports its negative.

    Args:
        embeddings: ``[n, d]``, at least two rows; float64, float32, bfloat16, float16.
        t: > 0.
        backend: of the streaming log-sum-exp: "auto", "triton", "blocked" or "reference".

    Cost:
        operators: LSE with scale 2 t.
        units: 2 of N x N x D.

    Returns:
        A number, float32 (float64 for float64 embeddings).

    Raises:
        ValueError: an argument has the wrong type, shape, dtype or value.

    Example:
        >>> import torch
        >>> from ccl_fast.metrics import uniformity
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), t=2.0)
        tensor(-8.)
    """
    check_matrix("embeddings", embeddings)
    check_floating("embeddings", embeddings)
    check_positive("t", t)
    n = len(embeddings)
    if n < 2:
        raise ArgumentError(f"embeddings: expected at least two rows, got {n}")
    logsumexp = streaming_logsumexp(_unit(embeddings), scale=2.0 * t, backend=backend)
    return logsumexp.logsumexp(0) - (2.0 * t + math.log(n * (n - 1)))


def tolerance(embeddings: Tensor, labels: Tensor) -> Tensor:
    r"""Measure the mean similarity of two rows of the same class: the higher, the more tolerant of near samples.

    .. math::
        \frac{1}{|P|} \sum_{(i, j) \in P} \langle z_i, z_j \rangle, \qquad P = \{(i, j): i \ne j,\ y_i = y_j\}

    with z the embeddings at unit length; O(n d). Wang, Liu, "Understanding the Behaviour of Contrastive Loss"
    (arXiv:2012.09740): there an expectation over samples of one class, read here as the mean over such pairs.

    Args:
        embeddings: ``[n, d]``; float64, float32, bfloat16, float16.
        labels: ``[n]``, integers; -1 is unlabelled, in no pair.

    Cost:
        operators: `same_id_similarity`.
        units: 0.

    Returns:
        A number, float32 (float64 for float64 embeddings); 0 if no class has two rows.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype or device.
        IndexError: a label is below -1 (on a GPU: an assertion on the device).

    Example:
        >>> import torch
        >>> from ccl_fast.metrics import tolerance
        >>> tolerance(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 0, 1]))
        tensor(1.)
    """
    check_matrix("embeddings", embeddings)
    check_floating("embeddings", embeddings)
    check_ids("labels", labels, embeddings)
    similarity, count = same_id_similarity(_unit(embeddings), separate_unassigned(labels.long()))
    return similarity.sum() / count.sum().clamp(min=1)


def _unit(x: Tensor) -> Tensor:
    return normalize_embeddings(x).to(x.dtype)
