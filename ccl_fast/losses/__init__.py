"""Contrastive losses: an nn.Module each, a page of formula over the operators."""

from ccl_fast.losses.adameow import AdaMEOWLoss, PairWeights
from ccl_fast.losses.base import Loss
from ccl_fast.losses.beclr import BECLRLoss
from ccl_fast.losses.cacr import CACRLoss
from ccl_fast.losses.ccl import CCLLoss
from ccl_fast.losses.center_negatives import CenterNegativesLoss
from ccl_fast.losses.cmim import CMIMLoss
from ccl_fast.losses.coding_rate import CodingRateLoss
from ccl_fast.losses.conr import ConRLoss
from ccl_fast.losses.contrast_margin import contrast_margin
from ccl_fast.losses.deepcluster import DeepClusterV2Loss
from ccl_fast.losses.feature_transformation import (
    FeatureTransformationLoss,
    extrapolate_positives,
    interpolate_negatives,
)
from ccl_fast.losses.gated_pair import GatedPairLoss
from ccl_fast.losses.graph import CSGCLLoss, LightGCLLoss, SCGCLoss, SVDView, community_strength, influence_matrix
from ccl_fast.losses.groco import GroCoLoss
from ccl_fast.losses.hard_contrastive import HardContrastiveLoss
from ccl_fast.losses.infonce import InfoNCELoss
from ccl_fast.losses.interclr import InterCLRLoss
from ccl_fast.losses.list_contrast import ListContrastLoss, segment_neighbors
from ccl_fast.losses.maxsim import MaxSimLoss
from ccl_fast.losses.mcl import MCLLoss
from ccl_fast.losses.meow import MEOWLoss
from ccl_fast.losses.mlc import MLCLoss
from ccl_fast.losses.mlcd import MLCDLoss, nearest_centers
from ccl_fast.losses.mochi import MoCHiLoss
from ccl_fast.losses.ntxent import NTXentLoss
from ccl_fast.losses.pamc import PamCLoss
from ccl_fast.losses.pixpro import PixProLoss, propagate_pixels
from ccl_fast.losses.protogcd import ProtoGCDLoss
from ccl_fast.losses.protonce import ProtoNCELoss
from ccl_fast.losses.sample_pairs import sample_pairs
from ccl_fast.losses.sbcl import SBCLLoss
from ccl_fast.losses.sepclr import SepCLRLoss
from ccl_fast.losses.slotcon import SlotConLoss
from ccl_fast.losses.subspace_margin import SubspaceMarginLoss
from ccl_fast.losses.supcon import SupConLoss
from ccl_fast.losses.swav import SwAVLoss
from ccl_fast.losses.whitenedcse import WhitenedCSELoss, shuffled_group_whitening

__all__ = [
    "AdaMEOWLoss",
    "BECLRLoss",
    "CACRLoss",
    "CCLLoss",
    "CMIMLoss",
    "CSGCLLoss",
    "CenterNegativesLoss",
    "CodingRateLoss",
    "ConRLoss",
    "DeepClusterV2Loss",
    "FeatureTransformationLoss",
    "GatedPairLoss",
    "GroCoLoss",
    "HardContrastiveLoss",
    "InfoNCELoss",
    "InterCLRLoss",
    "LightGCLLoss",
    "ListContrastLoss",
    "Loss",
    "MCLLoss",
    "MEOWLoss",
    "MLCDLoss",
    "MLCLoss",
    "MaxSimLoss",
    "MoCHiLoss",
    "NTXentLoss",
    "PairWeights",
    "PamCLoss",
    "PixProLoss",
    "ProtoGCDLoss",
    "ProtoNCELoss",
    "SBCLLoss",
    "SCGCLoss",
    "SVDView",
    "SepCLRLoss",
    "SlotConLoss",
    "SubspaceMarginLoss",
    "SupConLoss",
    "SwAVLoss",
    "WhitenedCSELoss",
    "community_strength",
    "contrast_margin",
    "extrapolate_positives",
    "influence_matrix",
    "interpolate_negatives",
    "nearest_centers",
    "propagate_pixels",
    "sample_pairs",
    "segment_neighbors",
    "shuffled_group_whitening",
]
