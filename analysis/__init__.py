"""Reads run directories: tables in, figures out. Imports nothing of the engine, so it runs anywhere.

python -m analysis report DIR [DIR ...] [--out FILE] [--each] [--labels LABEL ...]
"""

from analysis.compare import load_runs
from analysis.load import NotARunError, Run, load_run

__all__ = ["NotARunError", "Run", "load_run", "load_runs"]
