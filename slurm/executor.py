"""submitit's executor as it is used here: with sbatch's answer read strictly, and the script that a profile asks for."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from dfqbench_slurm import cluster
from dfqbench_slurm.packing import Split
from dfqbench_slurm.profile import Profile
from dfqbench_slurm.submission import Array

NO_LIMIT = 10**9  # of requeueings after a time limit: long sweeps outlive submitit's three


def executor_of(folder: Path, array: Array, part: Split, profile: Profile, after: str | None) -> Any:
    """What submits one array, or one job where it has one task."""
    from submitit.core.utils import DelayedSubmission, JobPaths
    from submitit.slurm.slurm import SlurmExecutor, SlurmJob

    class Executor(SlurmExecutor):  # type: ignore[misc]
        """submitit's own takes the first number behind the word `job` in whatever sbatch prints for the job's."""

        @classmethod
        def affinity(cls) -> int:
            """`--dry-run` works without Slurm; `submit` has looked for its commands already."""
            return 2

        def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Any]:
            """One job, or an array with a task per submission. Raises NotTaken and MaybeTaken, see `cluster.sbatch`."""
            count = len(delayed_submissions)
            ours = JobPaths.get_first_id_independent_folder(self.folder)
            ours.mkdir(parents=True, exist_ok=True)
            for number, delayed in enumerate(delayed_submissions):
                delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
                delayed.dump(ours / f"{array.name}-{number}.pkl")
            if count > 1:
                self.parameters["map_count"] = count
            script = ours / f"{array.name}.sh"
            script.write_text(self._make_submission_file_text(self._submitit_command_str, array.name), encoding="utf-8")
            job = cluster.sbatch(script, array.name)
            jobs: list[SlurmJob[Any]] = [SlurmJob(self.folder, f"{job}_{number}" if count > 1 else job) for number in range(count)]
            try:
                for number, task in enumerate(jobs):
                    task.paths.move_temporary_file(ours / f"{array.name}-{number}.pkl", "submitted_pickle")
                SlurmJob(self.folder, job).paths.move_temporary_file(script, "submission_file", keep_as_symlink=True)
            except OSError:  # without its files a job can do nothing
                cluster.cancel([job])
                raise
            return jobs

    executor = Executor(folder / "jobs", max_num_timeout=NO_LIMIT, python=f"{shlex.quote(sys.executable)} -P")
    p = profile
    given: dict[str, Any] = {
        "partition": p.partition,
        "account": p.account,
        "qos": p.qos,
        "constraint": p.constraint,
        "gpus_per_node": (f"{p.gpu_type}:{p.gpus}" if p.gpu_type else p.gpus) if p.gpus else None,
        "mem": p.memory,
        "dependency": f"afterany:{after}" if after else None,
        "setup": [*(_our_own_variables() if "export" in p.sbatch else []), *p.setup] or None,
    }
    executor.update_parameters(
        job_name=array.name,
        time=p.time,
        cpus_per_task=p.cpus,
        array_parallelism=part.parallel,
        signal_delay_s=p.save_seconds,
        stderr_to_stdout=True,
        # a step does not inherit its cores from its job in every version of Slurm; a job without the user's variables passes its own on
        srun_args=[f"--cpus-per-task={p.cpus}", "--export=ALL"],
        additional_parameters={"requeue" if p.requeue else "no-requeue": True, **p.sbatch},
        **{key: value for key, value in given.items() if value is not None},
    )
    return executor


def _our_own_variables() -> list[str]:
    """Shell lines for what dfqbench itself reads, where a profile says that jobs get no variables (`export: NONE`)."""
    mine = {name: value for name, value in os.environ.items() if name.startswith("DFQBENCH_") or name in ("IMAGENET", "XDG_CACHE_HOME", "PYTHONPATH")}
    return [f"export {name}={shlex.quote(value)}" for name, value in sorted(mine.items())]
