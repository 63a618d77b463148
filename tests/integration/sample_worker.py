"""A worker process of sample jobs."""

from __future__ import annotations

import logging

import sample_jobs

from anomaly_workers import lifeline
from anomaly_workers.settings import load_settings
from anomaly_workers.worker import parse_options, run

if __name__ == "__main__":
    options = parse_options()
    if options.parent:
        lifeline.follow(options.parent)
    logging.basicConfig(level="WARNING", format="%(asctime)s %(message)s")
    settings = load_settings()
    context = sample_jobs.Context(settings.data_dir)
    run(settings, allow=sample_jobs.ALLOWED, context=context, name=options.name)
