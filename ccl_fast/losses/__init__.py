"""Objectives: an nn.Module each, a page of formula over the operators."""

from ccl_fast.losses.adameow import AdaMEOWLoss, PairWeights
from ccl_fast.losses.cacr import CACRLoss
from ccl_fast.losses.ccl import CCLLoss
from ccl_fast.losses.cluster_negatives import CenterNegativesLoss, MCLLoss, MEOWLoss
from ccl_fast.losses.feature_transformation import (
    FeatureTransformationLoss,
    extrapolate_positives,
    interpolate_negatives,
)
from ccl_fast.losses.hard_contrastive import HardContrastiveLoss
from ccl_fast.losses.infonce import InfoNCELoss
from ccl_fast.losses.interclr import InterCLRLoss
from ccl_fast.losses.lightgcl import LightGCLLoss, SVDView
from ccl_fast.losses.mlcd import MLCDLoss, nearest_centers
from ccl_fast.losses.mochi import MoCHiLoss
from ccl_fast.losses.pamc import PamCLoss
from ccl_fast.losses.prototypes import DeepClusterV2Loss, ProtoNCELoss
from ccl_fast.losses.sbcl import SBCLLoss
from ccl_fast.losses.scgc import SCGCLoss, influence_matrix
from ccl_fast.losses.score_histogram import ScoreHistogram, score_histogram
from ccl_fast.losses.sepclr import SepCLRLoss
from ccl_fast.losses.supcon import SupConLoss
from ccl_fast.losses.swav import SwAVLoss
from ccl_fast.losses.uniformity import tolerance, uniformity
from ccl_fast.losses.whitenedcse import WhitenedCSELoss, shuffled_group_whitening

__all__ = [
    "AdaMEOWLoss",
    "CACRLoss",
    "CCLLoss",
    "CenterNegativesLoss",
    "DeepClusterV2Loss",
    "FeatureTransformationLoss",
    "HardContrastiveLoss",
    "InfoNCELoss",
    "InterCLRLoss",
    "LightGCLLoss",
    "MCLLoss",
    "MEOWLoss",
    "MLCDLoss",
    "MoCHiLoss",
    "PairWeights",
    "PamCLoss",
    "ProtoNCELoss",
    "SBCLLoss",
    "SCGCLoss",
    "SVDView",
    "ScoreHistogram",
    "SepCLRLoss",
    "SupConLoss",
    "SwAVLoss",
    "WhitenedCSELoss",
    "extrapolate_positives",
    "influence_matrix",
    "interpolate_negatives",
    "nearest_centers",
    "score_histogram",
    "shuffled_group_whitening",
    "tolerance",
    "uniformity",
]
