"""A look at a run on its way: whether its features tell classes apart, and whether its clusters tell images apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ccl_fast.evaluation import knn_accuracy
from ccl_fast.models import embed
from ccl_fast.ops import kmeans_assign
from ccl_fast.training.loop import VIEWED, Run
from ccl_fast.training.random_views import embedded_views, spread_rows
from ccl_fast.training.randomness import seeded

if TYPE_CHECKING:
    from ccl_fast.data import Images

# Images that are looked at, so that a look costs a fraction of an epoch.
MAX_TRAIN, MAX_TEST = 10_000, 5_000


class Probe:
    """A look at the features, which adds to a line of the log.

    ``encoder_knn`` and ``head_knn``: accuracy of the nearest training images' votes on the classes of test images, if
    these are known. ``view_agreement``: share of training images whose two views lie nearest to the same centre, or
    prototype; where there are several numbers of them, the key ends with theirs.

    Nothing of it reaches the training, not even its random numbers.

    Args:
        every: epochs from one look to the next; 0: never.
        train, test: images, with their classes where known; of several processes the first needs those to test on.
    """

    def __init__(self, every: int, train: Images, test: Images | None):
        self.every, self.train, self.test = every, train, test

    def is_due(self, epoch: int, last: int) -> bool:
        """Tell whether to look after an epoch: every so many, and after the last of a stage."""
        return self.every > 0 and (epoch % self.every == 0 or epoch == last)

    def look(self, run: Run) -> dict[str, float]:
        """Return what the look adds to the log."""
        return self._accuracies(run) | self._view_agreement(run)

    def _accuracies(self, run: Run) -> dict[str, float]:
        if self.train.classes is None or self.test is None or self.test.classes is None:
            return {}
        of_train, of_test = spread_rows(self.train, MAX_TRAIN), spread_rows(self.test, MAX_TEST)
        train, test = embed(run.result, self.train, of_train), embed(run.result, self.test, of_test)
        classes = self.train.classes[of_train], self.test.classes[of_test]
        return {f"{level}_knn": knn_accuracy(train[level], classes[0], test[level], classes[1]) for level in train}

    def _view_agreement(self, run: Run) -> dict[str, float]:
        targets = [found["centers"] for found in run.pseudo_labels.found] or [p.detach() for p in run.prototypes]
        if not targets:
            return {}
        with seeded(run.fabric.device, run.config.seed, VIEWED):
            _, views = embedded_views(run.result, self.train, run.views)
        log = {}
        for centers in targets:
            first, second = (kmeans_assign(view, centers, metric="cosine")[0] for view in views)
            key = "view_agreement" + (f"/{len(centers)}" if len(targets) > 1 else "")
            log[key] = (first == second).double().mean().item()
        return log
