"""Objectives: an nn.Module each, a page of formula over the operators."""

from ccl_fast.losses.ccl import CCLLoss
from ccl_fast.losses.infonce import InfoNCELoss
from ccl_fast.losses.supcon import SupConLoss

__all__ = ["CCLLoss", "InfoNCELoss", "SupConLoss"]
