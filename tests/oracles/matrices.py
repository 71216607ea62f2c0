"""Objectives that have no dense backend, written as one would without the library: whole matrices of similarities."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize


def unit(x: Tensor) -> Tensor:
    return normalize(x, dim=-1)


def contrast(positives: Tensor, negatives: Tensor) -> Tensor:
    """InfoNCE of logits [n] against logits [n, m]."""
    return (torch.cat((positives[:, None], negatives), 1).logsumexp(1) - positives).mean()


def without_own_sample(x: Tensor, views: int) -> Tensor:
    """Similarities [rows, rows], a sample's views one after another, of rows of different samples alone."""
    sample = torch.arange(len(x), device=x.device) // views
    return x.masked_fill(sample[:, None] == sample, -torch.inf)


def hard_contrastive(embeddings: Tensor, alpha: float, temperature: float) -> Tensor:
    rows = unit(embeddings).flatten(0, 1)
    x = rows @ rows.T
    positives = x.diagonal(1)[::2].repeat_interleave(2)
    negatives = without_own_sample(x, 2)
    kept = math.ceil(alpha * (len(x) - 2))
    negatives = negatives.masked_fill(negatives < negatives.topk(kept).values[:, -1:], -torch.inf)
    return contrast(positives / temperature, negatives / temperature)


def cacr(embeddings: Tensor, t_negative: float) -> Tensor:
    """Of two views: the one positive has the weight 1."""
    rows = unit(embeddings).flatten(0, 1)
    distance = 2 - 2 * rows @ rows.T
    weights = without_own_sample(-t_negative * distance, 2).softmax(1)
    return distance.diagonal(1)[::2].mean() - (weights * distance).sum(1).mean()


def mlcd(embeddings: Tensor, centers: Tensor, labels: Tensor, temperature: float) -> Tensor:
    s = unit(embeddings) @ unit(centers).T / temperature
    is_label = torch.zeros_like(s, dtype=torch.bool).scatter_(1, labels, True)
    zero = s.new_zeros(len(s), 1)
    negatives = torch.cat((zero, s.masked_fill(is_label, -torch.inf)), 1).logsumexp(1)
    positives = torch.cat((zero, -s.masked_fill(~is_label, torch.inf)), 1).logsumexp(1)
    return (negatives + positives).mean()


def mochi(module, queries: Tensor, keys: Tensor, queue: Tensor, generator: torch.Generator) -> Tensor:
    """With all mixtures built, [n, s, d]."""
    q, k, u = unit(queries), unit(keys), unit(queue)
    hardest = min(module.num_hardest, len(u))
    order = (q.detach() @ u.T).topk(hardest).indices
    like = torch.zeros((), device=q.device)
    drawn = module.draw(len(q), hardest, like, generator)
    first, second, other = (u[order.gather(1, x)] for x in (drawn.first, drawn.second, drawn.other))
    alpha, beta = drawn.alpha[..., None].to(q.dtype), drawn.beta[..., None].to(q.dtype)
    of_two = unit(alpha * first + (1 - alpha) * second)
    of_query = unit(beta * q.detach()[:, None] + (1 - beta) * other)
    logits = [q @ u.T, (of_two @ q[:, :, None])[..., 0], (of_query @ q[:, :, None])[..., 0]]
    return contrast((q * k).sum(1) / module.temperature, torch.cat(logits, 1) / module.temperature)


def interclr(
    module, queries: Tensor, keys: Tensor, bank: Tensor, labels: Tensor, indices: Tensor, generator: torch.Generator
) -> Tensor:
    """With the bank as the queue too."""
    q, k, b = unit(queries), unit(keys), unit(bank)
    intra = contrast((q * k).sum(1) / module.temperature, q @ b.T / module.temperature)
    which, drawn = module.draw(len(q), len(b), q, generator)
    order = labels.sort(stable=True).indices
    ordered, own = labels[order].contiguous(), labels[indices]
    first, end = torch.searchsorted(ordered, own), torch.searchsorted(ordered, own, right=True)
    positives = b[order[first + (which * (end - first)).long()]]
    negatives = (q @ b[drawn].T).masked_fill(own[:, None] == labels[drawn], -torch.inf)
    kept = math.ceil(module.pool * len(drawn))
    negatives = negatives.masked_fill(negatives < negatives.topk(kept).values[:, -1:], -torch.inf)
    inter = contrast(((q * positives).sum(1) - module.margin) / module.temperature, negatives / module.temperature)
    return (1 - module.inter_weight) * intra + module.inter_weight * inter
