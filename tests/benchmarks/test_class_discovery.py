"""The worked example of ClassDiscovery: that it runs, repeats, and gives plain figures."""

import math

import numpy as np
import pytest

from benchmarks.worked import class_discovery


@pytest.mark.usefixtures("one_thread")
def test_figures_are_plain_and_repeat():
    figures = class_discovery.run(1)
    assert all(type(value) in (int, float) and math.isfinite(value) for value in figures.values())
    assert class_discovery.run(1) == figures
    assert 5 < figures["clusters_from_10"] < 20 and figures["accuracy_all_class_discovery_from_10"] > 0.5


def test_further_clusters_are_wrong():
    clusters = np.arange(12)
    assert class_discovery.accuracies(clusters, clusters % 10) == {"all": 10 / 12, "old": 5 / 7, "new": 1.0}
