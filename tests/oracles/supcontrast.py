"""The loss of SupContrast's losses.py (Khosla et al.), whole matrices and all."""

import torch
from torch import nn


class SupConLoss(nn.Module):
    """Labels or a mask, not both; anchors are all views, or the first of each sample ("one")."""

    def __init__(self, temperature=0.07, contrast_mode="all", base_temperature=0.07):
        super().__init__()
        self.temperature, self.contrast_mode, self.base_temperature = temperature, contrast_mode, base_temperature

    def forward(self, features, labels=None, mask=None):
        if features.ndim > 3:
            features = features.view(*features.shape[:2], -1)
        n, views = features.shape[:2]
        if mask is None:
            labels = torch.arange(n) if labels is None else labels
            mask = labels[:, None] == labels
        anchored = 1 if self.contrast_mode == "one" else views
        rows = torch.cat(features.unbind(1))
        anchors = features[:, 0] if self.contrast_mode == "one" else rows
        others = 1 - torch.eye(n * views, dtype=rows.dtype)[: n * anchored]
        positive = mask.to(rows.dtype).repeat(anchored, views) * others
        logits = anchors @ rows.T / self.temperature
        logits = logits - logits.amax(1, keepdim=True).detach()
        log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
        number = positive.sum(1)
        mean_log_prob = (positive * log_prob).sum(1) / torch.where(number < 1e-6, 1, number)
        return -(self.temperature / self.base_temperature) * mean_log_prob.mean()
