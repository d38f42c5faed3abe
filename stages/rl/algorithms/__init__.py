"""One algorithm a file, each beside its paper; needs torch and nothing else.

`protocol.py` says what an algorithm is. To add one: a file here, a row in `ALGORITHMS`, a settings class in
`stages/rl/config.py`. `dpo.py` is offline, so it is a loss and no `Algorithm`: ../offline.py calls it.
"""

from stages.rl.algorithms.online_dpo import OnlineDpo
from stages.rl.algorithms.protocol import Algorithm
from stages.rl.algorithms.remax import Remax

ALGORITHMS: dict[str, type[Algorithm]] = {
    "online_dpo": OnlineDpo,
    "remax": Remax,
}
