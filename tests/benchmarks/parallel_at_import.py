"""A library that computes in parallel as soon as it is imported, if it may."""

import torch

PRODUCT = torch.ones(512, 512) @ torch.ones(512, 512)
