"""When the pipeline runs: DVC decides whether a stage must run, Prefect when and where.

Read `dvc.py` (one `dvc repro`, safely), `workspace.py` (a run's own clone and branch) and `execution.py` (one stage in
it), then the flows: `rlhf.py` (the stages in order), `stage.py` and `generator.py` (what other workers do for it),
`sweep.py`, `evaluate.py`, `promote.py` (what becomes of the policy). What they run on: `worker.py`, `devices.py`,
`automations.py`; the servers: `services.py` (the command line), `services_run.py` (what is started), `supervisor.py`
(what keeps it running).
"""

import os

from stages.common.entry import ENVIRONMENT_DEFAULTS

# Before anything imports prefect, which reads its environment on import.
for _name, _value in ENVIRONMENT_DEFAULTS.items():
    os.environ.setdefault(_name, _value)
