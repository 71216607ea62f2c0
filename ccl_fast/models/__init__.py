"""Networks: an encoder, built by name or given, and a projection head."""

from ccl_fast.models.backbones import build_backbone
from ccl_fast.models.model import Model, embed

__all__ = ["Model", "build_backbone", "embed"]
