"""What is not about language: files, options, devices, loops. Import it before torch.

PyTorch's threads (GNU OpenMP) wait for one another by spinning, by default for some 20 ms. Beside
another busy process the thread that is waited for may itself wait for a core, which the spinning
ones keep from it, and training slows down up to tenfold. So they spin for a short time, then sleep.
The library reads this variable when torch is loaded; one that you set yourself is left alone.
"""
import os

SPINS = "1000"  # chosen in docs/speed.md
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = SPINS
