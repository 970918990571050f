"""What every test shares: one thread, because small tensors on shared cores are slower with two."""

import torch

torch.set_num_threads(1)
