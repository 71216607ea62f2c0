"""Networks: an encoder, built by name or given, and a projection head."""

from ccl_fast.models.backbones import build_backbone
from ccl_fast.models.layers import LayerStatistics
from ccl_fast.models.model import Model, embed, embed_layers, embedded_batches

__all__ = ["LayerStatistics", "Model", "build_backbone", "embed", "embed_layers", "embedded_batches"]
