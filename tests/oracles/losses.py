"""The losses, straight from their formulas: a Python loop over anchors, float64, differentiated by autograd."""

import inspect
import math

import torch

from ccl_fast.losses import Loss


def unit(x):
    """Unit rows. A zero row stays zero."""
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x / torch.where(norm > 0, norm, 1.0), 0.0 * x)


def as_rows(embeddings, ids, normalize):
    """Rows [r, d], their ids as (unassigned or not, number), and the shape of a loss per row."""
    embeddings = embeddings.double()
    if normalize:
        embeddings = unit(embeddings)
    samples = len(embeddings)
    views = embeddings.shape[1] if embeddings.ndim == 3 else 1
    if ids is None:
        own = [("sample", s) for s in range(samples)]
    else:
        own = [("cluster", int(c)) if c >= 0 else ("sample", s) for s, c in enumerate(ids.tolist())]
    row_ids = [own[s] for s in range(samples) for _ in range(views)]
    return embeddings.reshape(samples * views, embeddings.shape[-1]), row_ids, embeddings.shape[:-1]


def reduced(losses, counted, shape, reduction, like):
    """Losses of the rows -> the reduction over those that count."""
    zero = 0.0 * like.double().sum()  # keeps the graph of an empty batch
    losses = [loss if counts else zero for loss, counts in zip(losses, counted, strict=True)]
    if reduction == "none":
        return torch.stack(losses).reshape(shape) if losses else zero.expand(shape)
    total = sum(losses, zero)
    return total / max(sum(counted), 1) if reduction == "mean" else total


