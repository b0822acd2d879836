"""How many multiply-adds ContMix takes.

Each of the H W pixels has T = k^2 + K^2 taps in each of G groups. A logit is a product of d channels of the query with
d weights of the kernel: H W G T d for all. A tap weighs d channels of the value, those of the small kernel in the first
half and those of the large one in the second: H W G T d again. The softmax has none.

Before that, a matrix product of S^2 G d T multiply-adds projects the regions to taps; counters see it as such. The
authors' code makes a map of affinities instead, H W G S^2 d, and projects it at each pixel, H W G S^2 T.
"""

from collections.abc import Sequence
from math import prod

# The operators of the fused backends, in the namespace `overlock`.
OPERATORS = ('contmix_eager', 'contmix_compiled', 'contmix_triton')


def multiply_adds(query: Sequence[int], kernel: Sequence[int]) -> int:
    """Return the multiply-adds of a fused operator.

    Args:
        query: The shape (B, G d, H, W).
        kernel: The shape (B, G, d, T).
    """
    return 2 * prod(query) * kernel[-1]
