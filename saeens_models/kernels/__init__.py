"""Fast training steps: plain torch (`reference`), compiled loops on a `Team` of CPU threads (`cpu_*`), Triton kernels (`cuda_topk`).

All compute the architectures' functions. `topk_reconstruction` uses the Triton kernels if they are faster and passed their check on
this device, else the reference.
"""

from saeens_models.kernels.cuda_topk import topk_reconstruction
from saeens_models.kernels.reference import TopKReconstruction, select_topk
from saeens_models.kernels.team import Team, cpu_team

__all__ = ["Team", "TopKReconstruction", "cpu_team", "select_topk", "topk_reconstruction"]
