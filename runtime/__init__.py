"""What is not about language: files, options, devices, loops.

Importing it, which each command does before it loads torch, sets what torch's libraries read from
the environment when they start. What you set yourself is left alone.
"""
import os

# PyTorch's threads (GNU OpenMP) wait for one another by spinning, by default for milliseconds.
# Beside another busy process the thread that is waited for may itself wait for a core, which the
# spinning ones keep from it: training slows down up to tenfold. So they soon sleep.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# oneDNN keeps the code of each product for each shape, half a megabyte a piece, up to 1,024 of them
# in each of two caches; batches of ever new lengths fill them.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "256")
