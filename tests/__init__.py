import os

import torch

# Kernels for GPUs are interpreted where there is none. Triton asks when it is imported,
# which this package's modules do where PyTorch is built for GPUs.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')
