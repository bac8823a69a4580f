"""Not confined: a worker's stand-in that starts a process, prints its id, and waits to be killed."""

import sys
from pathlib import Path

from curvature_worker.launcher import launch

scratch, targets, ending = sys.argv[1:]
child = launch("endings", scratch=Path(scratch), options={}, import_paths=[targets])
child.channel.receive(60)
if ending:
    child.channel.send({"ending": ending})
    child.channel.receive(60)
sys.stdout.write(f"{child.pid}\n")
sys.stdout.flush()
sys.stdin.read()
