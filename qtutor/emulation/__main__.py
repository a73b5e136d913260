"""Run a script that imports Transformer Engine where there is none: ``python -m qtutor.emulation script.py ARGUMENTS``,
``torchrun --nproc-per-node 2 -m qtutor.emulation script.py ARGUMENTS``.  Where the real one runs, it gets that."""

import runpy
import sys

from .. import te_switch

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m qtutor.emulation script.py [its arguments]")
    te_switch.activate()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
