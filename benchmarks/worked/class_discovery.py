"""How many classes scikit-learn's digits have, if 0 to 4 are labelled, half of their images, and 5 to 9 are not (GPC).

Pixels are scaled to unit length and reduced to 16 principal components, for a digit has 180 images. Accuracy is that of
the images without a label, clusters being matched with digits once for all (further clusters are wrong): of all, of the
labelled digits ("old") and of the others ("new"); beside it k-means with the true number of clusters, with and without
the labels. The search starts from twice the number of labelled classes, and again from twice as many, for it only finds
what is near.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from ccl_fast.clustering import ClassDiscovery, KMeans

OLD, DIGITS, COMPONENTS = 5, 10, 16
STARTS, MAX_CLUSTERS = (10, 20), 50


def run(seed: int) -> dict[str, float]:
    pixels, truth = load_digits(return_X_y=True)
    x = PCA(COMPONENTS, random_state=seed).fit_transform(normalize(pixels))
    is_labelled = (truth < OLD) & (np.random.default_rng(seed).random(len(truth)) < 0.5)
    labels, free = np.where(is_labelled, truth, -1), ~is_labelled
    k_means = KMeans(DIGITS, n_init=5, random_state=seed)
    found = {"k_means": k_means.fit(x).labels_, "k_means_with_labels": k_means.fit(x, labels=labels).labels_}
    figures = {}
    for start in STARTS:
        model = ClassDiscovery(MAX_CLUSTERS, n_clusters=start, random_state=seed).fit(x, labels)
        found[f"class_discovery_from_{start}"] = model.labels_
        figures[f"clusters_from_{start}"] = model.n_clusters_
    for name, clusters in found.items():
        figures |= {f"accuracy_{kind}_{name}": value for kind, value in accuracies(clusters[free], truth[free]).items()}
    return figures


def accuracies(clusters: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    counts = np.zeros((max(clusters.max() + 1, DIGITS), DIGITS))
    np.add.at(counts, (clusters, truth), 1)
    rows, digits = linear_sum_assignment(counts, maximize=True)
    of_cluster = np.full(len(counts), -1)
    of_cluster[rows] = digits
    is_right = of_cluster[clusters] == truth
    parts = {"all": truth >= 0, "old": truth < OLD, "new": truth >= OLD}
    return {name: float(is_right[part].mean()) for name, part in parts.items()}
