"""`python -m curvature_worker`: the same as `curvature worker`."""

import typer

from curvature_worker.command import worker

if __name__ == "__main__":
    typer.run(worker)
