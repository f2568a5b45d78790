"""One thread a test process: two of them run side by side, and threads that wait for each other stall."""

import torch

torch.set_num_threads(1)
