"""TopK training kernels: selection, sparse decoding and its gradients, behind two functions."""

from saeens_models.kernels.reference import TopKReconstruction, select_topk, topk_reconstruction

__all__ = ["TopKReconstruction", "select_topk", "topk_reconstruction"]