def ccl(
    embeddings,
    cluster_ids=None,
    centers=None,
    center_temperature=None,
    *,
    temperature=0.1,
    center_weight=1.0,
    form="joint",
    instance_weight=0.0,
    normalize=True,
    reduction="mean",
):
    z, ids, shape = as_rows(embeddings, cluster_ids, normalize)
    views = embeddings.shape[1] if embeddings.ndim == 3 else 1
    if center_temperature is None:
        center_temperature = temperature
    if centers is None:
        centers, center_weight = z.new_zeros(0, z.shape[1]), 0.0
    else:
        centers = unit(centers.detach().double()) if normalize else centers.detach().double()

    losses, counted = [], []
    for i in range(len(z)):
        kind, cluster = ids[i]
        others = [j for j in range(len(z)) if j != i]
        positives = [j for j in others if ids[j] == ids[i]]
        s_others = z[others] @ z[i] / temperature
        s_positives = z[positives] @ z[i] / temperature
        s_centers = centers @ z[i] / center_temperature
        own_center = [cluster] if kind == "cluster" and len(centers) and center_weight > 0 else []
        counted.append(bool(positives or own_center))
        if not counted[-1]:
            losses.append(None)
            continue

        if form == "split":
            loss = 0.0
            if positives:
                loss = loss + torch.logsumexp(s_others, 0) - s_positives.mean()
            for c in own_center:
                loss = loss + center_weight * (torch.logsumexp(s_centers, 0) - s_centers[c])
        else:
            loss = torch.logsumexp(torch.cat([s_others, s_centers]), 0)
            weights = z.new_tensor([1.0] * len(positives) + [center_weight] * len(own_center))
            s = torch.cat([s_positives, s_centers[own_center]])
            if form == "joint":
                loss = loss - (weights * s).sum() / weights.sum()
            else:
                loss = loss - torch.logsumexp(s + weights.log(), 0)
        if instance_weight:
            s_own_views = z[[j for j in others if j // views == i // views]] @ z[i] / temperature
            of_instance = torch.logsumexp(s_others, 0) - s_own_views.mean()
            loss = (1 - instance_weight) * loss + instance_weight * of_instance
        losses.append(loss)
    return reduced(losses, counted, shape, reduction, embeddings)


def supcon(embeddings, labels=None, *, temperature=0.1, form="outside", normalize=True, reduction="mean"):
    z, ids, shape = as_rows(embeddings, labels, normalize)
    losses, counted = [], []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        is_positive = torch.tensor([ids[j] == ids[i] for j in others], dtype=torch.bool)
        counted.append(bool(is_positive.any()))
        if not counted[-1]:
            losses.append(None)
            continue
        log_p = torch.log_softmax(z[others] @ z[i] / temperature, 0)[is_positive]
        losses.append(-log_p.mean() if form == "outside" else -torch.logsumexp(log_p, 0))
    return reduced(losses, counted, shape, reduction, embeddings)


def infonce(queries, keys=None, negatives=None, *, temperature=0.1, symmetric=True, normalize=True, reduction="mean"):
    scaled = unit if normalize else torch.Tensor.double
    n, d = len(queries), queries.shape[-1]
    extra = queries.new_zeros(0, d).double() if negatives is None else scaled(negatives.double())

    def contrast(anchor, positive, other):
        s_positive = (anchor @ positive / temperature)[None]
        return torch.logsumexp(torch.cat([s_positive, other @ anchor / temperature]), 0) - s_positive[0]

    losses = []
    if keys is None:
        z = scaled(queries.double())
        for i in range(n):
            for view in (0, 1):
                other = [z[j, w] for j in range(n) for w in (0, 1) if j != i]
                losses.append(contrast(z[i, view], z[i, 1 - view], torch.stack([*other, *extra]) if n > 1 else extra))
        shape = (n, 2)
    else:
        q, k = scaled(queries.double()), scaled(keys.double())
        for i in range(n):
            rest = [j for j in range(n) if j != i]
            losses.append(contrast(q[i], k[i], torch.cat([k[rest], extra])))
            if symmetric:
                losses.append(contrast(k[i], q[i], torch.cat([q[rest], extra])))
        shape = (n, 2) if symmetric else (n,)
    return reduced(losses, [True] * len(losses), shape, reduction, queries)


def batch(n, views, d, clusters, seed=0, dtype=torch.float64):
    """Random embeddings [n, views, d] (views=0: [n, d]), ids -1 .. clusters - 1 and centres."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, views, d) if views else (n, d)
    z = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    centers = torch.randn(clusters, d, generator=generator, dtype=torch.float64).to(dtype)
    return z, torch.randint(-1, clusters, (n,), generator=generator), centers


def learnable(loss, temperature=0.1, **options):
    """A loss module in float64 whose temperature is learnable, so that its gradient is checked too."""
    module = loss(temperature=temperature, learnable_temperature=True, **options).double()
    torch.nn.init.constant_(module.log_temperature, math.log(temperature))
    return module


def differentiate(loss, leaves, unused=False):
    """[loss, gradients...]; losses of rows get unequal cotangents. A leaf outside the graph is an error."""
    cotangent = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, cotangent, materialize_grads=unused)]


def call(loss_fn, *args, **named):
    """A loss, or a function, of arguments in the order of their names, also those that it takes by name alone."""
    names = inspect.signature(loss_fn.forward if isinstance(loss_fn, Loss) else loss_fn).parameters
    return loss_fn(**dict(zip(names, args, strict=False)), **named)


def evaluate(loss_fn, z, *args):
    """[loss, gradient of z, gradient of log_temperature if it is learnable] of a loss module."""
    z = z.detach().requires_grad_()
    loss = call(loss_fn, z, *args) if isinstance(loss_fn, Loss) else loss_fn(z, *args)
    loss, gradient, *of_temperature = differentiate(loss, [z, *loss_fn.parameters()])
    return [loss, gradient, *(x.reshape(()) for x in of_temperature)]


def evaluate_oracle(oracle, z, *args, temperature=0.1, **options):
    """The same three of an oracle."""
    z = z.detach().double().requires_grad_()
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    loss = oracle(z, *args, temperature=log_temperature.exp(), **options)
    return differentiate(loss, [z, log_temperature], unused=True)


def assert_matches(actual, expected, tolerance=1e-10):
    """Loss and gradients within `tolerance` of the largest expected entry; a module's log T ``[1]`` is a number."""
    actual = [a.reshape(()) if a.shape == (1,) and e.ndim == 0 else a for a, e in zip(actual, expected, strict=True)]
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        name = f"gradient {i}" if i else "loss"
        assert a.shape == e.shape, f"{name}: shape {list(a.shape)}, expected {list(e.shape)}"
        assert a.isfinite().all(), f"{name}: {a}"
        error, bound = largest(a.double() - e), tolerance * (1 + largest(e))
        assert error <= bound, f"{name}: error {error:.3g} > {bound:.3g}"


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0
