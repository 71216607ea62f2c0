"""Who competes in k-means, each in its fair configuration: a function from the rows to the centres.

Everyone computes exactly what the case asks for, on all rows: as many iterations, and at the end the labels of the
returned centres where the case wants them. What a library prepares for a run is inside the timed region.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.clustering.cases import CASES, KMeansCase, Outcome, Rows, Run
from benchmarks.harness.contender import Contender
from ccl_fast.clustering import KMeans
from ccl_fast.ops.kmeans.assign import prepare_rows
from ccl_fast.ops.kmeans.update import kmeans_update

Assign = Callable[[Tensor, Tensor], Tensor]  # rows [n, d], centres [k, d] -> labels [n]
# Entries of a block of scores of plain torch: on a CPU it should stay in the cache.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 20, 1 << 27


@dataclass(frozen=True, kw_only=True)
class KMeansContender(Contender):
    assign: Assign  # as the runs assign: never timed, to compare labels of the same centres
    ours: bool = False  # and so never wrong


def _our_assign(x: Tensor, centers: Tensor) -> Tensor:
    return _our_labels(x, centers)[0]


def _our_labels(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    labels, rechecked = prepare_rows(x[None], metric="euclidean").nearest(centers[None].float())
    return labels[0], rechecked


def _ours(case: KMeansCase) -> Run:
    def iteration(rows: Rows) -> Outcome:
        labels, rechecked = _our_labels(*rows)
        sums, sizes = kmeans_update(rows.x, labels, len(rows.centers))
        means = torch.where(sizes[:, None] > 0, sums / sizes[:, None], rows.centers.double())
        return Outcome(means.float(), 1, int(rechecked[1]))

    def fit(rows: Rows) -> Outcome:
        init = case.seeding or rows.centers
        model = KMeans(len(rows.centers), init=init, n_init=case.starts, max_iter=case.iterations, tol=0.0)
        model.fit(rows.x)
        return Outcome(model.cluster_centers_, model.n_iter_, model.rechecked_)

    def predict(rows: Rows) -> Outcome:
        model = KMeans(len(rows.centers))
        model.cluster_centers_, model.n_features_in_ = rows.centers, rows.x.shape[1]
        model.predict(rows.x)
        return Outcome(rows.centers, 0)

    if not case.iterations:
        return predict
    return fit if case.final_labels else iteration


def _faiss_assign(x: Tensor, centers: Tensor) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(centers.numpy())
    return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def _faiss(case: KMeansCase) -> Run:
    import faiss

    plus_plus = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    seedings = {"random": faiss.ClusteringInitMethod_RANDOM, "plain-k-means++": plus_plus}

    def run(rows: Rows) -> Outcome:
        faiss.omp_set_num_threads(torch.get_num_threads())
        (n, d), k = rows.x.shape, len(rows.centers)
        # No sub-sampling, and no warning that there are few points.
        options = {"niter": case.iterations, "min_points_per_centroid": 1, "max_points_per_centroid": n}
        options["nredo"] = case.starts
        model = faiss.Kmeans(d, k, init_method=seedings[case.seeding or "random"], **options)
        model.train(rows.x.numpy(), init_centroids=None if case.seeding else rows.centers.numpy())
        if case.final_labels:
            model.assign(rows.x.numpy())
        return Outcome(torch.from_numpy(model.centroids), len(model.obj))

    def predict(rows: Rows) -> Outcome:
        _faiss_assign(*rows)
        return Outcome(rows.centers, 0)

    return run if case.iterations else predict


def _sklearn_iteration(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and new centres by the function that its fit calls in every iteration."""
    import numpy as np
    from sklearn.cluster._k_means_lloyd import lloyd_iter_chunked_dense
    from sklearn.utils.parallel import _threadpool_controller_decorator

    k, threads = len(centers), torch.get_num_threads()
    labels, moved = np.empty(len(x), np.int32), np.zeros(tuple(centers.shape), np.float32)
    sizes, shift, weights = np.zeros(k, np.float32), np.zeros(k, np.float32), np.ones(len(x), np.float32)
    # As in its fit: its own threads, each with a BLAS of one.
    iteration = _threadpool_controller_decorator(limits=1, user_api="blas")(lloyd_iter_chunked_dense)
    iteration(x.numpy(), weights, centers.numpy(), moved, sizes, labels, shift, threads)
    return torch.from_numpy(labels).long(), torch.from_numpy(moved)


def _sklearn(case: KMeansCase) -> Run:
    from sklearn.cluster import KMeans as SklearnKMeans

    def fit(rows: Rows) -> Outcome:
        init = case.seeding or rows.centers.numpy()
        options = {"max_iter": case.iterations, "tol": 0.0, "algorithm": "lloyd", "random_state": 0}
        options["n_init"] = case.starts
        model = SklearnKMeans(len(rows.centers), init=init, **options).fit(rows.x.numpy())
        return Outcome(torch.from_numpy(model.cluster_centers_), model.n_iter_)

    def predict(rows: Rows) -> Outcome:
        model = SklearnKMeans(len(rows.centers))
        model.cluster_centers_, model.n_features_in_ = rows.centers.numpy(), rows.x.shape[1]
        model._n_threads = torch.get_num_threads()
        model.predict(rows.x.numpy())
        return Outcome(rows.centers, 0)

    if not case.iterations:
        return predict
    return fit if case.final_labels else lambda rows: Outcome(_sklearn_iteration(*rows)[1], 1)


