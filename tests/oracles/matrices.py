"""Losses that have no dense backend, by whole matrices of similarities: in float64 the tests' truth, in the embeddings'
dtype the dense form of the benchmarks."""

import math
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from tests.oracles.losses import unit


def scaled(x: Tensor, like: Tensor, normalize: bool) -> Tensor:
    return unit(x.to(like.dtype)) if normalize else x.to(like.dtype)


def contrast(positives: Tensor, negatives: Tensor) -> Tensor:
    """InfoNCE of logits [n] against logits [n, m]."""
    return torch.cat((positives[:, None], negatives), 1).logsumexp(1) - positives


def hardest(similarity: Tensor, share: float, total: int) -> Tensor:
    """Without those below the row's most similar ones, that share of so many, rounded up; equal ones stay together."""
    count = min(max(1, math.ceil(Fraction(str(share)) * total)), similarity.shape[1])
    return similarity.masked_fill(similarity < similarity.topk(count).values[:, -1:], -torch.inf)


def over_rows(losses: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """The reduction of losses over those that count; 0 without any."""
    if counted is not None:
        losses = losses.where(counted, 0.0)
    if reduction == "none":
        return losses
    number = len(losses) if counted is None else counted.sum()
    return losses.sum() / max(number, 1) if reduction == "mean" else losses.sum()


def hard_contrastive(
    queries: Tensor,
    keys: Tensor | None = None,
    negatives: Tensor | None = None,
    *,
    alpha: float = 0.0819,
    temperature: float | Tensor = 0.1,
    symmetric: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    pairs = scaled(queries if keys is None else torch.stack((queries, keys), 1), queries, normalize)
    n, sides = len(pairs), 2 if symmetric else 1
    anchors = pairs[:, :sides].flatten(0, 1)
    x = (anchors @ pairs.flatten(0, 1).T / temperature).view(n, sides, n, 2)
    own = torch.arange(n, device=x.device)
    side = torch.arange(sides, device=x.device)
    positives = x[own[:, None], side, own[:, None], 1 - side].flatten()
    absent = (own[:, None] == own)[:, None, :, None]
    if keys is not None:  # the other tower's rows alone
        absent = absent | (side[:, None] == torch.arange(2, device=x.device))[None, :, None]
    x = x.masked_fill(absent, -torch.inf).flatten(2).flatten(0, 1)
    total = (n - 1) * (2 if keys is None else 1)
    if negatives is not None:
        extra = anchors @ scaled(negatives, queries, normalize).T / temperature
        x, total = torch.cat((x, extra), 1), total + len(negatives)
    losses = over_rows(contrast(positives, hardest(x, alpha, total)), reduction)
    return losses.view(n, sides) if symmetric and reduction == "none" else losses


def cacr_of_two_views(embeddings: Tensor, t_negative: float) -> Tensor:
    """The one positive has the weight 1; negatives are of the other view."""
    first, second = unit(embeddings).unbind(1)
    distance = 2 - 2 * first @ second.T
    itself = torch.eye(len(distance), dtype=torch.bool, device=distance.device)
    logits = (-t_negative * distance).masked_fill(itself, -torch.inf)
    driven = (logits.softmax(1) * distance).sum(1).mean() + (logits.softmax(0) * distance).sum(0).mean()
    return distance.diagonal().mean() - driven / 2


def mlcd(
    embeddings: Tensor,
    labels: Tensor,
    centers: Tensor,
    among: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Labels [n, m], -1 for none; `among` which centres may be negatives."""
    s = scaled(embeddings, embeddings, normalize) @ scaled(centers, embeddings, normalize).T / temperature
    n, k = s.shape
    at = torch.where(labels < 0, k, labels.long())
    is_label = torch.zeros(n, k + 1, dtype=torch.bool, device=s.device).scatter_(1, at, True)[:, :k]
    absent = is_label
    if among is not None:
        absent = absent | torch.ones(k, dtype=torch.bool, device=s.device).index_fill_(0, among, False)
    zero = s.new_zeros(n, 1)
    negatives = torch.cat((zero, s.masked_fill(absent, -torch.inf)), 1).logsumexp(1)
    positives = torch.cat((zero, -s.masked_fill(~is_label, torch.inf)), 1).logsumexp(1)
    return over_rows(negatives + positives, reduction, is_label.any(1))


def mochi(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    mixing,
    *,
    num_hardest: int,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """With all mixtures built, [n, s, d], of what `MoCHiLoss.draw` has drawn."""
    q, k, u = (scaled(x, queries, normalize) for x in (queries, keys, queue.detach()))
    order = (q.detach() @ u.T).topk(min(num_hardest, len(u))).indices
    first, second, other = (u[order.gather(1, x.long())] for x in (mixing.first, mixing.second, mixing.other))
    alpha, beta = mixing.alpha[..., None].to(q.dtype), mixing.beta[..., None].to(q.dtype)
    of_two = functional.normalize(alpha * first + (1 - alpha) * second, dim=2)
    of_query = functional.normalize(beta * q.detach()[:, None] + (1 - beta) * other, dim=2)
    logits = torch.cat([q @ u.T, (of_two @ q[:, :, None])[..., 0], (of_query @ q[:, :, None])[..., 0]], 1)
    return over_rows(contrast((q * k).sum(1) / temperature, logits / temperature), reduction)


def interclr(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    bank: Tensor,
    labels: Tensor,
    indices: Tensor,
    which: Tensor,
    drawn: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    inter_weight: float = 0.25,
    pool: float,
    margin: float = -0.5,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """`which` and `drawn` as `InterCLRLoss.draw` has drawn them; rows of the bank without a label are alone."""
    q, k, u, b = (scaled(x, queries, normalize) for x in (queries, keys, queue, bank))
    labels = torch.where(labels < 0, len(b) + torch.arange(len(b), device=b.device), labels)
    intra = contrast((q * k).sum(1) / temperature, q @ u.T / temperature)
    ordered, order = labels.sort(stable=True)
    own = labels[indices]
    first, end = torch.searchsorted(ordered, own), torch.searchsorted(ordered, own, right=True)
    positives = b[order[first + (which.double() * (end - first)).long()]]
    others = (q @ b[drawn].T / temperature).masked_fill(own[:, None] == labels[drawn], -torch.inf)
    inter = contrast(((q * positives).sum(1) - margin) / temperature, hardest(others, pool, len(drawn)))
    return over_rows((1 - inter_weight) * intra + inter_weight * inter, reduction)


def protogcd(
    embeddings: Tensor,
    prototypes: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    teacher_temperature: float = 0.05,
    hard_share: float = 1.0,
    entropy_weight: float = 2.0,
    separation_weight: float = 0.1,
    supervised_weight: float = 0.35,
    normalize: bool = True,
) -> Tensor:
    """As the authors write it, but for the 1e-6 that they add to the second largest entry."""
    z, c = scaled(embeddings, embeddings, normalize), scaled(prototypes, embeddings, normalize)
    logits = [view @ c.T for view in z.unbind(1)]
    targets = []
    for x in logits:
        q = (x.detach() / teacher_temperature).softmax(1)
        best = x.detach().topk(min(2, len(c))).values
        margin = best[:, 0] - best[:, 1] if len(c) > 1 else best[:, 0]
        hard = margin.topk(int(len(x) * hard_share)).indices
        q[hard] = functional.one_hot(q.argmax(1), len(c)).to(q)[hard]
        targets.append(q)
    log_p = [(x / temperature).log_softmax(1) for x in logits]
    distillation = -(targets[1] * log_p[0] + targets[0] * log_p[1]).sum(1).mean() / 2
    mean = torch.cat(log_p).exp().mean(0)
    entropy = math.log(len(c)) + (mean * mean.log()).sum()
    others = (c @ c.T / temperature).fill_diagonal_(-torch.inf)
    separation = others.logsumexp(1).mean() - math.log(len(c) - 1)
    loss = (1 - supervised_weight) * (distillation + entropy_weight * entropy + separation_weight * separation)
    if labels is None:
        return loss
    picked = [view.gather(1, labels.long().clamp(min=0)[:, None])[:, 0] for view in log_p]
    return loss - supervised_weight * over_rows(torch.cat(picked), "mean", (labels >= 0).repeat(2))


def coding_rate(embeddings: Tensor, cluster_ids: Tensor | None = None, *, eps: float = 0.5, normalize: bool = True):
    """Coding rate of the clusters less that of all rows, from the outer product of every row."""
    n, views, d = embeddings.shape if embeddings.ndim == 3 else (len(embeddings), 1, embeddings.shape[-1])
    own = torch.arange(n, device=embeddings.device) - n - 1
    ids = own if cluster_ids is None else torch.where(cluster_ids < 0, own, cluster_ids)
    clusters = ids.repeat_interleave(views).unique(return_inverse=True)[1]
    like = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    z = scaled(embeddings, like, normalize).reshape(-1, d)
    outer = z[:, :, None] * z[:, None]

    def rates(grams: Tensor, sizes: Tensor) -> Tensor:
        return torch.logdet(torch.eye(d).to(grams) + d / eps**2 * grams / sizes[:, None, None])

    sizes = clusters.bincount().to(z.dtype)
    grams = z.new_zeros(len(sizes), d, d).index_add(0, clusters, outer)
    return sizes / len(z) @ rates(grams, sizes) - rates(outer.sum(0, keepdim=True), sizes.sum()[None])[0]


def mlc(
    embeddings: Tensor, heads: Tensor, *, temperature: float | Tensor = 0.1, eps: float = 0.5, normalize: bool = True,
    steps: int = 60,
):  # fmt: skip
    """Coding rate reduction by a doubly stochastic matrix: Sinkhorn's steps and all, differentiated as they are."""
    d = embeddings.shape[-1]
    like = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    z, c = (scaled(x.flatten(0, -2), like, normalize) for x in (embeddings, heads))
    logits = c @ c.T / temperature
    f = logits.new_zeros(len(z))
    for _ in range(steps):
        f = (f - (logits + f).logsumexp(1)) / 2
    g = (logits + f + f[:, None]).exp()
    scale, identity = d / eps**2, torch.eye(d).to(z)
    rates = torch.logdet(identity + scale * torch.einsum("nk,nd,ne->kde", g, z, z))
    return rates.mean() - torch.logdet(identity + scale / len(z) * z.T @ z)


def maxsim(
    queries: Tensor,
    keys: Tensor,
    query_ids: Tensor,
    key_ids: Tensor,
    num_ids: int,
    *,
    temperature: float | Tensor = 1.0,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """By the matrix [n, m] of all similarities; a last query and a last document have what belongs to none."""
    x = scaled(queries, queries, normalize) @ scaled(keys, queries, normalize).T
    rows, columns = (torch.where(ids < 0, num_ids, ids) for ids in (query_ids, key_ids))
    best = x.new_full((len(x), num_ids + 1), -torch.inf).scatter_reduce(1, columns.expand(len(x), -1), x, "amax")
    of_query, of_document = (ids == torch.arange(num_ids, device=x.device)[:, None] for ids in (rows, columns))
    exist = of_document.any(1)
    best = best[:, :num_ids].masked_fill(~exist, 0.0)
    sums = x.new_zeros(num_ids + 1, num_ids).index_add(0, rows, best)[:num_ids] / temperature
    are_pairs = of_query.any(1) & exist
    own = sums.diagonal()
    sums = sums.masked_fill(~exist, torch.finfo(x.dtype).min / 2)
    return over_rows(sums.logsumexp(1) - own, reduction, are_pairs)


def beclr(
    embeddings: Tensor,
    predictions: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    temperature: float | Tensor = 2.0,
    negative_weight: float = 0.1,
    normalize: bool = True,
) -> Tensor:
    z, p, t = (
        scaled(embeddings if x is None else x, embeddings, normalize) for x in (embeddings, predictions, targets)
    )
    n = len(z)
    loss = -(p * t.detach().flip(1)).sum(2).mean() if n else 0.0 * z.sum()
    if n < 2:
        return loss
    rows, own = z.flatten(0, 1), torch.arange(n, device=z.device).repeat_interleave(2)
    e = (rows @ rows.T / temperature).masked_fill(own[:, None] == own, -torch.inf).exp()
    return loss + negative_weight * (e.sum(1) / (2 * n - 2)).mean().log()


def slotcon(
    queries: Tensor,
    keys: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor | None = None,
    teacher_center: Tensor | None = None,
    overlap: tuple[Tensor, Tensor] | None = None,
    predictor=None,
    *,
    temperature: float | Tensor = 0.1,
    teacher_temperature: float = 0.07,
    slot_temperature: float = 0.2,
    distillation_weight: float = 0.5,
    normalize: bool = True,
) -> Tensor:
    """As the authors write it, for one direction, without the 1e-6 that they add to the slots' weights."""
    x, y = (scaled(rows, queries, normalize) for rows in (queries, keys.detach()))
    c = scaled(prototypes, queries, normalize)
    fixed = c.detach() if teacher_prototypes is None else scaled(teacher_prototypes.detach(), queries, normalize)
    student, teacher = (x, y) if overlap is None else overlap
    of_teacher = teacher @ fixed.T - (0.0 if teacher_center is None else teacher_center)
    target = (of_teacher / teacher_temperature).softmax(-1)
    distillation = -(target * (student @ c.T / temperature).log_softmax(-1)).sum(-1).mean()

    def slots_and_winners(pixels, rows, centers):
        scores = rows @ centers.T
        a = (scores / teacher_temperature).softmax(2).transpose(1, 2)
        wins = functional.one_hot(scores.argmax(2), len(centers)).sum(1) > 0
        return (a @ pixels / a.sum(2, keepdim=True)).flatten(0, 1), wins.flatten()

    q, of_queries = slots_and_winners(queries, x, c)
    k, of_keys = slots_and_winners(keys.detach(), y, fixed)
    both = of_queries & of_keys
    q = q[both] if predictor is None else predictor(q[both])
    logits = scaled(q, queries, normalize) @ scaled(k[of_keys], queries, normalize).T / slot_temperature
    own = (of_keys.cumsum(0) - 1)[both]
    contrast = 2 * slot_temperature * over_rows(logits.logsumexp(1) - logits.gather(1, own[:, None])[:, 0], "mean")
    return distillation_weight * distillation + (1 - distillation_weight) * contrast
