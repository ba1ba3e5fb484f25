"""Cross-Modal Knowledge Interaction (CMKI): one learnable knowledge bank shared by both modalities.

    x_hat = softmax(x D^T) D                                                  D: bank (K, d), x: (..., d)
    loss  = alpha (mse(v_hat, v) + mse(t_hat, t)) + beta InfoNCE(v, t) + gamma InfoNCE(v_hat, t_hat)
"""
import torch
import torch.nn.functional as F
from torch import nn


def bank_attention(x, bank, scale=1.0):
    """Re-express x (..., d) from the bank (K, d): softmax(scale x bank^T) bank, the same shape as x."""
    return torch.softmax(scale * x @ bank.mT, dim=-1) @ bank


class KnowledgeBank(nn.Module):
    """The cross-modal knowledge bank D (size, dim); called on x (..., dim) it returns x_hat (..., dim)."""

    def __init__(self, size=2048, dim=768, init="orthogonal"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim))
        nn.init.orthogonal_(self.weight)

    def forward(self, x):
        return bank_attention(x, self.weight)


def info_nce(a, b, scale=10.0):
    """Symmetric InfoNCE of paired embeddings a, b (B, d), L2-normalised here; scale is the inverse temperature."""
    logits = scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).mT
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.mT, pairs)) / 2


def alignment_loss(v, t, v_hat, t_hat, alpha=0.5, beta=1.0, gamma=1.0, scale=10.0):
    """BrgSA's training loss of a batch of pairs, each (B, d); returns (total, its parts as a dict of tensors)."""
    parts = {
        "mse": F.mse_loss(v_hat, v) + F.mse_loss(t_hat, t),
        "info_nce": info_nce(v, t, scale),
        "info_nce_hat": info_nce(v_hat, t_hat, scale),
    }
    return alpha * parts["mse"] + beta * parts["info_nce"] + gamma * parts["info_nce_hat"], parts
