"""A supervisor process of sample workers: `sample_supervisor.py COUNT`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from anomaly_workers.settings import load_settings
from anomaly_workers.supervisor import Supervisor

if __name__ == "__main__":
    logging.basicConfig(level="WARNING", format="%(asctime)s %(message)s")
    settings = load_settings()
    command = (sys.executable, str(Path(__file__).with_name("sample_worker.py")))
    supervisor = Supervisor(
        settings,
        settings.redis_url,
        int(sys.argv[1]),
        worker_command=command,
        learner_command=None,
        sweep_command=None,
    )
    supervisor.run_forever()
