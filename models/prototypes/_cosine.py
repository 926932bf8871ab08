"""What members whose score is a cosine share."""

import torch
import torch.nn.functional as F


def cosine(features, vectors):
    """Cosine similarity of features (B, D, h, w) with vectors (K, D) -> (B, K, h, w), in at least float32."""
    with torch.autocast(features.device.type, enabled=False):
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        vectors = F.normalize(vectors, dim=1, eps=1e-6).to(features.dtype)
        # Normalising the scores instead of the features saves a copy of the features.
        return F.conv2d(features, vectors[:, :, None, None]) / features.norm(dim=1, keepdim=True).clamp_min(1e-6)
