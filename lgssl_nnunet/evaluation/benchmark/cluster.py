"""Workers as jobs of a cluster, through submitit."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lgssl_nnunet.errors import LGSSLError, MissingDependencyError, UsageError, install_extra
from lgssl_nnunet.evaluation.benchmark.worker import Job, work
from lgssl_nnunet.evaluation.benchmark.workers import watch

logger = logging.getLogger(__name__)

CLUSTERS = ("slurm", "local")
DEFAULT_MINUTES = 24 * 60
"""submitit's own default of five minutes would end every training."""


@dataclass(frozen=True)
class ClusterWorker:
    """One job. submitit calls `checkpoint` when the job is preempted or its time is over, and queues what it returns.

    Attributes:
        job: the cells; a training that was cut off continues from its checkpoint.
    """

    job: Job

    def __call__(self) -> None:
        """Work until nothing is free: a job that waits for others would only hold its node."""
        os.environ.update(self.job.variables)
        work(self.job, wait=False)

    def checkpoint(self) -> Any:
        """Return the same job for another turn."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def require_submitit() -> None:
    """Refuse before any work when the package is missing.

    Raises:
        MissingDependencyError: with the extra to install.
    """
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"--cluster needs the package submitit: run {install_extra('cluster')}, or leave --cluster out."
        ) from error


def run_on_cluster(job: Job, jobs: int, cluster: str, options: Mapping[str, Any], progress: bool) -> None:
    """Submit workers and wait for them; interrupted, the jobs go on, and the same call finds what they did.

    Args:
        job: the cells.
        jobs: number of workers.
        cluster: "slurm", or "local" for processes of this machine.
        options: submitit's parameters by name, such as timeout_min or slurm_partition.
        progress: show a bar over the cells.

    Raises:
        UsageError: submitit or the cluster refuses an option.
        LGSSLError: a job ended with an error.
    """
    require_submitit()
    import submitit

    try:
        executor = submitit.AutoExecutor(job.folder / "jobs", cluster=cluster)
        executor.update_parameters(**{"name": "lgssl_benchmark", "timeout_min": DEFAULT_MINUTES, **options})
    except (NameError, RuntimeError, ValueError, AssertionError) as error:
        raise UsageError(f"--cluster {cluster}: {' '.join(str(error).split())}") from error
    with executor.batch():
        submitted = [executor.submit(ClusterWorker(job)) for _ in range(min(jobs, len(job.cells)))]
    logger.info("Submitted %s; their output is in %s", ", ".join(j.job_id for j in submitted), job.folder / "jobs")
    watch(job, lambda: not all(j.done() for j in submitted), progress)
    failed = [j for j in submitted if j.exception() is not None]
    if failed:
        listing = "; ".join(f"{j.job_id}, see {j.paths.stderr}" for j in failed)
        raise LGSSLError(f"{len(failed)} job(s) of the cluster ended with an error: {listing}.")
