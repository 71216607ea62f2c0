"""Contrastive losses: an nn.Module each, a page of formula over the operators."""

from ccl_fast.losses.adameow import AdaMEOWLoss, PairWeights
from ccl_fast.losses.base import Loss
from ccl_fast.losses.beclr import BECLRLoss
from ccl_fast.losses.cacr import CACRLoss
from ccl_fast.losses.ccl import CCLLoss
from ccl_fast.losses.center_negatives import CenterNegativesLoss
from ccl_fast.losses.deepcluster import DeepClusterV2Loss
from ccl_fast.losses.feature_transformation import (
    FeatureTransformationLoss,
    extrapolate_positives,
    interpolate_negatives,
)
from ccl_fast.losses.graph import LightGCLLoss, SCGCLoss, SVDView, influence_matrix
from ccl_fast.losses.hard_contrastive import HardContrastiveLoss
from ccl_fast.losses.infonce import InfoNCELoss
from ccl_fast.losses.interclr import InterCLRLoss
from ccl_fast.losses.maxsim import MaxSimLoss
from ccl_fast.losses.mcl import MCLLoss
from ccl_fast.losses.meow import MEOWLoss
from ccl_fast.losses.mlcd import MLCDLoss, nearest_centers
from ccl_fast.losses.mochi import MoCHiLoss
from ccl_fast.losses.ntxent import NTXentLoss
from ccl_fast.losses.pamc import PamCLoss
from ccl_fast.losses.protogcd import ProtoGCDLoss
from ccl_fast.losses.protonce import ProtoNCELoss
from ccl_fast.losses.sbcl import SBCLLoss
from ccl_fast.losses.sepclr import SepCLRLoss
from ccl_fast.losses.slotcon import SlotConLoss
from ccl_fast.losses.supcon import SupConLoss
from ccl_fast.losses.swav import SwAVLoss
from ccl_fast.losses.whitenedcse import WhitenedCSELoss, shuffled_group_whitening

__all__ = [
    "AdaMEOWLoss",
    "BECLRLoss",
    "CACRLoss",
    "CCLLoss",
    "CenterNegativesLoss",
    "DeepClusterV2Loss",
    "FeatureTransformationLoss",
    "HardContrastiveLoss",
    "InfoNCELoss",
    "InterCLRLoss",
    "LightGCLLoss",
    "Loss",
    "MCLLoss",
    "MEOWLoss",
    "MLCDLoss",
    "MaxSimLoss",
    "MoCHiLoss",
    "NTXentLoss",
    "PairWeights",
    "PamCLoss",
    "ProtoGCDLoss",
    "ProtoNCELoss",
    "SBCLLoss",
    "SCGCLoss",
    "SVDView",
    "SepCLRLoss",
    "SlotConLoss",
    "SupConLoss",
    "SwAVLoss",
    "WhitenedCSELoss",
    "extrapolate_positives",
    "influence_matrix",
    "interpolate_negatives",
    "nearest_centers",
    "shuffled_group_whitening",
]
