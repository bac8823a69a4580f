"""`python -m curvature_engine` prints the catalogue."""

import json
import sys

from curvature_engine.catalogue import catalogue

json.dump(catalogue(), sys.stdout, indent=2, ensure_ascii=False)
sys.stdout.write("\n")
