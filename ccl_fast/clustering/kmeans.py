"""K-means with scikit-learn's interface."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, overload

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ccl_fast.checks import (
    check_choice,
    check_count,
    check_finite,
    check_flag,
    check_not_negative,
    check_seed,
    shown,
)
from ccl_fast.clustering import empty_clusters
from ccl_fast.clustering.arrays import is_batched, labels_of, like, rows_of, tensor_of, weights_of
from ccl_fast.clustering.data import Data
from ccl_fast.clustering.lloyd import Solution, lloyd
from ccl_fast.clustering.rejection_sampling import plain_k_means_plus_plus
from ccl_fast.clustering.seeding import k_means_plus_plus, random_rows
from ccl_fast.clustering.shards import Shards, digest
from ccl_fast.distributed import open_group
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.backends import KMeansBackend, check_backend
from ccl_fast.ops.kmeans.assign import METRICS, Metric
from ccl_fast.ops.normalize import normalize_rows

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch.distributed import ProcessGroup

    from ccl_fast.distributed import Group

Init = Literal["k-means++", "plain-k-means++", "random"]
SEEDINGS = {"k-means++": k_means_plus_plus, "plain-k-means++": plain_k_means_plus_plus, "random": random_rows}
# As scikit-learn passes and calls them: (rows, n_clusters, random_state=a numpy.random.RandomState) -> centres.
InitFunction = Callable[..., Any]
# Starts that n_init="auto" makes of random rows and of a function's, as in scikit-learn: 1 of the others.
RANDOM_STARTS = 10
Algorithm = Literal["lloyd", "elkan"]


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    r"""K-means clustering: minimise ``sum_i w_i d(x_i, mu_{y_i})`` over labels ``y`` and centres ``mu``.

    ``d(x, mu) = |x - mu|^2`` for ``metric="euclidean"``, the centres being the means of their clusters;
    ``d(x, mu) = 1 - <x, mu> / |x|`` for ``metric="cosine"`` (spherical k-means), the centres being unit vectors.

    An estimator of scikit-learn's, to be used in place of its ``KMeans``: the same methods, attributes and defaults, in
    pipelines, grid searches and under ``clone``. Arrays (also memory maps, lists and data frames) give arrays, tensors
    give tensors, on their device. What differs is in docs/coming-from.md.

    Labels are exact: those of distances in float64, the lowest index on ties, whatever the dtype and the device (see
    :func:`ccl_fast.ops.kmeans_assign`), and they belong to the returned centres. Nothing is sub-sampled. The matrix of
    distances never exists: memory grows with N + K. All randomness comes from a private generator, and sums are taken
    in a fixed order: the same seed and data give the same bits on the same machine and number of threads, and torch's
    global generator is left alone. On a GPU the host reads whether the centres rest one iteration late, so that the
    device never waits.

    Args:
        n_clusters: K, the number of clusters.
        init: the starting centres. "k-means++": the greedy one, as in scikit-learn, a pass over the rows for each
            centre; "plain-k-means++": the one of a single candidate for each centre, a pass for many of them, which is
            faster for many clusters and worse where these are well apart; "random" (no row is drawn twice by any of
            them); the centres, ``[K, D]`` or ``[B, K, D]`` (a warm start); or a function that is called as
            ``init(X, n_clusters, random_state=state)`` for each start and returns the centres ``[K, D]``, with the rows
            ``[N, D]`` as they came (of B problems each in turn) and a ``numpy.random.RandomState``.
        n_init: number of starts, of which the one with the lowest inertia is kept. "auto": 10 for "random" and for a
            function, 1 for others. Given centres are started from once.
        max_iter: largest number of Lloyd iterations of one start.
        tol: stop when the centres' squared movement, summed over clusters, is at most ``tol`` times the mean
            variance of the features; 0: when no label changes.
        verbose: show a progress bar (of the package tqdm); with a process group the first process's.
        random_state: seed of the private generator, an integer from 0 to 2^63 - 1; or where to draw that from: a
            ``numpy.random.RandomState``, a ``torch.Generator``, or None (NumPy's global state). Unlike scikit-learn's,
            the default gives the same bits every time.
        copy_x: without effect: rows are never changed.
        algorithm: "lloyd", or "elkan", which is another way to the same labels in scikit-learn; here both are one.
        metric: "euclidean" or "cosine".
        empty_cluster: how to treat a cluster without rows. "split": it is put beside the centre of the largest
            cluster, and shares its rows from then on; "farthest": it takes over the row farthest from its own centre,
            as in scikit-learn; "keep": its centre stays; "error": RuntimeError. "farthest" and "error" make the host
            wait for a GPU in every iteration.
        batch_size: rows that are brought to ``device`` at a time; None: all at once. The result is that of all the
            rows, not of mini-batches, but for rounding. For data that do not fit into a GPU's memory.
        device: where to compute; None: where the data are.
        backend: "auto", "cuda" or "cpu" (the extensions), "blocked" (plain torch) or "reference" (dense float64).
        process_group: over whose rows to cluster: None, those passed to ``fit``; a torch.distributed process group or
            "world" (the default group when ``fit`` is called), those that all its processes pass, see below.

    Attributes:
        cluster_centers_: ``[K, D]``, device of the data and their dtype (float32 for half precision).
        labels_: int64 ``[N]``, the nearest centre of every fitted row.
        inertia_: the minimised sum, a float.
        n_iter_: the number of Lloyd iterations run, an int, counted as in scikit-learn.
        n_features_in_: D; ``feature_names_in_``: names of the features, of data frames.
        doubtful_: how many rows of the last assignment had to be decided in higher precision, an int.
        rechecked_: how many of these had to be compared with all centres again, an int.

    **With a process group** ``fit`` is a collective: every process passes a shard of the rows, of any size, also none,
    and gets the labels of these. Every other result is that of all the rows, to the same bits on every process.
    How many processes there are, and which of them has which rows, does not matter as long as the rows follow each
    other in the same order: random numbers belong to rows, and sums are float64's from the first row. An iteration
    exchanges ``8 B K (D + 1)`` bytes; rows do not travel, but for the candidates of the seeding. All arguments but
    ``batch_size`` and ``verbose`` must be the same on all processes; a ``random_state`` that is no integer is the first
    process's. ``predict``, ``transform`` and ``score`` take the rows of one process, and exchange nothing.

    With data ``[B, N, D]``, B independent problems of one size are solved together, each as it would be alone; the
    attributes but ``doubtful_`` and ``rechecked_`` have B as first dimension, and ``inertia_`` and ``n_iter_`` are
    tensors (arrays) ``[B]``.

    Distances are float32 (float64 for float64 data): beyond 1e19 they overflow and below 1e-20 they vanish, so scale
    such data first; labels are right all the same.

    Raises:
        ValueError: by ``fit``, naming the argument, what was expected and what came; with a process group on every
            process. The others: before ``fit`` (scikit-learn's NotFittedError), or for rows that do not fit.
        PeerError: another process has ended or does not answer.

    Warns:
        ConvergenceWarning: scikit-learn's; clusters are empty in the end, most likely as fewer rows than clusters are
            distinct. With "keep" they may be.

    Example:
        >>> import numpy as np
        >>> from ccl_fast import KMeans
        >>> kmeans = KMeans(n_clusters=2).fit(np.array([[1.0, 2], [1, 4], [1, 0], [10, 2], [10, 4], [10, 0]]))
        >>> kmeans.cluster_centers_[kmeans.labels_[[0, 3]]].tolist(), kmeans.inertia_
        ([[1.0, 2.0], [10.0, 2.0]], 16.0)
        >>> (kmeans.predict([[0, 0], [12, 3]]) == kmeans.labels_[[0, 3]]).all().item()
        True

    Papers: Lloyd, "Least squares quantization in PCM", 1982; Arthur and Vassilvitskii, "k-means++: the advantages
    of careful seeding", 2007; Dhillon and Modha, "Concept decompositions for large sparse text data using
    clustering", 2001 (cosine); Basu, Banerjee, Mooney, "Semi-supervised clustering by seeding", 2002 (labels).
    """

    # Tensors or arrays, as the fitted rows were.
    cluster_centers_: Any
    labels_: Any
    inertia_: Any
    n_iter_: Any
    n_features_in_: int

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Init | Tensor | ArrayLike | InitFunction = "k-means++",
        n_init: int | Literal["auto"] = "auto",
        max_iter: int = 300,
        tol: float = 1e-4,
        verbose: bool | int = False,
        random_state: int | np.random.RandomState | torch.Generator | None = 0,
        copy_x: bool = True,
        algorithm: Algorithm = "lloyd",
        metric: Metric = "euclidean",
        empty_cluster: empty_clusters.Policy = "split",
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        backend: KMeansBackend = "auto",
        process_group: ProcessGroup | str | None = None,
    ):
        self.n_clusters = n_clusters
        self.init = init
        self.n_init: int | Literal["auto"] = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.verbose = verbose
        self.random_state = random_state
        self.copy_x = copy_x
        self.algorithm: Algorithm = algorithm
        self.metric: Metric = metric
        self.empty_cluster: empty_clusters.Policy = empty_cluster
        self.batch_size = batch_size
        self.device = device
        self.backend: KMeansBackend = backend
        self.process_group = process_group

    @torch.no_grad()
    def fit(
        self,
        X: Tensor | ArrayLike,
        y: object = None,
        sample_weight: Tensor | ArrayLike | None = None,
        *,
        labels: Tensor | ArrayLike | None = None,
    ) -> KMeans:
        """Find centres and labels.

        Args:
            X: floating point ``[N, D]`` or ``[B, N, D]``, finite, N >= K; arrays of other numbers become float64.
            y: ignored.
            sample_weight: w, ``[N]`` or ``[B, N]``, finite and >= 0, at least K of them positive; 1 by default.
            labels: for semi-supervised k-means the cluster that a row stays in, ``[N]`` or ``[B, N]``, integers below
                K; below 0: any. A cluster with labelled rows starts at their mean, the others as ``init`` says, given
                these (centres and a function give all). ``predict`` knows no labels.

        Returns:
            self.
        """
        group = open_group(self.process_group)
        with group.together():
            self._check_settings()
            rows = rows_of(X, self)
            weights = self._weights(sample_weight, X, rows)
            fixed = labels_of(labels, X, rows, self.n_clusters)
            if isinstance(X, Tensor) or is_batched(X):
                self.n_features_in_ = rows.shape[2]
                vars(self).pop("feature_names_in_", None)  # of an earlier fit
            else:
                validate_data(self, cast("Any", X), skip_check_array=True)
            init, seed = self._init(group), self._seed()
        counts = group.check_everywhere(
            lambda: rows.shape[1], same=lambda: self._description(rows, weights, fixed, init)
        )
        if not isinstance(self.random_state, int | np.integer):
            seed = group.gather_int(seed)[0]
        shards = Shards(group, counts)
        self._check_size(rows, shards.total)
        data = self._data(rows, weights, shards, fixed)
        if weights is not None:
            self._check_positive(weights, data)
        variance = data.variance()  # raises if a row is not finite
        with self._progress(group) as progress:
            best, several = None, False
            for starts in self._groups(data, self._starts(data, init, seed, X)):
                together = len(starts) > data.problems  # several of the only problem
                several |= together
                solution = lloyd(
                    data.times(len(starts)) if together else data,
                    starts,
                    max_iter=self.max_iter,
                    tol=self.tol,
                    variance=variance,
                    empty_cluster=self.empty_cluster,
                    progress=progress,
                )
                for one in solution.each() if together else [solution]:
                    best = one if best is None else best.or_better(one)
            assert best is not None  # there is a start at least
            if several:
                best = best._replace(rechecked=data.doubts(best.centers))
        if not best.centers.isfinite().all():
            raise ArgumentError(f"X: expected values whose sums {data.dtype} can hold, got up to {data.largest():.3g}")
        self._set_attributes(best, X, rows)
        if (filled := int(best.filled.min())) < self.n_clusters and self.empty_cluster != "keep":
            warnings.warn(
                f"Number of distinct clusters ({filled}) found smaller than n_clusters ({self.n_clusters}). "
                "Possibly due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=3,  # of who calls what no_grad has wrapped
            )
        return self

    @overload
    def fit_predict(
        self,
        X: Tensor,
        y: object = None,
        sample_weight: Tensor | ArrayLike | None = None,
        *,
        labels: Tensor | ArrayLike | None = None,
    ) -> Tensor: ...
    @overload
    def fit_predict(
        self,
        X: ArrayLike,
        y: object = None,
        sample_weight: Tensor | ArrayLike | None = None,
        *,
        labels: Tensor | ArrayLike | None = None,
    ) -> np.ndarray: ...
    def fit_predict(self, X, y=None, sample_weight=None, *, labels=None):
        """``fit(X, y, sample_weight, labels=labels).labels_``."""
        return self.fit(X, y, sample_weight, labels=labels).labels_

    @overload
    def fit_transform(
        self,
        X: Tensor,
        y: object = None,
        sample_weight: Tensor | ArrayLike | None = None,
        *,
        labels: Tensor | ArrayLike | None = None,
    ) -> Tensor: ...
    @overload
    def fit_transform(
        self,
        X: ArrayLike,
        y: object = None,
        sample_weight: Tensor | ArrayLike | None = None,
        *,
        labels: Tensor | ArrayLike | None = None,
    ) -> np.ndarray: ...
    def fit_transform(self, X, y=None, sample_weight=None, *, labels=None):
        """``fit(X, y, sample_weight, labels=labels).transform(X)``."""
        return self.fit(X, y, sample_weight, labels=labels).transform(X)

    @overload
    def predict(self, X: Tensor) -> Tensor: ...
    @overload
    def predict(self, X: ArrayLike) -> np.ndarray: ...
    @torch.no_grad()
    def predict(self, X):
        """Return the nearest centre of every row of X, ``[M, D]`` or ``[B, M, D]``: int64 ``[M]`` or ``[B, M]``."""
        data, centers = self._new_data(X)
        labels = data.nearest(centers)
        return like(labels if is_batched(X) else labels[0], X)

    @overload
    def transform(self, X: Tensor) -> Tensor: ...
    @overload
    def transform(self, X: ArrayLike) -> np.ndarray: ...
    @torch.no_grad()
    def transform(self, X):
        """Return the distances of rows of X, ``[M, D]``, to all centres, ``[M, K]``: ``|x - mu|`` or ``1 - cosine``."""
        data, centers = self._new_data(X)
        if data.x.numel() == 0:
            distances = torch.empty(*data.x.shape[:2], centers.shape[1], dtype=data.dtype, device=data.x.device)
        else:
            distances = torch.cat(
                [_all_distances(chunk.x, centers, self.metric).to(data.x.device) for chunk in data.chunks()], 1
            )
        return like(distances if is_batched(X) else distances[0], X)

    @torch.no_grad()
    def score(
        self, X: Tensor | ArrayLike, y: object = None, sample_weight: Tensor | ArrayLike | None = None
    ) -> float | Any:
        """Return minus the weighted sum of the distances of the rows of X to their nearest centres."""
        data, centers = self._new_data(X, sample_weight)
        if not data.n:
            raise ArgumentError("X: expected at least 1 row, got 0")
        inertia = data.inertia(centers, data.nearest(centers))
        return like(-inertia, X) if is_batched(X) else -inertia.item()

    @property
    def _n_features_out(self) -> int:
        return self.cluster_centers_.shape[-2]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _check_settings(self) -> None:
        counts = {"n_clusters": self.n_clusters, "max_iter": self.max_iter}
        if self.n_init != "auto":
            counts["n_init"] = self.n_init
        if self.batch_size is not None:
            counts["batch_size"] = self.batch_size
        for name, value in counts.items():
            check_count(name, value)
        check_not_negative("tol", self.tol)
        check_flag("copy_x", self.copy_x)
        check_choice("algorithm", self.algorithm, get_args(Algorithm))
        check_choice("metric", self.metric, METRICS)
        check_choice("empty_cluster", self.empty_cluster, empty_clusters.POLICIES)
        check_backend("kmeans_assign", self.backend)

    def _init(self, group: Group) -> Init | Tensor | InitFunction:
        """Return the kind of start, the centres as a tensor, or the function that makes them."""
        init: Any = self.init
        if isinstance(init, Tensor) or (isinstance(init, str) and init in SEEDINGS):
            return cast("Init | Tensor", init)
        if callable(init):
            if not group.is_null:
                raise ArgumentError("init: expected a name or centres with process_group, got a function of all rows")
            return init
        try:
            if isinstance(init, str):
                raise ValueError
            return tensor_of(np.asarray(init, dtype=np.float64))
        except (TypeError, ValueError):
            names = ", ".join(f'"{name}"' for name in SEEDINGS)
            raise ArgumentError(f"init: expected {names}, centres or a function, got {shown(init)}") from None

    def _seed(self) -> int:
        """Return the seed of this fit; of a generator a new one each time."""
        state = self.random_state
        if isinstance(state, torch.Generator):
            return int(torch.randint(2**62, (), generator=state, device=state.device))
        if state is None or isinstance(state, np.random.RandomState):
            return int((np.random if state is None else state).randint(2**31))
        check_seed("random_state", state)
        return int(state)

    def _description(
        self, rows: Tensor, weights: Tensor | None, fixed: Tensor | None, init: Init | Tensor | InitFunction
    ) -> dict:
        """Describe what must be the same on every process, by name."""
        names = ("n_clusters", "metric", "n_init", "max_iter", "tol", "empty_cluster", "backend")
        state = self.random_state
        return {
            "X": f"[{len(rows)}, rows, {rows.shape[2]}]",
            "X.dtype": str(rows.dtype),
            "sample_weight": None if weights is None else "given",
            "labels": None if fixed is None else "given",
            "init": digest(init) if isinstance(init, Tensor) else init,
            "device": self._device(rows).type,
            "random_state": int(state) if isinstance(state, int | np.integer) else type(state).__name__,
            **{name: getattr(self, name) for name in names},
        }

    def _check_size(self, rows: Tensor, total: int) -> None:
        if 0 in (rows.shape[0], rows.shape[2]):
            raise ArgumentError(f"X: expected at least one problem and one feature, got shape {list(rows.shape)}")
        if total < self.n_clusters:
            raise ArgumentError(f"X: expected at least n_clusters={self.n_clusters} rows, got {total}")

    def _weights(self, sample_weight: Any, X: Any, rows: Tensor) -> Tensor | None:
        weights = weights_of(sample_weight, X, rows)
        if weights is not None:
            check_finite("sample_weight", weights)
            if (weights < 0).any():
                raise ArgumentError(f"sample_weight: expected weights >= 0, got {weights.min().item()}")
        return weights

    def _check_positive(self, weights: Tensor, data: Data) -> None:
        positive = data.group.sum((weights > 0).sum(1).to(data.device)).min().item()
        if positive < self.n_clusters:
            least = f"n_clusters={self.n_clusters} weights above zero"
            raise ArgumentError(f"sample_weight: expected at least {least}, got {positive}")

    def _device(self, x: Tensor) -> torch.device:
        return x.device if self.device is None else torch.empty(0, device=self.device).device

    def _data(
        self, rows: Tensor, weights: Tensor | None, shards: Shards | None = None, fixed: Tensor | None = None
    ) -> Data:
        return Data(rows, weights, self.metric, self.batch_size, self._device(rows), self.backend, shards, fixed)

    def _new_data(self, X: Any, sample_weight: Any = None) -> tuple[Data, Tensor]:
        """Check rows that are none of ``fit``'s, and return them and the centres [problems, k, d]."""
        check_is_fitted(self)
        rows, centers = rows_of(X, self), self.cluster_centers_
        centers = centers.detach() if isinstance(centers, Tensor) else tensor_of(np.asarray(centers))
        if not (isinstance(X, Tensor) or is_batched(X)):
            validate_data(self, X, skip_check_array=True, reset=False)
        elif rows.shape[2] != centers.shape[-1]:
            raise ArgumentError(f"X: expected {centers.shape[-1]} features as in fit, got {rows.shape[2]}")
        if is_batched(X) != (centers.ndim == 3) or (centers.ndim == 3 and len(rows) != len(centers)):
            problems = f"[{len(centers)}, rows, features]" if centers.ndim == 3 else "[rows, features]"
            raise ArgumentError(f"X: expected shape {problems} as in fit, got {list(np.shape(X))}")
        check_finite("X", rows)
        data = self._data(rows, self._weights(sample_weight, X, rows))
        return data, (centers if centers.ndim == 3 else centers[None]).to(device=data.device, dtype=data.dtype)

    def _groups(self, data: Data, starts: Iterator[Tensor]) -> Iterator[Tensor]:
        """Put starts [problems, k, d] of a single problem together where they can go on so: [starts, k, d]."""
        while group := list(itertools.islice(starts, data.starts_at_once(self.n_clusters))):
            yield torch.cat(group)

    def _starts(self, data: Data, init: Init | Tensor | InitFunction, seed: int, X: Any) -> Iterator[Tensor]:
        if isinstance(init, Tensor):
            yield self._given_centers(data, init)
            return
        starts = self.n_init
        if starts == "auto":
            starts = RANDOM_STARTS if init == "random" or callable(init) else 1
        if callable(init):
            state = np.random.RandomState(seed % 2**32)
            for _ in range(starts):
                yield self._given_centers(data, self._made_centers(init, X, state))
            return
        generators = [torch.Generator().manual_seed(seed) for _ in range(data.problems)]
        for _ in range(starts):
            yield SEEDINGS[init](data, self.n_clusters, generators)

    def _made_centers(self, init: InitFunction, X: Any, state: np.random.RandomState) -> Tensor:
        rows = X if hasattr(X, "ndim") else np.asarray(X)  # a list
        made = [init(x, self.n_clusters, random_state=state) for x in (rows if is_batched(rows) else [rows])]
        try:
            made = [x if isinstance(x, Tensor) else tensor_of(np.asarray(x, dtype=np.float64)) for x in made]
            return torch.stack(made) if is_batched(rows) else made[0]
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentError(f"init: expected a function that returns centres, got {shown(made[0])}") from None

    def _given_centers(self, data: Data, init: Tensor) -> Tensor:
        expected = (data.problems, self.n_clusters, data.d)
        centers = init.detach()[None] if init.ndim == 2 else init.detach()
        if centers.shape != expected or not centers.is_floating_point():
            wanted = list(expected[1:]) if data.problems == 1 else list(expected)
            got = f"{init.dtype} {list(init.shape)}"
            raise ArgumentError(f"init: expected floating-point centres {wanted}, got {got}")
        check_finite("init", centers)
        centers = centers.to(device=data.device, dtype=data.dtype)
        return normalize_rows(centers) if self.metric == "cosine" else centers

    def _set_attributes(self, best: Solution, X: Any, rows: Tensor) -> None:
        results = best.centers, best.labels, best.inertia, best.n_iter
        if not is_batched(X):
            centers, labels, inertia, n_iter = (result[0] for result in results)
            self.cluster_centers_, self.labels_ = like(centers, X), like(labels, X)
            self.inertia_, self.n_iter_ = inertia.item(), n_iter.item()
        else:
            self.cluster_centers_, self.labels_, self.inertia_, self.n_iter_ = (like(result, X) for result in results)
        self.doubtful_, self.rechecked_ = best.rechecked.tolist()

    @contextlib.contextmanager
    def _progress(self, group: Group):
        if not (self.verbose and group.is_first):
            yield lambda changed: None
            return
        from tqdm import tqdm

        with tqdm(desc=f"k-means, K={self.n_clusters}", unit=" iterations") as bar:

            def advance(changed: Tensor) -> None:
                bar.set_postfix(labels_changed=int(changed.sum()), refresh=False)
                bar.update()

            yield advance


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def _all_distances(x: Tensor, centers: Tensor, metric: str) -> Tensor:
    x = x.to(centers.dtype)
    if metric == "cosine":
        return (1 - normalize_rows(x) @ normalize_rows(centers).mT).clamp_(min=0)
    # |x|^2 - 2<x,c> + |c|^2 cancels badly far from the origin, so the origin moves to the centres.
    origin = centers.mean(1, keepdim=True)
    x, centers = x - origin, centers - origin
    square = x.square().sum(2)[:, :, None] + centers.square().sum(2)[:, None]
    return torch.baddbmm(square, x, centers.mT, alpha=-2).clamp_(min=0).sqrt_()
