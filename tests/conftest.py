import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("cl_moe", deadline=None, derandomize=True)
settings.load_profile("cl_moe")
