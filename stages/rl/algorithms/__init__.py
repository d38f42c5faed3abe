"""One algorithm a file, each beside its paper; needs torch and nothing else.

`protocol.py` says what an algorithm is, `policy_gradient.py` what most of them share. To add one: a file here, a row
in `ALGORITHMS`, a settings class in `stages/rl/algorithm_config.py`. `dpo.py` is offline, so it is a loss and no
`Algorithm`: ../offline.py calls it.
"""

from stages.rl.algorithms.best_of_n import BestOfN
from stages.rl.algorithms.copg import Copg
from stages.rl.algorithms.grpo import Grpo
from stages.rl.algorithms.online_dpo import OnlineDpo
from stages.rl.algorithms.ppo import Ppo
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.algorithms.proximal_rloo import ProximalRloo
from stages.rl.algorithms.reinforce import Reinforce
from stages.rl.algorithms.reinforce_pp import ReinforcePp
from stages.rl.algorithms.remax import Remax
from stages.rl.algorithms.rloo import Rloo

ALGORITHMS: dict[str, type[Algorithm]] = {
    "online_dpo": OnlineDpo,
    "ppo": Ppo,
    "rloo": Rloo,
    "proximal_rloo": ProximalRloo,
    "copg": Copg,
    "best_of_n": BestOfN,
    "remax": Remax,
    "reinforce": Reinforce,
    "reinforce_pp": ReinforcePp,
    "grpo": Grpo,
}
