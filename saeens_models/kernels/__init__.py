"""TopK training kernels: selection, sparse decoding and its gradients.

`reference` is plain torch, for any device; `cpu` computes the same with compiled loops on a `Team` of threads, `cuda` with Triton.
`topk_reconstruction` takes `cuda`'s kernels where they are faster and can be trusted, else the reference.
"""

from saeens_models.kernels.cuda_topk import topk_reconstruction
from saeens_models.kernels.reference import TopKReconstruction, select_topk
from saeens_models.kernels.team import Team, cpu_team

__all__ = ["Team", "TopKReconstruction", "cpu_team", "select_topk", "topk_reconstruction"]
