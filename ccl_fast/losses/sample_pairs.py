"""Pairs drawn by their inverse propensity."""

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_finite, check_floating, check_matrix, check_same, host_knows
from ccl_fast.errors import ArgumentError


def sample_pairs(semantic: Tensor, surface: Tensor, k: int, *, generator: torch.Generator | None = None) -> Tensor:
    r"""Draw, for each row, candidates that owe their likeness to what they mean, not to how they look.

    Without replacement, with probabilities in proportion to the inverse of a pair's propensity,

    .. math::
        P(j \mid i) \propto 1 / e_{ij}, \qquad e_{ij} = \mathrm{surface}_{ij} / \mathrm{semantic}_{ij}

    so that where the propensity is constant every candidate is as probable. Time and memory are O(n m).

    Miao et al., "DebCSE: Rethinking Unsupervised Contrastive Sentence Embedding Learning in the Debiasing Perspective"
    (arXiv:2309.07396) samples pairs by inverse propensities of both similarities. This is that one step, from the
    abstract alone: the form of the propensity is our own, and nothing else of the method is here.

    Args:
        semantic: ``[n, m]``, similarities of meaning, >= 0; 0 is never drawn. float64, float32, bfloat16 or float16.
        surface: ``[n, m]``, similarities of surface, > 0, such as the share of common words.
        k: how many of each row, at most m.
        generator: of what is drawn, on the device of the similarities; None: torch's own.

    Returns:
        ``[n, k]`` int64: numbers of candidates, different ones.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value, or a row has less than k candidates.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import sample_pairs
        >>> alike = torch.rand(8, 20)
        >>> sample_pairs(alike, 0.1 + alike.flip(1), 3).shape
        torch.Size([8, 3])
    """
    check_matrix("semantic", semantic)
    check_floating("semantic", semantic)
    check_matrix("surface", surface)
    check_floating("surface", surface)
    check_same("surface", surface, "semantic", semantic, dtype=False)
    if surface.shape != semantic.shape:
        raise ArgumentError(f"surface: expected shape {list(semantic.shape)}, got {list(surface.shape)}")
    check_count("k", k)
    if host_knows(semantic) and semantic.shape[0]:
        check_finite("semantic", semantic)
        check_finite("surface", surface)
        if bool((semantic < 0).any()):
            raise ArgumentError(f"semantic: expected numbers >= 0, got a smallest of {semantic.min():g}")
        if not bool((surface > 0).all()):
            raise ArgumentError(f"surface: expected numbers > 0, got a smallest of {surface.min():g}")
        least = int((semantic > 0).sum(1).min())
        if least < k:
            raise ArgumentError(f"k: expected at most {least}, the candidates of a row, got {k}")
    # By logarithms, and less the largest of a row, no quotient over- or underflows.
    logits = semantic.detach().double().log() - surface.detach().double().log()
    if logits.shape[0] == 0:
        return torch.empty(0, k, dtype=torch.int64, device=logits.device)
    return torch.multinomial(logits.softmax(1), k, generator=generator)
