"""How many rows each prototype gets, softly."""

from torch import Tensor

from ccl_fast.checks import check_floating, check_matrix, check_same, check_scale
from ccl_fast.ops.backends import ContrastBackend
from ccl_fast.ops.logsumexp.operator import streaming_logsumexp


def assignment_mass(z: Tensor, centers: Tensor, *, scale: float | Tensor, backend: ContrastBackend = "auto") -> Tensor:
    r"""Sum over rows of their softmax over prototypes.

    .. math::
        m_k = \sum_i p_{ik}, \qquad p_i = \mathrm{softmax}_k(\mathrm{scale} \cdot \langle z_i, c_k \rangle)

    Gradients flow to ``z``, ``centers`` and ``scale``. It is two streaming log-sum-exps, of the rows over the
    prototypes, and of the prototypes over the rows less these: memory is linear in n and k. A second derivative raises
    (only ``backend="reference"`` has one).

    Args:
        z: ``[n, d]``, float64, float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype.
        centers: ``[k, d]``, same dtype and device.
        scale: the inverse temperature, a number or a tensor of one element (it may require a gradient).
        backend: of the streaming log-sum-exp: "auto", "triton", "blocked" or "reference".

    Returns:
        ``[k]``, float32 (float64 for float64 input); the sum is n. Without rows 0.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the backend cannot run here.
    """
    return log_assignment_mass(z, centers, scale=scale, backend=backend).exp()


def log_assignment_mass(
    z: Tensor, centers: Tensor, *, scale: float | Tensor, backend: ContrastBackend = "auto"
) -> Tensor:
    """Logarithm of `assignment_mass`: finite wherever there is a row, as for an entropy. Arguments are the same."""
    check_scale("scale", scale)
    check_matrix("z", z)
    check_floating("z", z)
    check_matrix("centers", centers, columns=z.shape[1])
    check_same("centers", centers, "z", z)
    logsumexp = streaming_logsumexp(z, centers, scale=scale, backend=backend)
    return streaming_logsumexp(centers, z, scale=scale, key_bias=-logsumexp, backend=backend)