def _torch_assign(x: Tensor, centers: Tensor) -> Tensor:
    """Blocks of a matrix product, and their arg-max of ``<x, c> - |c|^2 / 2``."""
    entries = CPU_ENTRIES if x.device.type == "cpu" else DEVICE_ENTRIES
    bias, weight = centers.float().square().sum(1) / -2, centers.to(x.dtype).T

    def scores(rows: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return torch.addmm(bias, rows, weight)
        if x.device.type == "cpu":
            return torch.addmm(bias, rows.float(), weight.float())
        return torch.mm(rows, weight, out_dtype=torch.float32).add_(bias)

    labels, block = torch.empty(len(x), dtype=torch.int64, device=x.device), max(1, entries // len(centers))
    for rows, of_rows in zip(x.split(block), labels.split(block), strict=True):
        torch.argmax(scores(rows), 1, out=of_rows)
    return labels


def _lloyd(assign: Assign) -> Callable[[KMeansCase], Run]:
    """Lloyd's iterations around an assignment, with sums by index_add_."""

    def build(case: KMeansCase) -> Run:
        def run(rows: Rows) -> Outcome:
            x, k = rows.x, len(rows.centers)
            centers = x[torch.randperm(len(x), device=x.device)[:k]] if case.seeding else rows.centers
            centers = centers.float()
            for _ in range(case.iterations):
                labels = assign(x, centers)
                sums, sizes = torch.zeros_like(centers), labels.bincount(minlength=k)[:, None]
                for part, of_part in zip(x.split(1 << 16), labels.split(1 << 16), strict=True):
                    sums.index_add_(0, of_part, part.float())
                centers = torch.where(sizes > 0, sums / sizes, centers)
            if case.final_labels:
                assign(x, centers)
            return Outcome(centers, case.iterations)

        return run

    return build


def _fast_pytorch(case: KMeansCase) -> Run:
    from fast_pytorch_kmeans import KMeans as FastPytorchKMeans

    def run(rows: Rows) -> Outcome:
        model = FastPytorchKMeans(len(rows.centers), max_iter=case.iterations, tol=0.0, init_method="random")
        model.fit(rows.x, centroids=None if case.seeding else rows.centers)
        if case.final_labels:
            model.predict(rows.x)
        return Outcome(model.centroids, case.iterations)

    return run


def _fast_pytorch_assign(x: Tensor, centers: Tensor) -> Tensor:
    from fast_pytorch_kmeans import KMeans as FastPytorchKMeans

    model = FastPytorchKMeans(len(centers))
    model.centroids = centers.to(x.dtype)
    return model.predict(x)


def _faiss_gpu_assign(x: Tensor, centers: Tensor) -> Tensor:
    import faiss
    import faiss.contrib.torch_utils

    if not hasattr(_faiss_gpu_assign, "resources"):  # once: they hold scratch memory
        _faiss_gpu_assign.resources = faiss.StandardGpuResources()
    return faiss.knn_gpu(_faiss_gpu_assign.resources, x, centers.to(x.dtype), 1)[1][:, 0]


def _flash_assign(x: Tensor, centers: Tensor) -> Tensor:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    square = x.float().square().sum(1)
    return euclid_assign_triton(x[None], centers[None].to(x.dtype), square[None])[0].long()


def _flash(case: KMeansCase) -> Run:
    from flash_kmeans import batch_kmeans_Euclid

    def run(rows: Rows) -> Outcome:
        init = None if case.seeding else rows.centers[None]
        options = {"max_iters": case.iterations, "tol": 0.0, "init_centroids": init}
        _, centers, iterations = batch_kmeans_Euclid(rows.x[None], len(rows.centers), **options)
        if case.final_labels:
            _flash_assign(rows.x, centers[0])
        return Outcome(centers[0], iterations)

    return run


CONTENDERS = {
    contender.name: contender
    for contender in (
        KMeansContender(
            "ours",
            _ours,
            "KMeans as a user calls it, tol=0; one iteration: the operators kmeans_assign and kmeans_update",
            assign=_our_assign,
            ours=True,
        ),
        KMeansContender(
            "faiss",
            _faiss,
            "faiss.Kmeans with IndexFlatL2 and no sub-sampling; assign for the labels of the centres it returns",
            package="faiss",
            assign=_faiss_assign,
        ),
        KMeansContender(
            "scikit-learn",
            _sklearn,
            "KMeans(algorithm='lloyd', n_init=1, tol=0), whose fit ends with an assignment; one iteration: the private "
            "function of an iteration, as fit(max_iter=1) would assign twice",
            package="sklearn",
            assign=lambda x, centers: _sklearn_iteration(x, centers)[0],
        ),
        KMeansContender(
            "torch",
            _lloyd(_torch_assign),
            "eager torch: blocks of a matrix product, argmax, index_add_; products of float32 in full precision",
            assign=_torch_assign,
        ),
        KMeansContender(
            "fast-pytorch-kmeans",
            _fast_pytorch,
            "KMeans(tol=0), and predict for the labels of the centres it returns; on a CPU it holds all distances",
            package="fast_pytorch_kmeans",
            assign=_fast_pytorch_assign,
            arrays=lambda size: 16 * size.n * size.clusters,
        ),
        KMeansContender(
            "flash-kmeans",
            _flash,
            "batch_kmeans_Euclid with its heuristic configuration, tol=0; euclid_assign_triton for the labels of the "
            "centres it returns",
            package="flash_kmeans",
            cuda_only=True,
            assign=_flash_assign,
        ),
        KMeansContender(
            "faiss-gpu",
            _lloyd(_faiss_gpu_assign),
            "faiss.knn_gpu on the device's tensors, sums by index_add_ as in faiss.contrib; a random start is drawn by "
            "torch",
            package="faiss",
            cuda_only=True,
            assign=_faiss_gpu_assign,
        ),
    )
}


def find(case: str, contender: str) -> tuple[KMeansCase, KMeansContender]:
    """For the process that measures memory."""
    return CASES[case], CONTENDERS[contender]
