"""What is not about language: files, options, devices, loops.

Importing it, which each command does before it loads torch, sets what torch's libraries read from
the environment when they start. What you set yourself is left alone. Ctrl-C during those seconds
ends the command at once.
"""
import os
import pathlib
import signal
import sys

# PyTorch's threads (GNU OpenMP) wait for one another by spinning, by default for milliseconds.
# Beside another busy process the thread that is waited for may itself wait for a core, which the
# spinning ones keep from it: training slows down up to tenfold. So they soon sleep.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "500")

# oneDNN keeps the code of each product for each shape, half a megabyte a piece, up to 1,024 of them
# in each of two caches; batches of ever new lengths fill them. 96 cost no time, 32 cost 15 %.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "96")

# Until `run_main` there is nothing to finish or to save, and a traceback of torch's would be no news.
# A shell's script lets what it starts with & ignore Ctrl-C; what can save must hear it all the same.
command = pathlib.Path(getattr(sys.modules["__main__"], "__file__", None) or os.devnull).resolve()
if pathlib.Path(__file__).resolve().parent.parent in command.parents:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
