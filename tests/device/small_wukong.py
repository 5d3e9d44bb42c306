"""A small dense model, whose step is counted on the simulated device and apart from it.

A file of its own: who imports the simulated device gives up torch's private backend for good.
"""

from megarec.config.models import WukongConfig

EMBEDDINGS, EXAMPLES = 20, 6
WUKONG = WukongConfig(dim=8, layers=2, num_fm=4, num_lcb=4, rank=4, mlp=[24, 16], head=[8])
