"""Classes from domains that mix them in different shares: no row needs a label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ccl_fast.checks import check_count, check_finite, check_seed
from ccl_fast.clustering.arrays import labels_of, like, rows_of
from ccl_fast.clustering.kmeans import KMeans
from ccl_fast.errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# What probabilities of a row may add up to, besides 1.
ROUNDING = 1e-2


class LatentLabelShift(BaseEstimator):
    r"""Classes that several domains have in different shares, from a classifier of the domains.

    .. math::
        p(\text{cell} | d) = \sum_y p(\text{cell} | y)\, p(y | d), \qquad p(y | x) = p(d | y)^{+} p(d | x)

    Rows p(d | x) of that classifier are parted into cells by k-means; the cells' shares of each domain, a matrix, are
    the product of those of the classes and the classes' shares of each domain. If each class has an anchor, a cell
    with rows of that class alone, the anchors are extreme points of the normalised rows of the matrix: successive
    projection finds them, and they are the classes' shares but for a factor, which follows as those of a domain add up
    to 1. Classes come in no order. There must be as many domains as classes, whose shares are linearly independent.

    Args:
        n_classes: how many classes there are.
        n_cells: of k-means; None: 3 for each class. Few rows in a cell make its shares, and so the anchors, uncertain.
        random_state: seed of k-means.

    Attributes:
        class_shares_: p(y | d), ``[classes, domains]``.
        cell_shares_: p(cell | y), ``[cells, classes]``.
        cluster_centers_: ``[cells, domains]``.

    Cost: that of k-means, and O(cells x domains x classes).

    Paper: Roberts, Mani, Garg, Lipton, "Unsupervised learning under latent label shift", 2022.

    Example:
        >>> import numpy as np
        >>> from ccl_fast.clustering import LatentLabelShift
        >>> domains = np.arange(200) % 2
        >>> classes = np.arange(200) // 2 % 10 < np.array([2, 7])[domains]  # 20 % of one, 70 % of the other domain
        >>> p = np.where(classes[:, None], [2 / 9, 7 / 9], [8 / 11, 3 / 11])
        >>> model = LatentLabelShift(2).fit(p, domains)
        >>> sorted(model.class_shares_.round(2).tolist())
        [[0.2, 0.7], [0.8, 0.3]]
        >>> len(set(zip(model.predict(p).tolist(), classes.tolist())))
        2
    """

    # Tensors or arrays, as the fitted rows were.
    class_shares_: Any
    cell_shares_: Any
    cluster_centers_: Any

    def __init__(self, n_classes: int, *, n_cells: int | None = None, random_state: int = 0):
        self.n_classes = n_classes
        self.n_cells = n_cells
        self.random_state = random_state

    @torch.no_grad()
    def fit(self, p: Tensor | ArrayLike, domains: Tensor | ArrayLike) -> LatentLabelShift:
        """Find the classes' shares.

        Args:
            p: p(d | x), ``[n, domains]``, of a calibrated classifier on rows it was not trained with.
            domains: d, ``[n]`` integers, of every domain some.

        Returns:
            self.

        Raises:
            ValueError: an argument has the wrong type, shape or value.
        """
        rows, d = self._checked(p, domains)
        missing = set(range(rows.shape[1])).difference(d.tolist())
        if missing:
            raise ArgumentError(f"domains: expected rows of all {rows.shape[1]} domains, got none of {min(missing)}")
        cells = self._cells(rows)
        counts = torch.zeros(len(cells.cluster_centers_), rows.shape[1], dtype=torch.float64)
        counts.index_put_((cells.labels_, d), torch.ones(len(d), dtype=torch.float64), accumulate=True)
        frequency = counts.sum(0)
        shares = counts / frequency
        anchors = shares / shares.sum(1, keepdim=True)
        vertices = anchors[_extreme_rows(anchors, self.n_classes)]
        factors = torch.linalg.lstsq(vertices.T, torch.ones(rows.shape[1], 1, dtype=torch.float64)).solution
        of_domains = _normalized((vertices * factors).clamp(min=0), 0)
        of_cells = _normalized((shares @ torch.linalg.pinv(of_domains)).clamp(min=0), 0)
        joint = of_domains * frequency / frequency.sum()
        self._inverse, self._priors = torch.linalg.pinv(_normalized(joint, 1).T), joint.sum(1)
        self.class_shares_, self.cell_shares_ = like(of_domains, p), like(of_cells, p)
        self.cluster_centers_ = like(cells.cluster_centers_, p)
        return self

    def predict_proba(self, p: Tensor | ArrayLike, domains: Tensor | ArrayLike | None = None) -> Any:
        """Return p(y | x), or, given the rows' domains, p(y | x, d): ``[n, classes]``."""
        check_is_fitted(self)
        rows, d = self._checked(p, domains)
        if rows.shape[1] != self._inverse.shape[1]:
            raise ArgumentError(f"p: expected {self._inverse.shape[1]} domains, as fitted, got {rows.shape[1]}")
        classes = _normalized((rows @ self._inverse.T).clamp(min=0), 1)
        if domains is not None:
            shares = torch.as_tensor(self.class_shares_, device=torch.device("cpu"))
            classes = _normalized(classes * (shares.T[d] / self._priors), 1)
        return like(classes, p)

    def predict(self, p: Tensor | ArrayLike, domains: Tensor | ArrayLike | None = None) -> Any:
        """Return the most probable class of every row: int64 ``[n]``."""
        return self.predict_proba(p, domains).argmax(1)

    def _checked(self, p: Any, domains: Any) -> tuple[Tensor, Tensor]:
        """Return the rows, float64 on the CPU, and their domains (without: none)."""
        check_count("n_classes", self.n_classes)
        check_seed("random_state", self.random_state)
        if self.n_cells is not None:
            check_count("n_cells", self.n_cells, self.n_classes)
        if getattr(p, "ndim", 2) != 2:
            raise ArgumentError(f"p: expected shape [rows, domains], got {list(np.shape(p))}")
        rows = rows_of(p, self)
        check_finite("p", rows)
        if rows.shape[2] < self.n_classes:
            raise ArgumentError(f"p: expected at least n_classes={self.n_classes} domains, got {rows.shape[2]}")
        found = rows[0].double().cpu()
        if (found < 0).any() or ((found.sum(1) - 1).abs() > ROUNDING).any():
            raise ArgumentError("p: expected probabilities, which are >= 0 and add up to 1 in every row")
        if domains is None:
            return found, torch.empty(0, dtype=torch.int64)
        d = labels_of(domains, p, rows, rows.shape[2], "columns", "domains")
        if d is None or (d < 0).any():
            raise ArgumentError("domains: expected none below 0")
        return found, d[0].cpu()

    def _cells(self, rows: Tensor) -> KMeans:
        """K-means without empty clusters."""
        cells = min(self.n_cells or 3 * self.n_classes, len(rows))
        kmeans = KMeans(cells, random_state=self.random_state, empty_cluster="keep").fit(rows)
        filled = kmeans.labels_.bincount(minlength=cells) > 0
        if not filled.all():
            return KMeans(int(filled.sum()), init=kmeans.cluster_centers_[filled], empty_cluster="keep").fit(rows)
        return kmeans


def _extreme_rows(x: Tensor, count: int) -> Tensor:
    """Successive projection: the longest row, and again of what is left of the rows without its direction."""
    chosen, left = [], x.clone()
    for _ in range(count):
        row = int(left.square().sum(1).argmax())
        direction = left[row] / left[row].norm().clamp(min=torch.finfo(x.dtype).tiny)
        chosen.append(row)
        left = left - (left @ direction)[:, None] * direction
    return torch.tensor(chosen)


def _normalized(x: Tensor, dim: int) -> Tensor:
    """Without a sum all are equal."""
    total = x.sum(dim, keepdim=True)
    return torch.where(total > 0, x / total.where(total > 0, 1.0), 1 / x.shape[dim])
