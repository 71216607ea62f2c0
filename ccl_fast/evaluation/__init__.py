"""How well features tell OOD images from those of the training distribution, and the report that shows it."""

from ccl_fast.errors import packages_of_training

with packages_of_training():
    from ccl_fast.evaluation.bootstrap import (
        CONFIDENCE,
        RESAMPLES,
        confidence_interval,
        difference_intervals,
        metric_intervals,
        resample_metrics,
    )
    from ccl_fast.evaluation.detection import GROUPS, Evaluation, evaluate_model
    from ccl_fast.evaluation.detectors import DEFAULT, make_detectors
    from ccl_fast.evaluation.fitted import FittedDetectors
    from ccl_fast.evaluation.knn import knn_accuracy
    from ccl_fast.evaluation.linear import linear_accuracy
    from ccl_fast.evaluation.page import ShownPicture, write_page
    from ccl_fast.evaluation.raters import RaterAgreement, rater_agreement
    from ccl_fast.evaluation.thresholds import describe_thresholds, threshold

__all__ = [
    "CONFIDENCE",
    "DEFAULT",
    "GROUPS",
    "RESAMPLES",
    "Evaluation",
    "FittedDetectors",
    "RaterAgreement",
    "ShownPicture",
    "confidence_interval",
    "describe_thresholds",
    "difference_intervals",
    "evaluate_model",
    "knn_accuracy",
    "linear_accuracy",
    "make_detectors",
    "metric_intervals",
    "rater_agreement",
    "resample_metrics",
    "threshold",
    "write_page",
]
