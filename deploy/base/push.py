"""Push what a stage's run made to the DVC remote, then the record of that run:  python push.py STAGE

`dvc push --run-cache` leaves out what git tracks (`cache: false`), without which a run is not restored elsewhere.
"""

import sys

from dvc.repo import Repo


def main(name: str) -> None:
    with Repo() as repo, repo.lock:
        runs = repo.stage_cache
        for stage in repo.stage.collect(name):
            record = runs._load(stage)
            if record is None:  # it is as dvc.lock has it, and came from the remote
                continue
            for objects in runs._create_stage(record).get_used_objs().values():
                failed = repo.cloud.push(objects).failed
                if failed:
                    sys.exit(f"error: {name}: expected to push all its files to the DVC remote, failed: {len(failed)}")
        runs.push(None)  # last: what a record names is there


if __name__ == "__main__":
    main(sys.argv[1])
